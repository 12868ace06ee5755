"""The command ``edge-ssm-build``: it parses, calls one function, prints. torch is imported where a command needs it."""

from __future__ import annotations

# isort: split
import json
import math
import os
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click

import edge_ssm
from edge_ssm import files
from edge_ssm.cli.app import run_command
from edge_ssm.cli.models import verify_signature
from edge_ssm.cli.options import Finite
from edge_ssm.errors import RunFailed, UsageError
from edge_ssm.formats import artifact, loading, signatures
from edge_ssm_build.training import checkpoint as checkpoints
from edge_ssm_build.training import scoring

ZIP = b"PK\x03\x04"
"""What torch's files begin with."""
OUT_OF_PACKAGE = "watch, digits, forda, ecg5000, or a .npz file of your own (docs/build.md)"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(edge_ssm.__version__, prog_name="edge-ssm-build")
def cli() -> None:
    """Train, prune and export S4 and S4D models for edge-ssm."""


def _need_torch() -> None:
    try:
        import torch
        import tqdm  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{error.name} is missing; pip install 'edge-ssm[host]' on the workstation") from None
    from edge_ssm_build.pruning.executors import prepare_process

    prepare_process(max(1, min(4, torch.get_num_threads())))


def _numbers(text: str, kind: type[int] | type[float], option: str) -> list[Any]:
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or any(isinstance(v, float) and not math.isfinite(v) for v in found):
        raise UsageError(f"{option} {text!r}: expected numbers separated by commas")
    return found


def _kind_of(model: str) -> str:
    """What a model is, by its content, whatever its name; by the name where that tells nothing."""
    try:
        with open(model, "rb") as file:
            start = file.read(9)
    except OSError:
        start = b""  # said by whoever reads it
    if start.startswith(ZIP):
        return "checkpoint"
    if loading.detect_kind(Path(model)) is not None:
        return "exported"
    return "artifact" if start[8:] == b"{" or model.endswith(".safetensors") else "checkpoint"


def _check_output(output: str, ending: str, inputs: dict[str, str | None]) -> None:
    """Before work is done for it, and before it can cost one of ``inputs``. Raises UsageError, InputRefused."""
    from edge_ssm.profiler import report

    if Path(output).suffix != ending:
        raise UsageError(f"--output {output}: expected a name that ends in {ending}")
    read = {name: Path(path) for name, path in inputs.items() if path is not None}
    report.check_places({"--output": Path(output)}, read)


def _folder(path: str) -> Path:
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: can't be made ({error.strerror})") from None
    return folder


@cli.command()
@click.argument("name")
def data(name: str) -> None:
    """Fetch data set NAME into the cache and show its splits."""
    from edge_ssm_build.data import datasets

    found = datasets.load(name)
    click.echo(
        f"{found.name}: {len(found.channels)} channels ({', '.join(found.channels)}), classes {', '.join(found.labels)}"
    )
    for split, recordings in found.splits.items():
        lengths = [len(r) for r in recordings.x]
        click.echo(f"  {split:<10} {len(lengths):>5} recordings of {min(lengths)} to {max(lengths)} samples")
    click.echo(f"  {found.source}")


