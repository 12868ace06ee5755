"""Export of an artifact as an ONNX or TFLite file, which is written only if it agrees with the float64 reference."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_ssm import files
from edge_ssm.engines import verification
from edge_ssm.engines.reference import ReferenceEngine
from edge_ssm.engines.registry import Engine, EngineOptions, create
from edge_ssm.errors import InputRefused, RunFailed
from edge_ssm.formats import artifact, exported, loading
from edge_ssm.formats.containers import GraphKind
from edge_ssm.formats.exported import MeasuredError
from edge_ssm.io import recording
from edge_ssm.model.network import Array, Mixing, MixingDtype, Network, TokenEncoder
from edge_ssm.text import sanitize

SAMPLES = 2048
"""Number of random samples that a graph is compared on if there is no recording."""
ORDINARY_OUTPUT = 10.0
"""Magnitude of an output up to which a network's tolerance is absolute; above it, it grows in proportion."""
MIN_RANGE = 1e-6
"""Smallest input range of an int8 mixing, for a layer whose inputs were all zero."""
NOISE = "noise of the training data's mean and deviation"


@dataclass(frozen=True)
class ExportedGraph:
    """An exported file and its deviation from the reference engine running the artifact's own weights."""

    content: bytes
    """The bytes of the file."""
    weights: MixingDtype
    measured: MeasuredError
    windows: int
    window_error: float
    """Largest error of a pooled output, on which a decision is based; 0 without complete windows."""
    labels_differing: int

    def summary(self) -> str:
        """Return the comparison as one line of text."""
        m, labels = self.measured, ""
        if self.windows:
            labels = f", of a window {self.window_error:.1e}, {self.labels_differing} of {self.windows} labels differ"
        return (
            f"{self.weights} weights, {m.samples} samples ({m.samples_from}): largest error {m.max_error:.1e}{labels}"
        )


class _RangeRecorder(ReferenceEngine):
    """Reference engine that records the largest magnitude of each layer's mixing inputs."""

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        self._magnitudes = [0.0] * len(network.blocks)

    def ranges(self) -> list[float]:
        """Return the largest magnitude of each layer's inputs, at least ``MIN_RANGE``."""
        return [max(magnitude, MIN_RANGE) for magnitude in self._magnitudes]

    def _mix(self, i: int, mixing: Mixing, g: Array) -> Array:
        self._magnitudes[i] = max(self._magnitudes[i], float(np.abs(g).max(initial=0.0)))
        return super()._mix(i, mixing, g)


def input_ranges(network: Network, samples: Array) -> list[float]:
    """Return the largest magnitude of each layer's mixing inputs over one stream of ``samples`` (n, d_input)."""
    recorder = _RangeRecorder(network)
    recorder.chunk(samples)
    return recorder.ranges()


def comparison_samples(network: Network, path: str | None) -> tuple[Array, str]:
    """Return samples (n, d_input) in the sensor's units to compare a graph on, and a description of their origin.

    They come from the recording ``path`` or, if that is None, from a fixed random generator.
    """
    if path is not None:
        return recording.read(path, network), sanitize(os.path.basename(path), exported.MAX_NAME_LENGTH)
    rng = np.random.default_rng(0)
    if isinstance(network.encoder, TokenEncoder):
        tokens = rng.integers(0, len(network.encoder.embedding), (SAMPLES, 1))
        return tokens.astype(np.float64), "random tokens"
    return network.input.mean + network.input.std * rng.standard_normal((SAMPLES, network.d_input)), NOISE


