"""The command ``edge-ssm``: it parses, calls one function, prints."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import msgspec

import edge_ssm
from edge_ssm import models, profiles
from edge_ssm.engines import ENGINES, Engine, create
from edge_ssm.errors import EdgeSSMError, EngineUnavailable, RunFailed, UsageError
from edge_ssm.network import Network, at_sample_rate
from edge_ssm.stream import frames, sinks
from edge_ssm.stream.loop import GAP_POLICIES, Account, GapPolicy, Loop
from edge_ssm.stream.source import ByteSource
from edge_ssm.stream.stop import Stop
from edge_ssm.stream.windows import Windows

MAX_REPORTED = 20


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(edge_ssm.__version__, prog_name="edge-ssm")
def cli() -> None:
    """Run pruned S4 and S4D models on small devices, one sensor sample at a time."""


@cli.command("run")
@click.argument("model")
@click.option(
    "--stream",
    is_flag=True,
    help="Sample by sample, decisions as they fall due (the default, and so far the only way).",
)
@click.option("--input", "input_", default="-", metavar="FILE|-", help="Where samples come from.  [default: - (stdin)]")
@click.option(
    "--format",
    "format_",
    type=click.Choice(frames.FORMATS),
    help="Of the input.  [default: by the file's name, else csv]",
)
@click.option(
    "--scale", default="1", metavar="S[,S...]", help="i16le, f32le: factor to the model's units, one or one a channel."
)
@click.option("--output", default="-", metavar="FILE|-", help="Where decisions go.  [default: - (stdout)]")
@click.option(
    "--output-format",
    type=click.Choice(sinks.FORMATS),
    help="[default: text on a terminal, csv for *.csv, else ndjson]",
)
@click.option("--logits", is_flag=True, help="Add the logits to every decision.")
@click.option(
    "--truth",
    is_flag=True,
    help="Add the recording's own label (column `label`) to every decision; text shows it anyway.",
)
@click.option(
    "--engine",
    default="auto",
    metavar="NAME",
    help=f"auto, {', '.join(ENGINES)}.  [default: auto; for .onnx and .tflite their own]",
)
@click.option(
    "--threads", type=click.IntRange(1, 256), metavar="N", help="Of the engines onnx and tflite.  [default: 1]"
)
@click.option(
    "--hop",
    type=int,
    metavar="N",
    help="Samples between decisions; less than the window makes windows overlap.  [default: the window]",
)
@click.option("--carry", is_flag=True, help="Keep the state across windows instead of starting each from zero.")
@click.option(
    "--sample-rate",
    type=float,
    metavar="HZ",
    help="Of the stream, where it is not the trained one: the step size is rescaled.",
)
@click.option(
    "--gap",
    type=click.Choice(GAP_POLICIES),
    default="hold",
    show_default=True,
    help="What stands in for missing samples.",
)
@click.option(
    "--max-gap",
    type=click.IntRange(min=0),
    metavar="N",
    help="Longest gap in samples; a longer one resets.  [default: the window; 100 without pooling]",
)
@click.option(
    "--chunk",
    metavar="N|auto",
    help="Step up to N samples in one go, never across the end of a window; auto: as many as --latency-budget allows."
    "  [default: the profile's; 1]",
)
@click.option(
    "--latency-budget",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MS",
    help="For --chunk auto: how long the engine may take from the last sample of a chunk to its outputs.",
)
@click.option("--pace", is_flag=True, help="Replay a recording at its sample rate.")
@click.option(
    "--profile",
    default="auto",
    show_default=True,
    metavar="NAME|auto|none",
    help="Board and power mode (edge-ssm profiles list): which core, how the CPU waits for a GPU.",
)
@click.option("--strict", is_flag=True, help="Stop at the first malformed row.")
def run(model: str, stream: bool, **options: Any) -> None:
    """Classify a sensor stream with MODEL: an artifact of edge-ssm-build, or a .onnx or .tflite file of its export."""
    loaded = models.load(model)
    network = loaded.network
    if (rate := options["sample_rate"]) is not None:
        network = at_sample_rate(network, rate)
    pace = network.input.sample_rate_hz
    if options["pace"] and pace is None:
        raise UsageError("--pace: the model states no sample rate; give --sample-rate")
    windows = Windows(network, options["hop"], options["carry"])
    source = ByteSource(options["input_"])
    if options["input_"] == "-" and sys.stdin.isatty():
        click.echo("edge-ssm: reading samples from the terminal, Ctrl-D ends", err=True)
    codec = options["format_"] or frames.guess_format(options["input_"])
    decoder = frames.decoder(codec, network.input, _scale(options["scale"]))
    named = _firmware_profile(options["profile"])
    engine, why = _engine(loaded, options["engine"], network, windows.lanes, named, options["threads"])
    sink = sinks.open_sink(options["output"], options["output_format"], network, options["logits"], options["truth"])
    gap: GapPolicy = options["gap"]
    default = str(named.profile.runtime.chunk) if named else "1"
    chunk = _chunk(options["chunk"] or default, options["latency_budget"], engine, windows)
    from edge_ssm.stream.live import Live

    live = Live(sink, model, engine.name, pace)
    loop = Loop(engine, windows, live, gap, options["max_gap"], options["strict"], _Reporter(source.name), chunk)
    live.watch(loop.account)
    try:
        with Stop() as stop:
            account = loop.run(source, decoder, stop, pace if options["pace"] else None)
    finally:
        source.close()
        live.close()
    if engine.lost:
        why += f", lost in mid-stream ({engine.lost}); {engine.name} took over"
    click.echo(summary(account, network, why, chunk), err=True)
    if account.malformed and not account.samples:
        raise EdgeSSMError(
            f"{source.name}: no valid sample among {account.malformed} rows; expected {codec} with "
            f"{len(network.input.channels)} channels ({', '.join(network.input.channels)})"
        )


def _engine(
    model: models.Model,
    asked: str,
    network: Network,
    lanes: int,
    named: profiles.NamedProfile | None,
    threads: int | None,
) -> tuple[Engine, str]:
    """The engine, and its name with the reason where "auto" chose it, or with where its runtime put it.

    ``network`` is the model's, or that at another sample rate."""
    from edge_ssm.engines import choice, compiled

    def say() -> None:
        click.echo("edge-ssm: compiling for this processor, once; takes some seconds", err=True)

    runtime = named.profile.runtime if named else None
    gpu_waits = runtime.gpu_waits if runtime else "spin"
    name = model.engine(asked)
    if name in ("auto", "cpu", "cpu-float32"):
        with suppress(EngineUnavailable):  # said again, or gone around, by what follows
            compiled.load(say)
    if name != "auto" or threads is not None:
        engine = create(name, network, lanes, gpu_waits, model.graph, threads)
        if engine.warning:
            click.echo(f"edge-ssm: warning: {engine.warning}", err=True)
        return engine, f"{name} ({engine.where})" if engine.where else name
    engine, trial = choice.choose(network, lanes, gpu_waits, runtime.engines if runtime else None)
    return engine, f"{engine.name} (by trial: {trial.why()})"