@cli.command()
@click.option("--data", "name", required=True, metavar="NAME", help=f"Data set: {OUT_OF_PACKAGE}.")
@click.option(
    "--output",
    required=True,
    metavar="DIR",
    help="Gets checkpoint.pt and scores.json; the same command goes on after a kill.",
)
@click.option("--window", type=click.IntRange(min=1), required=True, help="Samples that one decision pools over.")
@click.option("--epochs", type=click.IntRange(min=1), default=40, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)
@click.option("--d-model", type=click.IntRange(min=1), default=64, show_default=True, help="H, channels.")
@click.option(
    "--d-state", type=click.IntRange(min=2), default=32, show_default=True, help="N, states a channel (even)."
)
@click.option("--n-layers", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--dropout", type=Finite(0, 0.9), default=0.1, show_default=True)
@click.option("--prenorm/--postnorm", default=False, show_default=True)
@click.option("--norm", type=click.Choice(["layer", "batch"]), default="layer", show_default=True)
@click.option("--mixing", type=click.Choice(["glu", "plain"]), default="glu", show_default=True)
@click.option("--pooling", type=click.Choice(["mean", "last"]), default="mean", show_default=True)
@click.option("--discretization", type=click.Choice(["zoh", "bilinear"]), help="[default: zoh; bilinear for s4]")
@click.option("--init", type=click.Choice(["lin", "inv", "legs"]), help="[default: lin; legs for s4]")
@click.option(
    "--kernel",
    type=click.Choice(["s4d", "s4"]),
    default="s4d",
    show_default=True,
    help="Diagonal, or diagonal plus rank one (DPLR).",
)
@click.option("--batch", type=click.IntRange(min=2), default=32, show_default=True)
@click.option("--lr", type=Finite(min=0, min_open=True), default=4e-3, show_default=True)
@click.option(
    "--ssm-lr",
    type=Finite(min=0),
    default=1e-3,
    show_default=True,
    help="Learning rate of A, C and dt; they have no weight decay.",
)
@click.option("--weight-decay", type=Finite(min=0), default=0.01, show_default=True)
@click.option(
    "--noise",
    type=Finite(min=0),
    default=0.0,
    show_default=True,
    help="Noise on normalised training windows.",
)
@click.option(
    "--scaling",
    type=Finite(min=0),
    default=0.0,
    show_default=True,
    help="Spread of a random gain a window and channel.",
)
@click.option(
    "--rotation",
    type=Finite(0, 180),
    default=0.0,
    show_default=True,
    help="Spread in degrees of random rotations of training windows; channels are vectors of three.",
)
def train(name: str, output: str, **options: Any) -> None:
    """Train an S4 or S4D network in convolution mode; the best validation epoch is kept."""
    _need_torch()
    from edge_ssm_build.data import datasets
    from edge_ssm_build.training import loop
    from edge_ssm_build.training.network import Config

    dataset = datasets.load(name)
    folder = _folder(output)
    config_names, recipe_names = ({f.name for f in fields(kind)} for kind in (Config, checkpoints.Recipe))
    options["prenorm"] = bool(options["prenorm"])
    rank_one = options["kernel"] == "s4"
    options["init"] = options["init"] or ("legs" if rank_one else "lin")
    options["discretization"] = options["discretization"] or ("bilinear" if rank_one else "zoh")
    options["l_kernel"] = options["window"] if rank_one else 0
    config = Config(
        d_input=len(dataset.channels),
        d_output=len(dataset.labels),
        **{key: value for key, value in options.items() if key in config_names},
    )
    recipe = checkpoints.Recipe(**{key: value for key, value in options.items() if key in recipe_names})
    checkpoint = checkpoints.new_checkpoint(dataset, name, config, recipe)
    checkpoints.check_place(folder / "checkpoint.pt", checkpoint)
    reached = loop.fit(checkpoint, dataset, recipe, folder / "resume.pt", progress="training")
    checkpoint.history.append(
        {"stage": "train", "seed": recipe.seed, "epochs": recipe.epochs, "validation": asdict(reached)}
    )
    checkpoints.save_checkpoint(folder / "checkpoint.pt", checkpoint)
    scores = json.dumps({"validation": asdict(reached)}, indent=1) + "\n"
    files.write(folder / "scores.json", scores.encode())
    (folder / "resume.pt").unlink(missing_ok=True)
    click.echo(
        f"{folder / 'checkpoint.pt'}: validation accuracy {reached.accuracy:.4f}, "
        f"balanced {reached.balanced_accuracy:.4f}"
    )


@cli.command()
@click.argument("model")
@click.option("--data", "name", metavar="NAME", help="[default: the one it was trained on]")
@click.option("--split", type=click.Choice(["train", "validation", "test"]), default="test", show_default=True)
@click.option("--engine", metavar="NAME", help="Stream through this engine and compare with torch in float64.")
def evaluate(model: str, name: str | None, split: Any, engine: str | None) -> None:
    """Score MODEL, a checkpoint (.pt) or an artifact (.safetensors), on a split's tumbling windows."""
    _need_torch()
    import torch

    from edge_ssm_build.data import datasets
    from edge_ssm_build.export import artifact as export_artifact
    from edge_ssm_build.export import convert

    if _kind_of(model) == "artifact":
        loaded = artifact.load(model)
        network, known = loaded.network, loaded.provenance.get("data", {}).get("name")
        network_model, window = convert.to_model(network, torch.float64), network.window
    else:
        checkpoint = checkpoints.load_checkpoint(Path(model))
        known, network_model, window = checkpoint.data, checkpoint.model, checkpoint.recipe.window
        network = convert.to_network(network_model, checkpoint.spec, window, checkpoint.labels)
    chosen = name or known
    if chosen is None or (name is None and chosen not in datasets.BUILTIN and not Path(chosen).exists()):
        raise UsageError(f"{model}: trained on {chosen or 'an unknown data set'}, which is not at hand; give --data")
    dataset = datasets.load(chosen)
    if dataset.channels != network.input.channels or len(dataset.labels) != network.d_output:
        raise UsageError(
            f"{model}: made for channels {', '.join(network.input.channels)}; "
            f"{chosen} has {', '.join(dataset.channels)}"
        )
    x, y = scoring.split_windows(dataset, split, window)
    expected = export_artifact.convolve_windows(network_model, network.input, x)
    reached = scoring.score_logits(torch.from_numpy(expected), torch.from_numpy(y))
    click.echo(
        f"{split}: {reached.windows} windows, accuracy {reached.accuracy:.4f}, balanced {reached.balanced_accuracy:.4f}"
    )
    if engine:
        streamed = export_artifact.stream_windows(network, engine, x)
        agreement = export_artifact.agreement_of(expected, streamed, network.tolerance)
        click.echo(f"engine {engine} against torch in float64: {agreement.line()}")


SHARE = "rate, 0.5*rate, a number, or one a rate"


@cli.command()
@click.argument("checkpoint")
@click.option("--output", required=True, metavar="DIR", help="Gets the family; the same command goes on after a kill.")
@click.option(
    "--method",
    default="best",
    show_default=True,
    help="s4op, best, compact, or a score: magnitude, taylor, energy, h2, sensitivity. Sets what follows.",
)
@click.option(
    "--rates",
    metavar="R,R,...",
    help="Shares of all operators removed, ascending.  [default: 0.1,0.3,0.5,0.7,0.9; every 0.1 with a target]",
)
@click.option("--seeds", metavar="S,S,...", help="One candidate a seed and rate.  [default: 0,1,2 for s4op, else 0]")
@click.option("--budget", type=click.Choice(["depth", "uniform", "global"]), help="How layers share a rate.")
@click.option("--bypass", type=click.Choice(["identity", "gain", "zero"]), help="What a removed operator becomes.")
@click.option("--columns", metavar="SHARE", help=f"Mixing columns removed: {SHARE}.")
@click.option("--rows", metavar="SHARE", help=f"Mixing rows removed: {SHARE}.")
@click.option("--states", metavar="SHARE", help=f"States removed in the channels that are left: {SHARE}.")
@click.option("--states-method", type=click.Choice(["modal", "last", "aire", "h2"]), default="h2", show_default=True)
@click.option(
    "--mixing-dtype",
    type=click.Choice(["float32", "float16", "int8"]),
    default="float32",
    show_default=True,
    help="How mixing weights are stored and run.",
)
@click.option("--refit/--no-refit", default=None, help="Refit the mixing before fine-tuning.")
@click.option("--distill", type=Finite(0, 1), help="Weight of the unpruned network's logits in the loss.")
@click.option("--target-latency", type=Finite(min=0, min_open=True), metavar="US", help="Of a step.")
@click.option("--max-accuracy-loss", type=Finite(min=0), metavar="POINTS", help="Of balanced validation accuracy.")
@click.option("--target-size", type=click.IntRange(min=1), metavar="BYTES", help="Of the artifact file.")
@click.option("--engine", default="cpu", show_default=True, help="Whose step is measured here.")
@click.option("--step-table", metavar="FILE", help="The device's step latencies, written there by edge-ssm profile.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: one a core]")
@click.option("--scheduler", metavar="ADDRESS", help="Run candidates on a Dask cluster, tcp://HOST:PORT.")
def prune(checkpoint: str, output: str, method: str, **options: Any) -> None:
    """Prune whole SSM operators of CHECKPOINT step by step, with fine-tuning: a nested family of artifacts.

    With a target the search stops at the best member within it, and writes that as chosen.safetensors too. Exit status
    1 if a member's stream is not what the network says, or no member meets the target; all others are written.
    """
    _need_torch()
    from dataclasses import replace

    from edge_ssm.profiler import step_table
    from edge_ssm_build.data import datasets
    from edge_ssm_build.pruning import executors, plan, search

    if method not in plan.METHODS:
        raise UsageError(f"method {method!r}: unknown, expected {', '.join(plan.METHODS)}")
    start = checkpoints.load_checkpoint(Path(checkpoint))
    target = search.Target(options["target_latency"], options["max_accuracy_loss"], options["target_size"])
    every = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9" if target.given() else "0.1,0.3,0.5,0.7,0.9"
    rates = _numbers(options["rates"] or every, float, "--rates")
    named = ("budget", "bypass", "columns", "rows", "states", "refit", "distill")
    set_here = {name: options[name] for name in named if options[name] is not None}
    if options["seeds"]:
        set_here["seeds"] = tuple(_numbers(options["seeds"], int, "--seeds"))
    todo = plan.plan_of(replace(plan.METHODS[method], **set_here), rates, start)
    todo = replace(todo, states_method=options["states_method"], mixing_dtype=options["mixing_dtype"])
    todo = plan.check_plan(start, todo)
    table = step_table.load_table(Path(options["step_table"])) if options["step_table"] else None
    data, folder = datasets.load(start.data), _folder(output)
    read = {f"CHECKPOINT {checkpoint}": Path(checkpoint)}
    if options["step_table"]:
        read["--step-table"] = Path(options["step_table"])
    search.check_places(folder, todo, read)
    # One thread a candidate, here as in workers: sums come out the same wherever it runs.
    executors.prepare_process()
    workers = options["workers"] or len(os.sched_getaffinity(0))
    address = options["scheduler"]
    where = executors.cluster(address) if address else executors.local(min(workers, len(todo.seeds)))
    with where as fresh:
        search.search(
            start,
            data,
            todo,
            folder,
            fresh,
            method=method,
            target=target,
            table=table,
            engine=options["engine"],
            remote=address is not None,
            say=click.echo,
        )


@cli.command()
@click.argument("runs", nargs=-1, required=True)
@click.option("--output", metavar="DIR", help="[default: a folder report in the first run]")
def report(runs: tuple[str, ...], output: str | None) -> None:
    """Show the trade-off of one or more families (folders that prune wrote): HTML, PNG, CSV, JSON."""
    from edge_ssm_build.pruning import report as pruning_report

    folder = _folder(output or str(Path(runs[0]) / "report"))
    for path in pruning_report.write([Path(run) for run in runs], folder):
        click.echo(str(path))


def _rounded(checkpoint: Any, data: Any, weights: Any, bound: float | None) -> Any:
    """The checkpoint with its mixing weights as --weights and --error-bound say, after saying what each type costs."""
    from edge_ssm.model.network import MIXING_DTYPES
    from edge_ssm_build.export import artifact as export_artifact

    dtypes = MIXING_DTYPES if weights == "auto" else tuple(dict.fromkeys(["float32", weights]))
    rounded = export_artifact.round_all(checkpoint, data, dtypes)
    for dtype, found in rounded.items():
        click.echo(found.line(dtype))
    chosen = export_artifact.fastest_within(rounded, bound or 0.01) if weights == "auto" else weights
    if bound is not None and not rounded[chosen].max_error <= bound:
        raise RunFailed(
            f"export: {chosen} mixing weights change a logit by up to {rounded[chosen].max_error:.1e}, more than "
            f"--error-bound {bound:g}; nothing was written: allow more, or take --weights auto"
        )
    if weights == "auto":
        click.echo(f"chosen: {chosen}")
    return rounded[chosen].checkpoint


@cli.command()
@click.argument("model", metavar="CHECKPOINT|ARTIFACT")
@click.option("--output", required=True, metavar="FILE", help="*.safetensors, *.onnx or *.tflite.")
@click.option(
    "--to",
    type=click.Choice(["artifact", "onnx", "tflite"]),
    default="artifact",
    show_default=True,
    help="Of ARTIFACT only onnx and tflite.",
)
@click.option(
    "--weights",
    type=click.Choice(["float32", "float16", "int8", "auto"]),
    help="How mixing weights are stored; auto: the fastest here within --error-bound.  [default: as they are]",
)
@click.option(
    "--error-bound",
    type=Finite(min=0, min_open=True),
    metavar="E",
    help="Largest change of a logit that smaller weights may bring.  [default: 0.01 for auto, else none]",
)
@click.option(
    "--chunk",
    metavar="T|any",
    help="The graph takes chunks too: of T samples (tflite), or of any number (onnx).  [default: single samples]",
)
@click.option(
    "--input",
    "recording",
    metavar="FILE",
    help="A recording that the graph of an ARTIFACT is tried on.  [default: noise]",
)
def export(model: str, output: str, to: Any, weights: Any, error_bound: float | None, **options: Any) -> None:
    """Write CHECKPOINT as an artifact, after its stream was compared with torch, in float64, on the whole test split.

    With --to onnx or tflite write CHECKPOINT or ARTIFACT for ONNX Runtime or LiteRT (docs/exported.md).
    """
    if not Path(model).is_file():
        raise UsageError(f"{model}: {'not a regular file' if Path(model).exists() else 'no such file'}")
    kind = _kind_of(model)
    if kind == "exported":
        raise UsageError(f"{model}: is an exported file already; give the artifact or checkpoint it came from")
    from_artifact = kind == "artifact"
    chunk, recording = options["chunk"], options["recording"]
    if error_bound is not None and weights is None:
        raise UsageError("--error-bound: goes with --weights")
    if to == "artifact":
        if from_artifact:
            raise UsageError(f"{model}: is an artifact already; give --to onnx or tflite, or a checkpoint")
        if chunk or recording:
            raise UsageError(f"--{'chunk' if chunk else 'input'}: goes with --to onnx or tflite")
        _check_output(output, ".safetensors", {f"CHECKPOINT {model}": model})
        _export_checkpoint(model, Path(output), weights, error_bound)
        return
    from edge_ssm_build.export import graphs

    size = _chunk_size(chunk, to)
    _check_output(output, f".{to}", {f"{kind.upper()} {model}": model, f"--input {recording}": recording})
    if from_artifact:
        if weights == "auto":
            raise UsageError("--weights auto: for a checkpoint only; give float32, float16 or int8")
        heard = graphs.samples_of(artifact.load(model).network, recording)
        made = graphs.make(Path(model), to, weights, size, heard, error_bound)
    else:
        if recording:
            raise UsageError("--input: a checkpoint's graph is tried on its own validation split; leave it out")
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "source.safetensors"
            _export_checkpoint(model, source, weights, error_bound)
            made = graphs.make(source, to, None, size, _validation(model))
    graphs.write(Path(output), made)
    click.echo(f"{to}: {made.line()}")
    click.echo(f"{output}: {len(made.content):,} bytes")


def _chunk_size(text: str | None, to: str) -> int:
    from edge_ssm.formats.exported import ANY_LENGTH

    if text is None:
        return 1
    if to == "onnx":
        if text != "any":
            raise UsageError(f"--chunk {text!r}: an onnx graph takes any number of samples; give any")
        return ANY_LENGTH
    if not text.isdecimal() or not 2 <= int(text) <= 256:
        raise UsageError(f"--chunk {text!r}: expected 2 to 256 samples, which a tflite graph takes one after the other")
    return int(text)


def _validation(checkpoint: str) -> Any:
    """Samples of the checkpoint's validation split that its graph is tried on, and their name."""
    from edge_ssm_build.data import datasets
    from edge_ssm_build.export import graphs

    loaded = checkpoints.load_checkpoint(Path(checkpoint))
    x, _ = scoring.split_windows(datasets.load(loaded.data), "validation", loaded.recipe.window)
    most = max(1, graphs.SAMPLES // loaded.recipe.window)
    return x[:most].reshape(-1, x.shape[-1]), "validation split"


def _export_checkpoint(checkpoint: str, output: Path, weights: Any, error_bound: float | None) -> None:
    _need_torch()
    from edge_ssm_build.data import datasets
    from edge_ssm_build.export import artifact as export_artifact

    loaded = checkpoints.load_checkpoint(Path(checkpoint))
    data = datasets.load(loaded.data)
    if weights is not None:
        loaded = _rounded(loaded, data, weights, error_bound)
    agreements, made_by = export_artifact.export(loaded, data, output)
    for engine, agreement in agreements.items():
        click.echo(f"{engine} against torch in float64: test split, {agreement.line()}")
    reached = made_by["scores"]["test"]
    click.echo(
        f"{output}: {output.stat().st_size:,} bytes, test accuracy {reached['accuracy']:.4f}, "
        f"balanced {reached['balanced_accuracy']:.4f}"
    )


FROM = "auto, state-spaces-s4d, state-spaces-s4block or s4op."


@cli.command("import")
@click.argument("checkpoint")
@click.option("--from", "form", default="auto", show_default=True, help=FROM)
@click.option("--arch", required=True, metavar="FILE", help="ARCH.toml: what the keys can't tell (docs/import.md).")
@click.option("--output", required=True, metavar="FILE", help="The artifact, *.safetensors.")
@click.option("--input", "recording", metavar="FILE", help="A recording to compare on, beside random input.")
def import_(checkpoint: str, form: str, arch: str, output: str, recording: str | None) -> None:
    """Turn a CHECKPOINT of state-spaces or S4oP into an artifact, if its stream says what its convolution says."""
    _need_torch()
    from edge_ssm_build.importers import checkpoints
    from edge_ssm_build.importers import convert as importers_convert

    inputs = {f"CHECKPOINT {checkpoint}": checkpoint, f"--arch {arch}": arch, f"--input {recording}": recording}
    _check_output(output, ".safetensors", inputs)
    read = checkpoints.read(Path(checkpoint), form, checkpoints.read_arch(Path(arch)))
    heard = None if recording is None else Path(recording)
    network, agreements = importers_convert.write(read, Path(checkpoint), Path(output), heard)
    for a in agreements:
        click.echo(f"{a.engine}: {a.steps} samples, largest error of a logit {a.error:.1e}")
    active = [len(block.ssm.active) for block in network.blocks]
    click.echo(f"{output}: {read.form}, {len(active)} layers, {network.d_model} channels, active {active}")


@cli.command()
@click.argument("model")
@click.argument("checkpoint", required=False)
@click.option("--from", "form", default="auto", show_default=True, help=FROM)
@click.option("--arch", metavar="FILE", help="ARCH.toml of CHECKPOINT.")
@click.option("--steps", type=click.IntRange(min=1), default=1000, show_default=True, help="Against the convolution.")
@click.option(
    "--drift", type=click.IntRange(min=0), default=1_000_000, show_default=True, help="Samples of one long stream."
)
def verify(model: str, checkpoint: str | None, form: str, arch: str | None, steps: int, drift: int) -> None:
    """Compare MODEL's stream with its convolution (or CHECKPOINT's own), each engine with float64, over a long stream.

    Exit status 1 if an output is off by more than 1e-4; with rounded weights, by a tenth of what that changed.
    """
    _need_torch()
    from tqdm import tqdm

    from edge_ssm.engines.registry import available
    from edge_ssm_build.importers import checkpoints, verification

    if (checkpoint is None) != (arch is None):
        raise UsageError("verify: a CHECKPOINT and its --arch go together")
    network = artifact.load(model).network
    found = [("its convolution", a) for a in verification.against_convolution(network, steps)]
    if checkpoint is not None and arch is not None:
        read = checkpoints.read(Path(checkpoint), form, checkpoints.read_arch(Path(arch)))
        samples = verification.samples_for(network, steps)
        found += [("the checkpoint", a) for a in verification.against_checkpoint(network, read, samples)]
    for engine in (name for name in available(network) if name != "reference" and drift):
        with tqdm(total=drift, desc=f"{engine}, long stream", unit=" samples", mininterval=1) as bar:
            found.append(("float64, one long stream", verification.drift(network, engine, drift, bar.update)))
    for against, a in found:
        mark = "ok" if a.error <= network.tolerance else "TOO LARGE"
        click.echo(f"{a.engine:<11} {a.steps:>8} samples against {against}: largest error {a.error:.1e}  {mark}")
    if any(not a.error <= network.tolerance for _, a in found):
        raise RunFailed(f"{model}: an output is off by more than {network.tolerance:.2g}")


@cli.command()
@click.option("--data", "name", required=True, metavar="NAME", help=f"Data set: {OUT_OF_PACKAGE}.")
@click.option("--output", required=True, metavar="FILE", help="The recording, *.csv.")
@click.option("--split", type=click.Choice(["train", "validation", "test"]), default="test", show_default=True)
@click.option(
    "--window",
    type=click.IntRange(min=1),
    required=True,
    help="Every recording is cut to whole windows of so many samples.",
)
@click.option(
    "--windows-each", type=click.IntRange(min=1), help="At most so many windows of every recording, from its middle."
)
@click.option("--decimals", type=click.IntRange(0, 12), help="Round values.  [default: as they are]")
def record(name: str, output: str, split: Any, window: int, windows_each: int | None, decimals: int | None) -> None:
    """Write a split as a CSV stream with a label column, for edge-ssm run."""
    from edge_ssm.profiler import report
    from edge_ssm_build.data import datasets, recording

    read = {} if name in datasets.BUILTIN else {f"--data {name}": Path(name)}
    report.check_places({"--output": Path(output)}, read)
    samples = recording.record(datasets.load(name), split, Path(output), window, windows_each, decimals)
    click.echo(f"{output}: {samples} samples, {Path(output).stat().st_size:,} bytes")


@cli.command()
@click.option("--output", required=True, metavar="DIR/NAME", help="Gets NAME.pem, private, and NAME.pub.pem, public.")
def keygen(output: str) -> None:
    """Make an Ed25519 key pair that signs models. The private key is not encrypted: keep it where nobody reads it."""
    signatures.require_cryptography()
    from edge_ssm_build.export import signing

    _folder(str(Path(output).parent))
    private, public, key = signing.keygen(Path(output))
    click.echo(f"{private}: signs models; keep it secret, off the devices")
    click.echo(f"{public}: goes on the devices; key {key}")


@cli.command()
@click.argument("model")
@click.option(
    "--key", "keys", multiple=True, required=True, metavar="PRIVATE.pem", help="Any number, one signature each."
)
def sign(model: str, keys: tuple[str, ...]) -> None:
    """Sign MODEL, an artifact: writes MODEL.sig beside it. docs/signing.md says what is in it."""
    signatures.require_cryptography()
    from edge_ssm_build.export import signing

    path, ids = signing.sign(Path(model), [Path(key) for key in keys])
    click.echo(f"{path}: signed by key {', '.join(ids)}")


cli.add_command(verify_signature)


def main() -> None:
    sys.exit(run_command(cli, "edge-ssm-build"))
