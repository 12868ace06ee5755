"""The command export: checkpoints to artifacts, and both to ONNX and TFLite."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_ssm.cli.options import Finite
from edge_ssm.errors import RunFailed, UsageError
from edge_ssm.formats import artifact
from edge_ssm_build.cli.options import check_output, kind_of, require_torch

if TYPE_CHECKING:
    from edge_ssm.model.network import Array
    from edge_ssm_build.data.datasets import Dataset
    from edge_ssm_build.export.graphs import ExportedGraph
    from edge_ssm_build.training.checkpoint import Checkpoint

DEFAULT_ERROR_BOUND = 0.01
"""Largest change of a logit with --weights auto."""
MAX_CHUNK = 256
"""Largest number of samples per call of a TFLite graph."""


@click.command()
@click.argument("model", metavar="CHECKPOINT|ARTIFACT")
@click.option(
    "--output", required=True, metavar="FILE", help="File to write: *.safetensors, *.onnx or *.tflite, as --to."
)
@click.option(
    "--to",
    type=click.Choice(["artifact", "onnx", "tflite"]),
    default="artifact",
    show_default=True,
    help="Output format. An ARTIFACT can be exported to onnx and tflite only.",
)
@click.option(
    "--weights",
    type=click.Choice(["float32", "float16", "int8", "auto"]),
    help="Type of the mixing weights; auto, of a CHECKPOINT only: the fastest on this machine within --error-bound.  "
    "[default: unchanged]",
)
@click.option(
    "--error-bound",
    type=Finite(min=0, min_open=True),
    metavar="E",
    help="Largest change of a logit that --weights may cause.  [default: 0.01 for auto, else none]",
)
@click.option(
    "--chunk",
    metavar="T|any",
    help="Let the graph also take chunks of samples: of T, 2 to 256 (tflite), or of any length (onnx).  "
    "[default: single samples]",
)
@click.option(
    "--input",
    "recording",
    metavar="FILE",
    help="Recording to compare the graph of an ARTIFACT on.  [default: random samples]",
)
def export(model: str, output: str, to: Any, weights: Any, error_bound: float | None, **options: Any) -> None:
    """Write CHECKPOINT as an artifact after comparing its stream with torch in float64 on the whole test split.

    With --to onnx or --to tflite, write CHECKPOINT or ARTIFACT for ONNX Runtime or LiteRT (docs/exported.md).
    """
    if not Path(model).is_file():
        raise UsageError(f"{model}: {'not a regular file' if Path(model).exists() else 'no such file'}")
    kind = kind_of(model)
    if kind == "exported":
        raise UsageError(f"{model}: is an exported file already; give the artifact or checkpoint it came from")
    chunk, recording = options["chunk"], options["recording"]
    if error_bound is not None and weights is None:
        raise UsageError("--error-bound: goes with --weights")
    if to == "artifact":
        if kind == "artifact":
            raise UsageError(f"{model}: is an artifact already; give --to onnx or tflite, or a checkpoint")
        if chunk or recording:
            raise UsageError(f"--{'chunk' if chunk else 'input'}: goes with --to onnx or tflite")
        check_output(output, ".safetensors", {f"CHECKPOINT {model}": model})
        _export_checkpoint(model, Path(output), weights, error_bound)
        return
    size = _chunk_size(chunk, to)
    check_output(output, f".{to}", {f"{kind.upper()} {model}": model, f"--input {recording}": recording})
    make = _graph_of_artifact if kind == "artifact" else _graph_of_checkpoint
    _write_graph(make(model, to, weights, size, recording, error_bound), to, output)


def _write_graph(graph: ExportedGraph, to: str, output: str) -> None:
    from edge_ssm_build.export.graphs import write_graph

    write_graph(Path(output), graph)
    click.echo(f"{to}: {graph.summary()}")
    click.echo(f"{output}: {len(graph.content):,} bytes")


def _graph_of_artifact(
    model: str, to: Any, weights: Any, chunk: int, recording: str | None, error_bound: float | None
) -> ExportedGraph:
    from edge_ssm_build.export.graphs import comparison_samples, export_graph

    if weights == "auto":
        raise UsageError("--weights auto: for a checkpoint only; give float32, float16 or int8")
    samples = comparison_samples(artifact.load(model).network, recording)
    return export_graph(Path(model), to, weights, chunk, samples, error_bound)


def _graph_of_checkpoint(
    model: str, to: Any, weights: Any, chunk: int, recording: str | None, error_bound: float | None
) -> ExportedGraph:
    """Export a checkpoint by way of an artifact, whose weights have the type that was asked for."""
    from edge_ssm_build.export.graphs import export_graph

    if recording:
        raise UsageError("--input: a checkpoint's graph is compared on its own validation split; leave it out")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.safetensors"
        _export_checkpoint(model, source, weights, error_bound)
        return export_graph(source, to, None, chunk, _validation_samples(model))


def _chunk_size(text: str | None, to: str) -> int:
    """Return the number of samples per call that --chunk stands for."""
    from edge_ssm.formats.exported import ANY_LENGTH

    if text is None:
        return 1
    if to == "onnx":
        if text != "any":
            raise UsageError(f"--chunk {text!r}: an onnx graph takes any number of samples; give any")
        return ANY_LENGTH
    if not text.isdecimal() or not 2 <= int(text) <= MAX_CHUNK:
        raise UsageError(
            f"--chunk {text!r}: expected 2 to {MAX_CHUNK} samples, which a tflite graph takes one after the other"
        )
    return int(text)


def _validation_samples(checkpoint: str) -> tuple[Array, str]:
    """Return samples of the checkpoint's validation split to compare its graph on, and their description."""
    from edge_ssm_build.data import datasets
    from edge_ssm_build.export.graphs import SAMPLES
    from edge_ssm_build.training.checkpoint import load_checkpoint
    from edge_ssm_build.training.scoring import split_windows

    loaded = load_checkpoint(Path(checkpoint))
    x, _ = split_windows(datasets.load(loaded.data), "validation", loaded.recipe.window)
    count = max(1, SAMPLES // loaded.recipe.window)
    return x[:count].reshape(-1, x.shape[-1]), "validation split"


def _export_checkpoint(checkpoint: str, output: Path, weights: Any, error_bound: float | None) -> None:
    """Write a checkpoint as an artifact and print its agreement and its scores."""
    require_torch()
    from edge_ssm_build.data import datasets
    from edge_ssm_build.export.artifact import export_artifact
    from edge_ssm_build.training.checkpoint import load_checkpoint

    loaded = load_checkpoint(Path(checkpoint))
    data = datasets.load(loaded.data)
    if weights is not None:
        loaded = _quantize(loaded, data, weights, error_bound)
    agreements, provenance = export_artifact(loaded, data, output)
    for engine, agreement in agreements.items():
        click.echo(f"{engine} against torch in float64: test split, {agreement.summary()}")
    score = provenance["scores"]["test"]
    click.echo(
        f"{output}: {output.stat().st_size:,} bytes, test accuracy {score['accuracy']:.4f}, "
        f"balanced {score['balanced_accuracy']:.4f}"
    )


def _quantize(checkpoint: Checkpoint, data: Dataset, weights: Any, bound: float | None) -> Checkpoint:
    """Return the checkpoint with its mixing weights as --weights and --error-bound ask, and print what each costs."""
    from edge_ssm.model.network import MIXING_DTYPES
    from edge_ssm_build.export.quantization import fastest_within, quantize_checkpoint

    dtypes = MIXING_DTYPES if weights == "auto" else tuple(dict.fromkeys(["float32", weights]))
    variants = quantize_checkpoint(checkpoint, data, dtypes)
    for dtype, variant in variants.items():
        click.echo(variant.summary(dtype))
    chosen = fastest_within(variants, bound or DEFAULT_ERROR_BOUND) if weights == "auto" else weights
    if bound is not None and not variants[chosen].max_error <= bound:
        raise RunFailed(
            f"export: {chosen} mixing weights change a logit by up to {variants[chosen].max_error:.1e}, more than "
            f"--error-bound {bound:g}; nothing was written: allow more, or take --weights auto"
        )
    if weights == "auto":
        click.echo(f"chosen: {chosen}")
    return variants[chosen].checkpoint