def mixing_dtype(network: Network) -> MixingDtype:
    """Return the common type of all mixing weights, or float32, which holds every type, if they differ."""
    dtypes = {block.mixing.dtype for block in network.blocks}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def export_graph(
    source: Path,
    kind: GraphKind,
    weights: MixingDtype | None = None,
    chunk: int = 1,
    samples: tuple[Array, str] | None = None,
    error_bound: float | None = None,
) -> ExportedGraph:
    """Build the exported file of an artifact and compare it with the reference engine.

    Parameters
    ----------
    source
        Path of the artifact.
    kind
        "onnx" or "tflite".
    weights
        Type of the mixing weights in the graph; None for the artifact's own.
    chunk
        Number of samples per call; ``exported.ANY_LENGTH`` for any number (ONNX only).
    samples
        Samples (n, d_input) in the sensor's units, and a description of them. The error is measured on them, and an
        int8 ONNX graph quantises the mixing's inputs by their largest magnitude. None for random samples.
    error_bound
        Largest error that is allowed, in addition to the bounds below.

    Returns
    -------
    ExportedGraph
        The content of the file and its error.

    Raises
    ------
    RunFailed
        If the outputs are off by more than ``error_bound``; with float32 weights, by more than the network's tolerance;
        or by more than the self-test of a run accepts (``verification.self_test``).
    EngineUnavailable
        If a package is missing.
    InputRefused
        If the artifact cannot be read.
    """
    content = files.read_regular_file(source, loading.MAX_BYTES, remedy="expected an artifact")
    loaded = artifact.load(source)
    network = loaded.network
    dtype = weights or mixing_dtype(network)
    x, origin = samples or comparison_samples(network, None)
    reference = _RangeRecorder(network)
    expected = _stream(reference, x)
    ranges = reference.ranges() if dtype == "int8" else []
    graph = exported.build(kind, network, dtype, ranges, chunk)
    actual = _stream(create(kind, network, EngineOptions(graph=graph)), x)
    deviation = float(np.abs(actual - expected).max())
    bound = _bound(network, dtype, expected, error_bound)
    _check_error(f"the {kind} graph with {dtype} weights", dtype, deviation, bound)
    measured = MeasuredError(deviation, len(x), origin)
    sealed = exported.to_bytes(graph, network, content, loaded.digest, measured)
    _check_file(sealed, kind, dtype, x, actual, deviation)
    return ExportedGraph(sealed, dtype, measured, *_compare_decisions(network, expected, actual))


def _bound(network: Network, dtype: MixingDtype, expected: Array, error_bound: float | None) -> float | None:
    """Return the largest error that is allowed, or None."""
    if dtype != "float32":
        return error_bound
    # A run applies the tolerance to float32 weights, whatever is allowed here.
    scale = max(1.0, float(np.abs(expected).max()) / ORDINARY_OUTPUT)
    return min(error_bound or np.inf, network.tolerance * scale)


def _check_error(graph: str, dtype: MixingDtype, error: float, bound: float | None) -> None:
    """Raise RunFailed if the error is not finite or larger than the bound."""
    if np.isfinite(error) and (bound is None or error <= bound):
        return
    advice = "run the artifact itself" if dtype == "float32" else "take larger weights, or a larger --error-bound"
    raise RunFailed(
        f"export: {graph} is off by up to {error:.1e} from the reference, more than {bound or np.inf:g}; nothing was "
        f"written: {advice}"
    )


def _check_file(content: bytes, kind: GraphKind, dtype: MixingDtype, x: Array, actual: Array, error: float) -> None:
    """Raise RunFailed unless the sealed file steps like the graph in it and passes the self-test of a run."""
    reread = exported.parse(content, kind)
    engine = create(kind, reread.source.network, EngineOptions(graph=reread.graph))
    if not np.array_equal(_stream(engine, x), actual):
        raise RunFailed(f"export: the {kind} file steps differently from the graph in it; nothing was written")
    engine.reset()
    if problem := verification.self_test(engine, error):
        raise RunFailed(
            f"export: the {kind} graph with {dtype} weights fails the self-test of a run, {problem}; nothing was "
            "written: take larger weights"
        )


def write_graph(path: Path, graph: ExportedGraph) -> None:
    """Write the file and load it again. Raise InputRefused if the path cannot be written."""
    try:
        files.write(path, graph.content)
    except OSError as error:
        raise InputRefused(f"{path}: cannot be written ({error.strerror})") from None
    loading.load(path)


def _stream(engine: Engine, samples: Array) -> Array:
    """Return outputs (n, d_output) float64; the state is reset at the start of each of the network's windows."""
    window = engine.network.window if engine.network.pooling != "none" else len(samples)
    parts = []
    for start in range(0, len(samples), window):
        engine.reset()
        parts.append(engine.chunk(samples[start : start + window]))
    return np.concatenate(parts).astype(np.float64)


def _compare_decisions(network: Network, expected: Array, actual: Array) -> tuple[int, float, int]:
    """Return the number of complete windows, the largest pooled error and the number of differing labels.

    The last is 0 for a regression.
    """
    count = len(expected) // network.window
    if network.pooling == "none" or not count:
        return 0, 0.0, 0

    def pooled(outputs: Array) -> Array:
        windows = outputs[: count * network.window].reshape(count, network.window, -1)
        result: Array = windows.mean(axis=1) if network.pooling == "mean" else windows[:, -1]
        return result

    a, b = pooled(expected), pooled(actual)
    differing = int((a.argmax(axis=1) != b.argmax(axis=1)).sum()) if network.task == "classification" else 0
    return count, float(np.abs(a - b).max()), differing
