"""The command ``edge-ssm``: it parses, calls one function, prints."""

from __future__ import annotations

from edge_ssm.cli import signals
from edge_ssm.telemetry import status_files

# isort: split
import errno
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import msgspec
from click.core import ParameterSource

import edge_ssm
from edge_ssm.cli.options import Finite, NotEmpty, given
from edge_ssm.engines import verification
from edge_ssm.engines.cpu import kernel_file
from edge_ssm.engines.cuda import cache as cuda_cache
from edge_ssm.engines.registry import ENGINES
from edge_ssm.errors import EdgeSSMError, RunFailed, UsageError
from edge_ssm.formats import loading as model_files
from edge_ssm.hardware import boards
from edge_ssm.io import address
from edge_ssm.io.codecs import registry as codecs
from edge_ssm.io.sinks import formats
from edge_ssm.io.sinks.queue import OVERFLOWS
from edge_ssm.runtime.gaps import GAP_POLICIES
from edge_ssm.telemetry.summary import summary
from edge_ssm.text import sanitize


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(edge_ssm.__version__, prog_name="edge-ssm")
def cli() -> None:
    """Run pruned S4 and S4D models on small devices, one sensor sample at a time."""


@cli.command("run")
@click.argument("model", required=False)
@click.option("--config", metavar="FILE", help="A service's configuration (TOML); flags that are given come first.")
@click.option(
    "--stream",
    is_flag=True,
    help="Sample by sample, decisions as they fall due (the default, and so far the only way).",
)
@click.option(
    "--input",
    metavar="FILE|-|ADDRESS",
    help="Where samples come from: a file, stdin, or serial:, tcp:, tcp-listen:, udp:, unix:, unix-listen:, mqtt:, "
    "iio: and an address (docs/service.md).  [default: - (stdin)]",
)
@click.option(
    "--format", type=click.Choice(codecs.FORMATS), help="Of the input.  [default: by the file's name, else csv]"
)
@click.option("--scale", metavar="S[,S...]", help="i16le, f32le: factor to the model's units, one or one a channel.")
@click.option("--follow", is_flag=True, help="Go on at the end of a file, as it grows or is replaced.")
@click.option("--stale-after", type=float, metavar="S", help="Report a sensor that is silent for so long.")
@click.option("--time-gaps", is_flag=True, help="Take time stamps that skip samples for a gap.")
@click.option(
    "--output",
    metavar="FILE|-|ADDRESS",
    help="Where decisions go: a file, stdout, or tcp:, udp:, unix:, mqtt:, http: and an "
    "address.  [default: - (stdout)]",
)
@click.option(
    "--output-format",
    type=click.Choice(formats.FORMATS),
    help="[default: text on a terminal, csv for *.csv, else ndjson]",
)
@click.option("--logits", is_flag=True, help="Add the logits to every decision.")
@click.option(
    "--truth",
    is_flag=True,
    help="Add the recording's own label (column `label`) to every decision; text shows it anyway.",
)
@click.option("--append", is_flag=True, help="Add to the output file instead of replacing it.")
@click.option("--rotate-bytes", type=int, metavar="N", help="Start another output file at this size.")
@click.option("--rotate-keep", type=int, metavar="N", help="Older output files kept.  [default: 5]")
@click.option("--queue", type=int, metavar="N", help="Decisions that may wait for a slow reader.  [default: 1024]")
@click.option(
    "--overflow",
    type=click.Choice(OVERFLOWS),
    help="What a full queue does.  [default: drop-oldest; wait where the input is a file or stdin]",
)
@click.option(
    "--engine",
    metavar="NAME",
    help=f"auto, {', '.join(ENGINES)}.  [default: auto; for .onnx and .tflite their own]",
)
@click.option("--threads", type=int, metavar="N", help="Of the engines onnx and tflite.  [default: 1]")
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
@click.option("--gap", type=click.Choice(GAP_POLICIES), help="What stands in for missing samples.  [default: hold]")
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
@click.option(
    "--deadline",
    type=float,
    metavar="PERIODS",
    help="A decision later than so many sample periods is counted as late.  [default: the profile's; 1]",
)
@click.option("--pace", is_flag=True, help="Replay a recording at its sample rate.")
@click.option(
    "--profile",
    metavar="NAME|auto|none",
    help="Board and power mode (edge-ssm profiles list): which core, how the CPU waits for a GPU.  [default: auto]",
)
@click.option("--affinity", type=int, multiple=True, metavar="CORE", help="Keep to this core; may be repeated.")
@click.option("--fifo", type=int, metavar="PRIORITY", help="Real-time priority (SCHED_FIFO) of the loop, 1 to 98.")
@click.option("--state", metavar="DIR", help="Keep snapshots there, and go on from the last one.")
@click.option("--snapshot-interval", type=float, metavar="S", help="[default: 10]")
@click.option("--reload", is_flag=True, help="Take a new MODEL over on SIGHUP or when its file changes.")
@click.option(
    "--member", multiple=True, metavar="FILE", help="A smaller model of the same family to move to under pressure."
)
@click.option("--max-misses", type=float, metavar="SHARE", help="Of late decisions before a move.  [default: 0.01]")
@click.option("--max-power", type=float, metavar="W", help="Power before a move.  [default: the profile's]")
@click.option("--max-temperature", type=float, metavar="C", help="Temperature before a move.  [default: the profile's]")
@click.option("--settle", type=float, metavar="S", help="Between two moves.  [default: 30]")
@click.option("--listen", metavar="HOST:PORT", help="Status page, /healthz and /readyz there; :PORT is loopback only.")
@click.option("--prometheus", is_flag=True, help="Metrics too, at /metrics.")
@click.option(
    "--require-signature",
    multiple=True,
    metavar="KEYFILE",
    help="Take only models that this Ed25519 key signed; may be repeated.",
)
@click.option("--strict", is_flag=True, help="Stop at the first malformed row.")
@click.pass_context
def run(context: click.Context, /, config: str | None, stream: bool, **options: Any) -> None:
    """Classify a sensor stream with MODEL: an artifact of edge-ssm-build, or a .onnx or .tflite file of its export."""
    from edge_ssm import log
    from edge_ssm.service import run as service_run
    from edge_ssm.service import settings as service_settings

    given = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in options.items()
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    settings = service_settings.settings(config, given)
    if config is not None:
        address.check_not_an_input(settings.output, [config])
    if settings.input == "-" and sys.stdin is None:
        raise UsageError("standard input is closed; give --input")
    if settings.output == "-" and sys.stdout is None:
        raise UsageError("standard output is closed; give --output")
    if settings.input == "-" and sys.stdin.isatty():
        click.echo("edge-ssm: reading samples from the terminal, Ctrl-D ends", err=True)
    log.configure()
    outcome = service_run.run(settings)
    account, network = outcome.account, outcome.network
    with suppress(OSError):  # decisions are what matters, and they are out
        click.echo(summary(account, network, outcome.engine, outcome.chunk), err=True)
    if outcome.failure:
        raise RunFailed(outcome.failure)
    if account.malformed and not account.samples:
        raise EdgeSSMError(
            f"{outcome.source}: no valid sample among {account.malformed} rows; expected {outcome.format} with "
            f"{len(network.input.channels)} channels ({', '.join(network.input.channels)})"
        )


