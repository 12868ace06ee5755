"""Commands for pruning: prune, report."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_ssm.cli.options import Finite
from edge_ssm.errors import UsageError
from edge_ssm_build.cli.options import make_folder, parse_numbers, require_torch

if TYPE_CHECKING:
    from edge_ssm_build.pruning.executors import ExecutorFactory
    from edge_ssm_build.pruning.plan import Plan
    from edge_ssm_build.training.checkpoint import Checkpoint

SHARE = "rate, F*rate such as 0.5*rate, a number from 0 to below 1, or one number per rate"
DEFAULT_RATES = "0.1,0.3,0.5,0.7,0.9"
DEFAULT_RATES_WITH_TARGET = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9"


@click.command()
@click.argument("checkpoint")
@click.option(
    "--output",
    required=True,
    metavar="DIR",
    help="Folder for the family. If the command is killed, the same command resumes.",
)
@click.option(
    "--method",
    default="best",
    show_default=True,
    help="How operators are chosen: s4op, best, compact, smallest, or a score: magnitude, taylor, energy, sensitivity, "
    "h2. Sets the defaults of --seeds, --budget, --bypass, --columns, --rows, --states, --refit and --distill.",
)
@click.option(
    "--rates",
    metavar="R,R,...",
    help="Shares of all operators to remove, ascending.  [default: 0.1,0.3,0.5,0.7,0.9; with a target every 0.1]",
)
@click.option(
    "--seeds", metavar="S,S,...", help="One candidate is made per rate and seed.  [default: 0,1,2 for s4op, else 0]"
)
@click.option(
    "--budget",
    type=click.Choice(["depth", "uniform", "global"]),
    help="How a rate is distributed over the layers: more from deeper ones, the same from all, or by score.  "
    "[default: depth for s4op, else global]",
)
@click.option(
    "--bypass",
    type=click.Choice(["identity", "gain", "zero"]),
    help="What replaces a removed operator: its input, its input times a fitted gain, or nothing.  "
    "[default: identity for s4op, else gain]",
)
@click.option(
    "--columns",
    metavar="SHARE",
    help=f"Share of the mixing columns to remove: {SHARE}.  "
    "[default: 0.75*rate for compact, rate for smallest, else 0]",
)
@click.option(
    "--rows",
    metavar="SHARE",
    help="Share of the mixing rows to remove, like --columns and with the same default.",
)
@click.option(
    "--states",
    metavar="SHARE",
    help="Share of the states of the remaining channels to remove, like --columns.  "
    "[default: 0.7 for compact, 0.8 for smallest, else 0]",
)
@click.option(
    "--states-method",
    type=click.Choice(["modal", "last", "aire", "h2"]),
    default="h2",
    show_default=True,
    help="How states are removed: h2 fits new ones; the others drop modes by a score and need a diagonal kernel.",
)
@click.option(
    "--mixing-dtype",
    type=click.Choice(["float32", "float16", "int8"]),
    default="float32",
    show_default=True,
    help="Type of the mixing weights.",
)
@click.option(
    "--refit/--no-refit",
    default=None,
    help="Refit the mixing by ridge regression before fine-tuning.  [default: refit for best, compact and smallest]",
)
@click.option(
    "--distill",
    type=Finite(0, 1),
    help="Weight of the unpruned network's logits in the loss.  [default: 0.5 for best, compact and smallest, else 0]",
)
@click.option(
    "--target-latency",
    type=Finite(min=0, min_open=True),
    metavar="US",
    help="Target: largest duration of a step, in microseconds.",
)
@click.option(
    "--max-accuracy-loss",
    type=Finite(min=0),
    metavar="POINTS",
    help="Target: largest loss of balanced validation accuracy, in percentage points.",
)
@click.option(
    "--target-size", type=click.IntRange(min=1), metavar="BYTES", help="Target: largest size of the artifact, in bytes."
)
@click.option("--engine", default="cpu", show_default=True, help="Engine whose step is measured on this machine.")
@click.option(
    "--step-table",
    metavar="FILE",
    help="Step latencies of the device, written there by edge-ssm profile --step-table. Replaces the measurement.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Largest number of worker processes.  [default: one per core]"
)
@click.option("--scheduler", metavar="ADDRESS", help="Run candidates on a Dask cluster, tcp://HOST:PORT.")
def prune(checkpoint: str, output: str, method: str, **options: Any) -> None:
    """Remove whole SSM operators of CHECKPOINT step by step, with fine-tuning: a nested family of artifacts.

    With a target, the search stops at the best member within it and also writes that as chosen.safetensors. The exit
    status is 1 if the stream of a member does not agree with its network, or if no member meets the target; all other
    members are written.
    """
    require_torch()
    from edge_ssm.profiler.step_table import load_table
    from edge_ssm_build.data import datasets
    from edge_ssm_build.pruning.executors import prepare_process
    from edge_ssm_build.pruning.search import SearchSettings, check_outputs, search
    from edge_ssm_build.pruning.target import Target
    from edge_ssm_build.training.checkpoint import load_checkpoint

    _check_method(method)
    start = load_checkpoint(Path(checkpoint))
    target = Target(options["target_latency"], options["max_accuracy_loss"], options["target_size"])
    plan = _plan(start, method, options, DEFAULT_RATES_WITH_TARGET if target.is_set() else DEFAULT_RATES)
    table_path = options["step_table"]
    table = load_table(Path(table_path)) if table_path else None
    data, folder = datasets.load(start.data), make_folder(output)
    inputs = {f"CHECKPOINT {checkpoint}": Path(checkpoint)} | ({"--step-table": Path(table_path)} if table_path else {})
    check_outputs(folder, plan, inputs)
    # One thread per candidate, here and in workers, so that sums are the same wherever it runs.
    prepare_process()
    address, engine = options["scheduler"], options["engine"]
    with _executors(address, options["workers"], len(plan.seeds)) as make_executor:
        settings = SearchSettings(folder, method, target, table, engine, make_executor, is_remote=address is not None)
        result = search(start, data, plan, settings, on_member=lambda member: click.echo(member.summary()))
    for line in result.summary():
        click.echo(line)
    result.raise_for_problems()


def _check_method(method: str) -> None:
    from edge_ssm_build.pruning.plan import METHODS

    if method not in METHODS:
        raise UsageError(f"method {method!r}: unknown, expected {', '.join(METHODS)}")


def _plan(start: Checkpoint, method: str, options: dict[str, Any], default_rates: str) -> Plan:
    """Return the method's plan with the options that the user has set."""
    from dataclasses import replace

    from edge_ssm_build.pruning.plan import METHODS, check_plan, make_plan

    rates = parse_numbers(options["rates"] or default_rates, float, "--rates")
    names = ("budget", "bypass", "columns", "rows", "states", "refit", "distill")
    overrides = {name: options[name] for name in names if options[name] is not None}
    if options["seeds"]:
        overrides["seeds"] = tuple(parse_numbers(options["seeds"], int, "--seeds"))
    plan = make_plan(replace(METHODS[method], **overrides), rates, start)
    plan = replace(plan, states_method=options["states_method"], mixing_dtype=options["mixing_dtype"])
    return check_plan(start, plan)


def _executors(
    address: str | None, workers: int | None, candidates: int
) -> AbstractContextManager[ExecutorFactory | None]:
    """Return the executors of a Dask cluster, or of at most one local process per candidate of a rate."""
    from edge_ssm_build.pruning import executors

    if address:
        return executors.cluster(address)
    return executors.local(min(workers or len(os.sched_getaffinity(0)), candidates))


@click.command()
@click.argument("runs", nargs=-1, required=True)
@click.option("--output", metavar="DIR", help="Folder for the report.  [default: report in the first of RUNS]")
def report(runs: tuple[str, ...], output: str | None) -> None:
    """Show the trade-off of one or more families, folders that prune wrote, as HTML, PNG, CSV and JSON."""
    from edge_ssm_build.pruning.report import write_report

    folder = make_folder(output or str(Path(runs[0]) / "report"))
    for path in write_report([Path(run) for run in runs], folder):
        click.echo(str(path))