def _chunk(text: str, budget_ms: float | None, engine: Engine, windows: Windows) -> int:
    from edge_ssm.stream import chunks

    if text != "auto":
        if budget_ms is not None:
            raise UsageError("--latency-budget: only with --chunk auto")
        try:
            size = int(text)
        except ValueError:
            size = 0
        if not 1 <= size <= chunks.LARGEST:
            raise UsageError(f"--chunk {text!r}: expected auto, or 1 to {chunks.LARGEST} samples")
        return size
    if budget_ms is None or not math.isfinite(budget_ms):
        raise UsageError("--chunk auto: needs --latency-budget, in milliseconds")
    network = engine.network
    wait = 0.0
    if network.pooling == "none":
        if network.input.sample_rate_hz is None:
            raise UsageError("--chunk auto: the model states no sample rate; give --sample-rate")
        wait = 1 / network.input.sample_rate_hz
    return chunks.largest(engine, windows.hop if wait == 0 else chunks.LARGEST, budget_ms / 1e3, wait)


def _scale(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--scale {text!r}: expected numbers separated by commas") from None


class _Reporter:
    """Malformed rows on stderr, the first ones only: a babbling sensor must not fill a log. All are counted."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._count = 0

    def __call__(self, line: str) -> None:
        self._count += 1
        if self._count <= MAX_REPORTED:
            click.echo(f"edge-ssm: {self._source}, {line}", err=True)
        if self._count == MAX_REPORTED:
            click.echo("edge-ssm: further malformed rows are counted, not shown", err=True)


def summary(account: Account, network: Network, engine: str, chunk: int = 1) -> str:
    """The account of a run, for people."""
    gaps = ", ".join(f"{n} {reason}" for reason, n in sorted(account.gaps.items())) or "0"
    latency = account.latency
    p50, p99, longest = (latency.percentile_ns(p) / 1e3 for p in (50, 99, 100))
    lines = [
        f"ended by {account.ended_by}; engine {engine}",
        f"samples   {account.samples}, gaps {gaps}, malformed rows {account.malformed}",
        f"decisions {account.decisions}, windows without one {account.undecided}, resets {account.resets}"
        + (f" (gave up {account.discarded} samples)" if account.discarded else "")
        + (f", last window unfinished with {account.unfinished} samples" if account.unfinished else ""),
    ]
    if latency.count:
        speed = account.samples / account.seconds
        real_time = (
            f", {speed / network.input.sample_rate_hz:.3g} times real time" if network.input.sample_rate_hz else ""
        )
        name = "step" if chunk == 1 else f"chunk {chunk}"
        times = f"p50 {p50:.1f} us, p99 {p99:.1f} us, max {longest:.1f} us"
        lines.append(f"{name:<9} {times}; {speed:.0f} samples/s{real_time}")
    if account.labelled:
        share = account.correct / account.labelled
        lines.append(
            f"accuracy  {account.correct} of {account.labelled} decisions equal the true label ({100 * share:.1f} %)"
        )
    return "\n".join(lines)


@cli.command("inspect")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def inspect_(model: str, as_json: bool) -> None:
    """Show what MODEL holds: layers, channels, cost of a step, provenance."""
    from edge_ssm import inspect

    description = inspect.describe_model(models.load(model))
    click.echo(json.dumps(description, indent=1) if as_json else inspect.render(description))


@cli.command()
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@click.option("--engine", "--engines", "engines", default="auto", show_default=True, metavar="NAME[,NAME...]|all")
@click.option(
    "--threads", type=click.IntRange(1, 256), metavar="N", help="Of the engines onnx and tflite.  [default: 1]"
)
@click.option("--chunk", "chunks", default="1", show_default=True, metavar="N[,N...]", help="Samples a call.")
@click.option("--lanes", default="1", show_default=True, metavar="N[,N...]", help="Streams at once.")
@click.option(
    "--sweep",
    metavar="chunk,lanes,family",
    help="Chunks of 1 to 64, lanes of 1 to 16; family: several MODELs, as of one pruning run.",
)
@click.option("--input", "recording", metavar="FILE", help="A recording to step over.  [default: noise]")
@click.option("--paced/--no-paced", default=True, help="Also at the model's sample rate.  [default: paced]")
@click.option("--meter", default="auto", show_default=True, help="auto, hwmon, jtop, rapl, battery or none.")
@click.option("--quick", is_flag=True, help="Fewer, shorter rounds: to look, not to publish.")
@click.option("--rounds", type=click.IntRange(2, 1000), metavar="N", help="[default: 5; quick: 3]")
@click.option(
    "--block-seconds", type=click.FloatRange(0.2, 3600), metavar="S", help="Of each block.  [default: 10; quick: 1]"
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order of blocks.")
@click.option("--profile", "profile_", default="auto", show_default=True, metavar="NAME|auto|none")
@click.option("--json", "json_", metavar="FILE", help="The report for programs.")
@click.option("--html", "html_", metavar="FILE", help="The report as a page with plots.")
@click.option("--compare", nargs=2, metavar="A.json B.json", help="Compare two reports; measures nothing.")
@click.option(
    "--step-table", metavar="FILE", help="Gets the steps of many networks, for edge-ssm-build prune; no MODEL."
)
def profile(models: tuple[str, ...], engines: str, step_table: str | None, **options: Any) -> None:
    """Measure latency, power and energy of MODEL on this machine."""
    if compared := options["compare"]:
        from edge_ssm.monitor import compare, report

        click.echo(compare.compare(report.load(Path(compared[0])), report.load(Path(compared[1]))))
        return
    if step_table is not None:
        from edge_ssm.monitor import steptime

        if models:
            raise UsageError("--step-table: measures networks of its own; leave MODEL out")
        table = steptime.tabulate(engines)
        steptime.save_table(Path(step_table), table)
        click.echo(f"{step_table}: {len(table.rows)} networks measured on {table.machine}, engine {table.engine}")
        return
    _profile(models, engines.split(","), options)


def _profile(models: tuple[str, ...], engines: list[str], options: dict[str, Any]) -> None:
    from edge_ssm.monitor import page, profiling, protocol, report
    from edge_ssm.stream import recording

    if not models:
        raise UsageError("MODEL: missing; give an artifact, or --compare, or --step-table")
    quick, sweep = options["quick"], [part for part in (options["sweep"] or "").split(",") if part]
    if unknown := [part for part in sweep if part not in ("chunk", "lanes", "family")]:
        raise UsageError(f"--sweep {unknown[0]!r}: expected chunk, lanes, family")
    if "family" in sweep and len(models) < 2:
        raise UsageError("--sweep family: give several MODELs")
    for place in (options["json_"], options["html_"]):
        if place:
            report.check_place(Path(place))
    path = options["recording"]
    request = profiling.Request(
        models=models,
        engines=engines,
        chunks=profiling.CHUNKS if "chunk" in sweep else _counts("--chunk", options["chunks"]),
        lanes=profiling.LANES if "lanes" in sweep else _counts("--lanes", options["lanes"]),
        paced=options["paced"] and not sweep,
        recording=path,
        read=lambda network: recording.read(path, network),
        meter=options["meter"],
        rounds=options["rounds"] or (protocol.QUICK_ROUNDS if quick else protocol.ROUNDS),
        block_s=options["block_seconds"] or (protocol.QUICK_BLOCK_S if quick else protocol.BLOCK_S),
        quick=quick,
        seed=options["seed"],
        profile=_firmware_profile(options["profile_"]),
        threads=options["threads"],
    )
    measured = profiling.measure(request)
    click.echo(report.render(measured))
    if options["json_"]:
        report.save(Path(options["json_"]), measured)
    if options["html_"]:
        report.write(Path(options["html_"]), page.render(measured).encode())
    if not measured.valid:
        raise RunFailed("the machine changed while it was measured: " + "; ".join(measured.invalid_because))


def _counts(option: str, text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1 or max(found) > 4096:
        raise UsageError(f"{option} {text!r}: expected numbers from 1 to 4096, separated by commas")
    return found


def _firmware_profile(name: str) -> profiles.NamedProfile | None:
    """The one asked for; what it says of the process is done here. A mismatch is a warning."""
    if name == "none":
        return None
    named, warning = profiles.chosen(name)
    if warning:
        click.echo(f"edge-ssm: warning: {warning}", err=True)
    if named is not None and (cores := set(named.profile.runtime.affinity) & os.sched_getaffinity(0)):
        os.sched_setaffinity(0, cores)
    return named


@cli.command("top")
@click.option("--once", is_flag=True, help="Print once and end; so too where stdout is no terminal.")
@click.option("--json", "as_json", is_flag=True, help="For programs; once.")
@click.option("--interval", type=click.FloatRange(0.2, 60), default=1.0, show_default=True, metavar="S")
def top_(once: bool, as_json: bool, interval: float) -> None:
    """Watch the runs on this machine: decisions, latency, power, temperature, events. Ctrl-C ends."""
    from edge_ssm.stream import live, top

    if as_json:
        click.echo(msgspec.json.encode(live.running()).decode())
        return
    meter = top.file_meter()
    while True:
        time.sleep(0 if meter is None else meter.period_s)  # some meters tell what was since they were opened
        text = top.page(live.running(), meter)
        if once or not sys.stdout.isatty():
            click.echo(text)
            return
        click.clear()
        click.echo(text)
        time.sleep(interval)


@cli.group("profiles")
def profiles_() -> None:
    """Boards and power modes that edge-ssm knows."""


@profiles_.command("list")
def profiles_list() -> None:
    """One line each; * marks this machine's."""
    here = profiles.detect()
    for named in profiles.load_all():
        p = named.profile
        mark = "*" if here is not None and here.name == named.name else " "
        click.echo(f"{mark} {named.name:32} {p.board:24} {p.power_mode or '-':12}{' default' if p.default else ''}")


@profiles_.command("show")
@click.argument("name")
def profiles_show(name: str) -> None:
    """All figures of a profile, with their sources."""
    click.echo(profiles.describe(profiles.load(name)))


@profiles_.command("detect")
def profiles_detect() -> None:
    """This machine's profile, by its module and the name of its power mode."""
    named, warning = profiles.chosen("auto")
    if named is None:
        raise EdgeSSMError(warning or "no profile fits this machine; edge-ssm profiles list shows what there is")
    click.echo(named.name)


@cli.command("compile")
@click.option(
    "--target", default="host", show_default=True, help="host, the processor of another device, or a GPU: sm_87."
)
@click.option(
    "--output",
    metavar="PATH",
    help="A file; for a GPU a folder.  [default: this machine's folder of compiled kernels]",
)
@click.option("--assembly", metavar="FILE", help="Write the assembly there, to be read.")
def compile_(target: str, output: str | None, assembly: str | None) -> None:
    """Compile an engine's kernels ahead of their first use, here or for a device that shall need no compiler."""
    from edge_ssm.engines import compiled, cuda_store

    if target.startswith("sm_"):
        if assembly is not None:
            raise UsageError("--assembly: not for a GPU; its kernels are PTX, which is text")
        folder, made = cuda_store.compile_and_keep(target, None if output is None else Path(output))
        sizes = ", ".join(f"{name} of {len(made[name].ptx)} bytes of PTX" for name in sorted(made))
        click.echo(f"{folder}: CUDA kernels for {target}: {sizes}")
        click.echo(f"copy them to the device, into {compiled.USER_FOLDER} there (or $EDGE_SSM_CACHE)")
        return
    kept, image = compiled.compile_and_keep(
        target, None if output is None else Path(output), None if assembly is None else Path(assembly)
    )
    click.echo(f"{kept}: kernel for {image.header.target}, {len(image.code)} bytes of code")
    if image.header.target == target:
        click.echo(f"copy it to the device, into {compiled.USER_FOLDER} there (or $EDGE_SSM_CACHE)")


@cli.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor_(as_json: bool) -> None:
    """Show what this machine has, what is missing, and the command that adds it."""
    from edge_ssm import doctor

    findings = doctor.examine()
    click.echo(json.dumps(doctor.as_json(findings), indent=1) if as_json else doctor.render(findings))


def run_command(command: click.Command, prog_name: str) -> int:
    """Run a click command; errors become one line on stderr. Returns the exit status (edge_ssm.errors)."""
    try:
        status = command.main(prog_name=prog_name, standalone_mode=False)
        return status if isinstance(status, int) else 0
    except EdgeSSMError as error:
        message, status = str(error), error.exit_status
    except SystemExit:  # click's way out where the reader of stdout or stderr has gone away, as `| head` does
        return 0
    except click.Abort:
        message, status = "interrupted", 130
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        hint = f"; see {prog_name} --help" if isinstance(error, click.UsageError) else ""
        message, status = error.format_message() + hint, 2
    click.echo(f"{prog_name}: error: {' '.join(message.split())}", err=True)
    return status


def main() -> None:
    sys.exit(run_command(cli, "edge-ssm"))