@cli.command("inspect")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def inspect_(model: str, as_json: bool) -> None:
    """Show what MODEL holds: layers, channels, cost of a step, provenance."""
    from edge_ssm.formats import description as formats_description
    from edge_ssm.formats import signatures

    found = model_files.load(model)
    description = formats_description.describe_model(found, signatures.find_signature(model))
    click.echo(json.dumps(description, indent=1) if as_json else formats_description.render(description))


@cli.command("verify-signature")
@click.argument("model")
@click.option(
    "--key", "keys", multiple=True, required=True, metavar="PUBLIC.pem", help="One that is trusted; any number."
)
def verify_signature(model: str, keys: tuple[str, ...]) -> None:
    """Check that MODEL.sig is the signature of MODEL by one of the keys. Exit status 2 if it is not."""
    from edge_ssm.formats import signatures

    loaded, key = signatures.load_with_key(model, [Path(key) for key in keys])
    click.echo(f"{sanitize(model)}: signed by key {key}, artifact digest {loaded.digest}")


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
    type=NotEmpty(),
    metavar="chunk,lanes,family",
    help="Chunks of 1 to 64, lanes of 1 to 16; family: several MODELs, as of one pruning run.",
)
@click.option(
    "--input", "recording", type=NotEmpty(), metavar="FILE", help="A recording to step over.  [default: noise]"
)
@click.option("--paced/--no-paced", default=True, help="Also at the model's sample rate.  [default: paced]")
@click.option("--meter", default="auto", show_default=True, help="auto, hwmon, jtop, rapl, battery or none.")
@click.option("--quick", is_flag=True, help="Fewer, shorter rounds: to look, not to publish.")
@click.option("--rounds", type=click.IntRange(2, 1000), metavar="N", help="[default: 5; quick: 3]")
@click.option("--block-seconds", type=Finite(0.2, 3600), metavar="S", help="Of each block.  [default: 10; quick: 1]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order of blocks.")
@click.option("--profile", "profile_", default="auto", show_default=True, metavar="NAME|auto|none")
@click.option("--json", "json_", type=NotEmpty(), metavar="FILE", help="The report for programs.")
@click.option("--html", "html_", type=NotEmpty(), metavar="FILE", help="The report as a page with plots.")
@click.option(
    "--compare", nargs=2, type=NotEmpty(), metavar="A.json B.json", help="Compare two reports; measures nothing."
)
@click.option(
    "--step-table",
    type=NotEmpty(),
    metavar="FILE",
    help="Gets the steps of many networks, for edge-ssm-build prune; no MODEL.",
)
def profile(models: tuple[str, ...], engines: str, step_table: str | None, **options: Any) -> None:
    """Measure latency, power and energy of MODEL on this machine."""
    context = click.get_current_context()
    named = given(context)
    if compared := options["compare"]:
        from edge_ssm.profiler import compare, report

        _alone(context, "--compare", "takes two reports and nothing else", named - {"compare"})
        click.echo(compare.compare(report.load(Path(compared[0])), report.load(Path(compared[1]))))
        return
    with signals.termination_raises():
        if step_table is not None:
            _step_table(step_table, engines, context, named)
            return
        _profile(models, engines, options, named)


