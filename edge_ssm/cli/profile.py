"""``edge-ssm profile``: measure models on this machine, or compare two reports."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from edge_ssm import log, outputs
from edge_ssm.cli import signals
from edge_ssm.cli.options import Finite, NotEmpty, OptionWithAliases, explicit_parameters
from edge_ssm.errors import RunFailed, UsageError
from edge_ssm.hardware import boards
from edge_ssm.io import recording
from edge_ssm.profiler import compare as profiler_compare
from edge_ssm.profiler import protocol, report, report_html
from edge_ssm.profiler import run as profiler_run
from edge_ssm.profiler import step_table as profiler_step_table
from edge_ssm.service import plan
from edge_ssm.text import sanitize

logger = logging.getLogger(__name__)
SWEEPS = ("chunk", "lanes", "family")
MAX_COUNT = 4096
"""Largest chunk, and largest number of lanes."""


@click.command("profile")
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@click.option(
    "--engine",
    "--engines",
    "engines",
    default="auto",
    show_default=True,
    metavar="NAME[,NAME...]|all",
    help="Engines to measure.",
)
@click.option(
    "--threads",
    type=click.IntRange(1, 256),
    metavar="N",
    help="Number of threads of the engines onnx and tflite.  [default: 1]",
)
@click.option(
    "--chunk",
    "chunks",
    default="1",
    show_default=True,
    metavar="N[,N...]",
    help="Numbers of samples per call of the engine.",
)
@click.option("--lanes", default="1", show_default=True, metavar="N[,N...]", help="Numbers of simultaneous streams.")
@click.option(
    "--sweep",
    type=NotEmpty(),
    metavar="chunk,lanes,family",
    help="Measure chunks of 1 to 64, lanes of 1 to 16, or a family: several MODELs, as from one pruning run.",
)
@click.option(
    "--input", "recording_path", type=NotEmpty(), metavar="FILE", help="Recording to step over.  [default: noise]"
)
@click.option("--paced/--no-paced", default=True, help="Measure at the model's sample rate as well.  [default: paced]")
@click.option(
    "--meter",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Power meter: auto, hwmon, jtop, rapl, battery or none.",
)
@click.option("--quick", is_flag=True, help="Measure fewer and shorter rounds: for a first look, not for publication.")
@click.option(
    "--rounds", type=click.IntRange(2, 1000), metavar="N", help="Number of rounds.  [default: 5; with --quick: 3]"
)
@click.option(
    "--block-seconds",
    type=Finite(0.2, 3600),
    metavar="S",
    help="Duration of each measurement block, in seconds.  [default: 10; with --quick: 1]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed for the order of the blocks.")
@click.option(
    "--board",
    cls=OptionWithAliases,
    hidden_flags=("--profile",),
    default="auto",
    show_default=True,
    metavar="NAME|auto|none",
    help="Board and power mode (edge-ssm boards list).",
)
@click.option("--json", "json_path", type=NotEmpty(), metavar="FILE", help="File for the report as JSON.")
@click.option("--html", "html_path", type=NotEmpty(), metavar="FILE", help="File for the report as a page with plots.")
@click.option(
    "--compare",
    nargs=2,
    type=NotEmpty(),
    metavar="A.json B.json",
    help="Compare two reports instead of measuring.",
)
@click.option(
    "--step-table",
    type=NotEmpty(),
    metavar="FILE",
    help="Measure the steps of many networks instead of MODEL, and write them to FILE for edge-ssm-build prune.",
)
@click.pass_context
def profile(
    context: click.Context, /, models: tuple[str, ...], engines: str, step_table: str | None, **options: Any
) -> None:
    """Measure latency, power and energy of MODEL on this machine."""
    log.configure()
    explicit = explicit_parameters(context)
    if options["compare"]:
        _refuse_others(context, "--compare", "takes two reports and nothing else", explicit - {"compare"})
        first, second = (report.load(Path(path)) for path in options["compare"])
        click.echo(profiler_compare.compare(first, second))
        return
    with signals.termination_raises():
        if step_table is not None:
            reason = "measures networks of its own, on one engine"
            _refuse_others(context, "--step-table", reason, explicit - {"step_table", "engines"})
            _measure_step_table(step_table, engines)
        else:
            _measure(models, engines, options, explicit)


def _refuse_others(context: click.Context, option: str, reason: str, others: set[str]) -> None:
    """Raise UsageError if ``others`` were given too: an option must not appear to have an effect that it lacks."""
    if others:
        flags = {p.name: p.opts[0] for p in context.command.params if isinstance(p, click.Option)}
        unwanted = ", ".join(sorted(flags.get(name, "MODEL") for name in others))
        raise UsageError(f"{option}: {reason}; leave out {unwanted}")


def _measure_step_table(path: str, engine: str) -> None:
    if engine == "all" or "," in engine:
        raise UsageError(f"--step-table: takes one engine, not {engine!r}")
    outputs.check_places({"--step-table": Path(path)}, {})
    table = profiler_step_table.tabulate(engine)
    profiler_step_table.save_table(Path(path), table)
    click.echo(f"{sanitize(path)}: {len(table.rows)} networks measured on {table.machine}, engine {table.engine}")


def _measure(models: tuple[str, ...], engines: str, options: Mapping[str, Any], explicit: set[str]) -> None:
    if not models:
        raise UsageError("MODEL: missing; give an artifact, or --compare, or --step-table")
    request = _request(models, engines, options, explicit)
    flags = (("--json", "json_path"), ("--html", "html_path"))
    places = {flag: Path(options[name]) for flag, name in flags if options[name]}
    inputs = {f"MODEL {model}": Path(model) for model in models}
    if request.recording is not None:
        inputs["--input"] = Path(request.recording)
    outputs.check_places(places, inputs)
    measured = profiler_run.measure(request)
    failures = []
    for flag, place in places.items():  # Before anything is printed: a reader that leaves must not cost the report.
        content = report.as_json(measured) if flag == "--json" else report_html.render(measured).encode()
        try:
            outputs.write(place, content)
        except RunFailed as error:
            failures.append(str(error))
    click.echo(report.render(measured))
    if not measured.valid:
        failures.append("the machine changed while it was measured: " + "; ".join(measured.invalid_because))
    if failures:
        raise RunFailed("; ".join(failures))


def _request(
    models: tuple[str, ...], engines: str, options: Mapping[str, Any], explicit: set[str]
) -> profiler_run.ProfileSettings:
    is_quick, path = options["quick"], options["recording_path"]
    sweep = _sweep(options, models, explicit)
    return profiler_run.ProfileSettings(
        models=models,
        engines=_engines(engines),
        chunks=profiler_run.CHUNKS if "chunk" in sweep else _counts("--chunk", options["chunks"]),
        lanes=profiler_run.LANES if "lanes" in sweep else _counts("--lanes", options["lanes"]),
        paced=options["paced"] and not sweep,
        recording=path,
        read=lambda network: recording.read(path, network),
        meter=options["meter"],
        rounds=options["rounds"] or (protocol.QUICK_ROUNDS if is_quick else protocol.ROUNDS),
        block_s=options["block_seconds"] or (protocol.QUICK_BLOCK_S if is_quick else protocol.BLOCK_S),
        quick=is_quick,
        seed=options["seed"],
        profile=_board(options["board"]),
        threads=options["threads"],
    )


def _sweep(options: Mapping[str, Any], models: tuple[str, ...], explicit: set[str]) -> list[str]:
    """Return what to sweep over. Raise UsageError for what is unknown, or contradicts another option."""
    sweep = [] if options["sweep"] is None else options["sweep"].split(",")
    if unknown := [part for part in sweep if part not in SWEEPS]:
        raise UsageError(f"--sweep {unknown[0]!r}: expected {', '.join(SWEEPS)}")
    if "family" in sweep and len(models) < 2:
        raise UsageError("--sweep family: give several MODELs")
    for part, name in (("chunk", "chunks"), ("lanes", "lanes")):
        if part in sweep and name in explicit:
            raise UsageError(f"--sweep {part}: measures several; leave out --{part}")
    if sweep and "paced" in explicit and options["paced"]:
        raise UsageError("--sweep: runs back to back; leave out --paced")
    return sweep


def _engines(text: str) -> list[str]:
    names = text.split(",")
    if len(names) > 1 and "all" in names:
        raise UsageError(f"--engine {text!r}: all stands by itself")
    _check_distinct("--engine", text, names)
    return names


def _check_distinct(option: str, text: str, values: Sequence[object]) -> None:
    if repeated := [value for i, value in enumerate(values) if value in values[:i]]:
        raise UsageError(f"{option} {text!r}: {repeated[0]} appears twice")


def _counts(option: str, text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1 or max(counts) > MAX_COUNT:
        raise UsageError(f"{option} {text!r}: expected numbers from 1 to {MAX_COUNT}, separated by commas")
    _check_distinct(option, text, counts)
    return counts


def _board(name: str) -> boards.NamedProfile | None:
    """Return the board, after moving this process to the board's cores. A mismatch is a warning."""
    if name == "none":
        return None
    board, mismatch = boards.select(name)
    if mismatch:
        logger.warning("warning: %s", mismatch)
    if cores := plan.usable_cores(None, board):
        os.sched_setaffinity(0, cores)
    return board