def _alone(context: click.Context, option: str, why: str, others: set[str]) -> None:
    """Raises UsageError where ``others`` were given: what is asked for and not done must not look done."""
    if others:
        names = {p.name: p.opts[0] for p in context.command.params if isinstance(p, click.Option)}
        raise UsageError(f"{option}: {why}; leave out {', '.join(sorted(names.get(o, 'MODEL') for o in others))}")


def _step_table(place: str, engines: str, context: click.Context, named: set[str]) -> None:
    from edge_ssm.profiler import report
    from edge_ssm.profiler import step_table as profiler_step_table

    why = "measures networks of its own, one engine's"
    _alone(context, "--step-table", why, named - {"step_table", "engines"})
    if engines == "all" or "," in engines:
        raise UsageError(f"--step-table: takes one engine, not {engines!r}")
    report.check_places({"--step-table": Path(place)}, {})
    table = profiler_step_table.tabulate(engines)
    profiler_step_table.save_table(Path(place), table)
    click.echo(f"{sanitize(place)}: {len(table.rows)} networks measured on {table.machine}, engine {table.engine}")


def _profile(models: tuple[str, ...], engines: str, options: dict[str, Any], named: set[str]) -> None:
    from edge_ssm.io import recording
    from edge_ssm.profiler import protocol, report, report_html
    from edge_ssm.profiler import run as profiler_run

    if not models:
        raise UsageError("MODEL: missing; give an artifact, or --compare, or --step-table")
    quick, path = options["quick"], options["recording"]
    sweep = _sweep(options, models, named)
    places = {option: Path(options[key]) for option, key in (("--json", "json_"), ("--html", "html_")) if options[key]}
    inputs = {f"MODEL {model}": Path(model) for model in models} | ({} if path is None else {"--input": Path(path)})
    report.check_places(places, inputs)
    request = profiler_run.ProfileSettings(
        models=models,
        engines=_engines(engines),
        chunks=profiler_run.CHUNKS if "chunk" in sweep else _counts("--chunk", options["chunks"]),
        lanes=profiler_run.LANES if "lanes" in sweep else _counts("--lanes", options["lanes"]),
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
    measured = profiler_run.measure(request)
    failures = []
    for option, place in places.items():  # Before anything is shown: a reader that leaves must not cost the report.
        try:
            report.write(
                place, report.as_json(measured) if option == "--json" else report_html.render(measured).encode()
            )
        except RunFailed as error:
            failures.append(str(error))
    click.echo(report.render(measured))
    if not measured.valid:
        failures.append("the machine changed while it was measured: " + "; ".join(measured.invalid_because))
    if failures:
        raise RunFailed("; ".join(failures))


def _sweep(options: dict[str, Any], models: tuple[str, ...], named: set[str]) -> list[str]:
    """What to go through. Raises UsageError for what is unknown, or is set beside it."""
    sweep = [] if options["sweep"] is None else options["sweep"].split(",")
    if unknown := [part for part in sweep if part not in ("chunk", "lanes", "family")]:
        raise UsageError(f"--sweep {unknown[0]!r}: expected chunk, lanes, family")
    if "family" in sweep and len(models) < 2:
        raise UsageError("--sweep family: give several MODELs")
    for part, name in (("chunk", "chunks"), ("lanes", "lanes")):
        if part in sweep and name in named:
            raise UsageError(f"--sweep {part}: goes through several; leave out --{part}")
    if sweep and "paced" in named and options["paced"]:
        raise UsageError("--sweep: runs back to back; leave out --paced")
    return sweep


def _engines(text: str) -> list[str]:
    names = text.split(",")
    if len(names) > 1 and "all" in names:
        raise UsageError(f"--engine {text!r}: all stands by itself")
    _once("--engine", text, names)
    return names


def _once(option: str, text: str, values: Sequence[object]) -> None:
    if twice := [value for i, value in enumerate(values) if value in values[:i]]:
        raise UsageError(f"{option} {text!r}: {twice[0]} is there twice")


def _counts(option: str, text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1 or max(found) > 4096:
        raise UsageError(f"{option} {text!r}: expected numbers from 1 to 4096, separated by commas")
    _once(option, text, found)
    return found


def _firmware_profile(name: str) -> boards.NamedProfile | None:
    """The one asked for; what it says of the process is done here. A mismatch is a warning."""
    from edge_ssm import log
    from edge_ssm.service import run as service_run

    log.configure()
    named = service_run.firmware_profile(name)
    service_run.keep_to(None, named)
    return named


@cli.command("top")
@click.option("--once", is_flag=True, help="Print once and end; so too where stdout is no terminal.")
@click.option("--json", "as_json", is_flag=True, help="For programs; once.")
@click.option("--interval", type=Finite(0.2, 60), default=1.0, show_default=True, metavar="S")
def top_(once: bool, as_json: bool, interval: float) -> None:
    """Watch the runs on this machine: decisions, latency, power, temperature, events. Ctrl-C ends."""
    from edge_ssm.hardware.meters.registry import open_file_meter
    from edge_ssm.telemetry import top

    if as_json:
        click.echo(msgspec.json.encode(status_files.running()).decode())
        return
    meter = open_file_meter()
    watching = not once and sys.stdout is not None and sys.stdout.isatty()
    try:
        while True:
            time.sleep(0 if meter is None else meter.period_s)  # some meters tell what was since they were opened
            text = top.page(status_files.running(), meter)
            if watching:
                click.clear()
            click.echo(text)
            if not watching:
                return
            time.sleep(interval)
    except KeyboardInterrupt:
        if not watching:  # It was cut short; a watch ends like this.
            raise


@cli.group("profiles")
def profiles_() -> None:
    """Boards and power modes that edge-ssm knows."""


@profiles_.command("list")
def profiles_list() -> None:
    """One line each; * marks this machine's."""
    here = boards.detect()
    for named in boards.load_all():
        p = named.profile
        mark = "*" if here is not None and here.name == named.name else " "
        click.echo(f"{mark} {named.name:32} {p.board:24} {p.power_mode or '-':12}{' default' if p.default else ''}")


@profiles_.command("show")
@click.argument("name")
def profiles_show(name: str) -> None:
    """All figures of a profile, with their sources."""
    click.echo(boards.describe(boards.load(name)))


@profiles_.command("detect")
def profiles_detect() -> None:
    """This machine's profile, by its module and the name of its power mode."""
    named, warning = boards.select("auto")
    if named is None:
        raise EdgeSSMError(warning or "no profile fits this machine; edge-ssm profiles list shows what there is")
    click.echo(named.name)


@cli.command("compile")
@click.option(
    "--target",
    default="host",
    show_default=True,
    help=f"host; another device's processor: {', '.join(kernel_file.TARGETS)}; a GPU: {', '.join(cuda_cache.TARGETS)}.",
)
@click.option(
    "--output",
    type=NotEmpty(),
    metavar="PATH",
    help="A file; for a GPU a folder.  [default: this machine's folder of compiled kernels]",
)
@click.option("--assembly", type=NotEmpty(), metavar="FILE", help="Write the assembly there, to be read.")
@click.option("--if-missing", is_flag=True, help="Only if no kernel that is kept runs here.")
def compile_(target: str, output: str | None, assembly: str | None, if_missing: bool) -> None:
    """Compile an engine's kernels ahead of their first use, here or for a device that shall need no compiler."""
    from edge_ssm.engines.cpu import cache as kernel_cache
    from edge_ssm.profiler import report

    if target not in (known := ("host", *kernel_file.TARGETS, *cuda_cache.TARGETS)):
        raise UsageError(f"--target {target!r}: unknown, expected {', '.join(known)}")
    if if_missing:
        if target != "host" or output is not None or assembly is not None:
            raise UsageError("--if-missing: only for this machine's own kernel, without another option")
        if (there := kernel_cache.best()) is not None:
            click.echo(f"{kernel_cache.folder()}: has a kernel for {there.header.target}")
            return
    if target.startswith("sm_"):
        if assembly is not None:
            raise UsageError("--assembly: not for a GPU; its kernels are PTX, which is text")
        with signals.termination_raises():
            folder, made = cuda_cache.compile_and_keep(target, None if output is None else Path(output))
        sizes = ", ".join(f"{name} of {len(made[name].ptx)} bytes of PTX" for name in sorted(made))
        click.echo(f"{folder}: CUDA kernels for {target}: {sizes}")
        click.echo(f"copy them to the device, into {kernel_cache.USER_FOLDER} there (or $EDGE_SSM_CACHE)")
        return
    places = {name: Path(text) for name, text in (("--output", output), ("--assembly", assembly)) if text is not None}
    report.check_places(places, {})
    for option, written, what in (
        ("--output", kernel_file.MAGIC, "kernel"),
        ("--assembly", kernel_cache.LISTING, "assembly"),
    ):
        if option in places:
            kernel_cache.check_replaced(option, places[option], written, what)
    with signals.termination_raises():
        kept, kernel = kernel_cache.compile_and_keep(target, places.get("--output"), places.get("--assembly"))
    click.echo(f"{kept}: kernel for {kernel.header.target}, {len(kernel.code)} bytes of code")
    if kernel.header.target == target:
        click.echo(f"copy it to the device, into {kernel_cache.USER_FOLDER} there (or $EDGE_SSM_CACHE)")


@cli.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor_(as_json: bool) -> None:
    """Show what this machine has, what is missing, and the command that adds it."""
    from edge_ssm.cli import doctor

    findings = doctor.examine()
    click.echo(json.dumps(doctor.as_json(findings), indent=1) if as_json else doctor.render(findings))


@cli.group("service")
def service_() -> None:
    """Streams as services of systemd: check a configuration, install it, see how it does."""


@service_.command("check")
@click.argument("file", type=NotEmpty())
def service_check(file: str) -> None:
    """Read the configuration FILE and everything it names, and print what will run. Opens no device, no port."""
    from edge_ssm.service import plan as service_plan

    plan = service_plan.check(file)
    for warning in plan.warnings:
        click.echo(f"edge-ssm: warning: {sanitize(warning)}", err=True)
    click.echo(plan.render())


@service_.command("install")
@click.argument("name")
@click.option(
    "--config",
    required=True,
    type=NotEmpty(),
    metavar="FILE",
    help="Its configuration; copied, with what lies beside it.",
)
@click.option("--loopback", is_flag=True, help="Let it use addresses of this machine.")
@click.option("--network", is_flag=True, help="Let it use any address.")
@click.option("--serial", is_flag=True, help="Let it use serial lines.")
@click.option("--iio", is_flag=True, help="Let it use IIO buffers.")
@click.option("--gpu", is_flag=True, help="Let it use a Jetson's GPU.")
@click.option("--socket", is_flag=True, help="systemd opens the socket that the source listens on.")
@click.option(
    "--root",
    type=NotEmpty(),
    default="/",
    show_default=True,
    metavar="DIR",
    help="Of the system that it is installed in.",
)
@click.option("--no-start", is_flag=True, help="Only with the next boot.")
@click.option("--force", is_flag=True, help="Replace a configuration, model or key that is there and differs.")
def service_install(
    name: str, config: str, socket: bool, root: str, no_start: bool, force: bool, **flags: bool
) -> None:
    """Install and start edge-ssm@NAME.service, started at every boot from now on."""
    from edge_ssm.service.systemd import install

    openings = tuple(opening for opening in install.OPENINGS if flags[opening])
    request = install.Request(name, config, openings, socket, Path(root).absolute(), not no_start, force)
    install.install(request, _say)


def _say(line: str) -> None:
    click.echo(sanitize(line))


@service_.command("uninstall")
@click.argument("name")
@click.option("--purge", is_flag=True, help="Its configuration, snapshots and cache too.")
@click.option("--root", type=NotEmpty(), default="/", show_default=True, metavar="DIR")
def service_uninstall(name: str, purge: bool, root: str) -> None:
    """Stop edge-ssm@NAME.service and take it away."""
    from edge_ssm.service.systemd import install

    install.uninstall(name, purge, Path(root).absolute(), _say)


@service_.command("status")
@click.argument("name", required=False)
def service_status(name: str | None) -> None:
    """What systemd and the run itself say of NAME, or of all."""
    from edge_ssm.service.systemd import units

    click.echo(units.describe(name))


def run_command(command: click.Command, prog_name: str) -> int:
    """Run a click command; errors become one line on stderr. Returns the exit status (edge_ssm.errors)."""
    try:
        status = _invoke(command, prog_name)
        if sys.stdout is not None:
            sys.stdout.flush()  # Here, where it can be told, and not at the interpreter's end.
        return status if isinstance(status, int) else 0
    except EdgeSSMError as error:
        message, status = str(error), error.exit_status
    except BrokenPipeError:  # the reader of stdout or stderr has gone away, as `| head` does
        _give_up_output()
        return 0
    except OSError as error:  # of standard output: whatever opens a file says so itself, and names it
        _give_up_output()
        lost = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)
        named = error.filename or ("output: can't be written" if lost else "the system refused a call")
        message, status = f"{named} ({error.strerror})", 1
    except KeyboardInterrupt:
        message, status = "interrupted", signals.INTERRUPTED
    except signals.Terminated:
        return signals.TERMINATED
    except click.Abort:
        message, status = "interrupted", signals.INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as error:
        with suppress(OSError):
            click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        hint = f"; see {prog_name} --help" if isinstance(error, click.UsageError) else ""
        message, status = error.format_message() + hint, 2
    with suppress(OSError):  # a full disk may be stderr's too: the status still tells
        click.echo(f"{prog_name}: error: {sanitize(' '.join(message.split()), 4000)}", err=True)
    return status


def _invoke(command: click.Command, prog_name: str) -> Any:
    """What ``command.main`` does, which would print an empty line for a Ctrl-C."""
    if f"_{prog_name}_COMPLETE".replace("-", "_").upper() in os.environ:  # a shell asks for completions
        return command.main(prog_name=prog_name, standalone_mode=False)
    try:
        with command.make_context(prog_name, sys.argv[1:]) as context:
            return command.invoke(context)
    except click.exceptions.Exit as ended:  # of --help and --version
        return ended.exit_code


def _give_up_output() -> None:
    for file in (sys.stdout, sys.stderr):
        try:
            if file is not None:
                file.flush()
        except OSError:
            formats.discard(file)


def main() -> None:
    status = run_command(cli, "edge-ssm")
    if verification.left_running():
        _give_up_output()
        os._exit(status)  # The interpreter's end under a graph that still runs would abort the process.
    sys.exit(status)
