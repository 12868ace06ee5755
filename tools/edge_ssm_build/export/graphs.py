"""From an artifact to an ONNX or TFLite file, which is written only if it steps as the float64 reference does."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_ssm import files as edge_ssm_files
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
ORDINARY = 10.0
"""Size of an output up to which a network's tolerance is meant."""
NOISE = "noise of the training data's mean and deviation"


@dataclass(frozen=True)
class Made:
    """What was written, and how it differs from the reference engine, which steps the artifact's own weights."""

    content: bytes
    weights: MixingDtype
    measured: MeasuredError
    windows: int
    window_error: float
    """Largest error of a pooled output, which is what a decision is made of; 0 without whole windows."""
    labels_differing: int

    def line(self) -> str:
        m, labels = self.measured, ""
        if self.windows:
            labels = f", of a window {self.window_error:.1e}, {self.labels_differing} of {self.windows} labels differ"
        return (
            f"{self.weights} weights, {m.samples} samples ({m.samples_from}): largest error {m.max_error:.1e}{labels}"
        )


class _Watcher(ReferenceEngine):
    """Keeps the largest size of what entered each layer's mixing."""

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        self.reach = [0.0] * len(network.blocks)

    def range(self) -> list[float]:
        """By which they are quantised: of a layer that heard nothing a little, not 0."""
        return [max(size, 1e-6) for size in self.reach]

    def _mix(self, i: int, mixing: Mixing, g: Array) -> Array:
        self.reach[i] = max(self.reach[i], float(np.abs(g).max(initial=0.0)))
        return super()._mix(i, mixing, g)


def reach_of(network: Network, samples: Array) -> list[float]:
    """Of each layer the largest size of its mixing's inputs, over one stream of ``samples`` (n, d_input)."""
    watcher = _Watcher(network)
    watcher.chunk(samples)
    return watcher.range()


def samples_of(network: Network, path: str | None) -> tuple[Array, str]:
    """(n, d_input) in the sensor's units that the graph is tried on, and where they are from."""
    if path is not None:
        return recording.read(path, network), sanitize(os.path.basename(path), exported.MAX_NAME_LENGTH)
    rng = np.random.default_rng(0)
    if isinstance(network.encoder, TokenEncoder):
        tokens = rng.integers(0, len(network.encoder.embedding), (SAMPLES, 1))
        return tokens.astype(np.float64), "random tokens"
    return network.input.mean + network.input.std * rng.standard_normal((SAMPLES, network.d_input)), NOISE


def own_weights(network: Network) -> MixingDtype:
    """The type of all mixing weights; float32, which holds them all, where they differ."""
    found = {block.mixing.dtype for block in network.blocks}
    return found.pop() if len(found) == 1 else "float32"


def make(
    source: Path,
    kind: GraphKind,
    weights: MixingDtype | None = None,
    chunk: int = 1,
    heard: tuple[Array, str] | None = None,
    error_bound: float | None = None,
) -> Made:
    """The exported file of the artifact ``source``.

    ``weights``: of the mixing in the graph, None for the artifact's own. ``chunk``: samples of a call,
    ``exported.ANY_LENGTH`` for any number (ONNX). ``heard``: samples (n, d_input) and what they are; the error is measured on them, and an int8
    ONNX graph quantises the mixing's inputs by the largest of theirs.

    Raises RunFailed if the outputs are off by more than the network's tolerance in the artifact's own weights or in
    float32, by more than ``error_bound``, or by more than a run believes (``verification.self_test``);
    EngineUnavailable if a package is missing.
    """
    content = edge_ssm_files.read_regular_file(source, loading.MAX_BYTES, remedy="expected an artifact")
    loaded = artifact.load(source)
    network = loaded.network
    chosen = weights or own_weights(network)
    samples, samples_from = heard or samples_of(network, None)
    reference = _Watcher(network)
    exact = _streamed(reference, samples)
    reach = reference.range() if chosen == "int8" else []
    graph = exported.build(kind, network, chosen, reach, chunk)
    found = _streamed(create(kind, network, EngineOptions(graph=graph)), samples)
    off = float(np.abs(found - exact).max())
    bound = error_bound
    if chosen == "float32":  # A run holds it to that, whatever was allowed here.
        bound = min(bound or np.inf, network.tolerance * max(1.0, float(np.abs(exact).max()) / ORDINARY))
    if not (np.isfinite(off) and (bound is None or off <= bound)):
        advice = "run the artifact itself" if chosen == "float32" else "take larger weights, or a larger --error-bound"
        raise RunFailed(
            f"export: the {kind} graph with {chosen} weights is off by up to {off:.1e} from the reference, more than "
            f"{bound or np.inf:g}; nothing was written: {advice}"
        )
    measured = MeasuredError(off, len(samples), samples_from)
    made = exported.to_bytes(graph, network, content, loaded.digest, measured)
    again = exported.parse(made, kind)
    engine = create(kind, again.source.network, EngineOptions(graph=again.graph))
    if not np.array_equal(_streamed(engine, samples), found):
        raise RunFailed(f"export: the {kind} file steps otherwise than the graph in it; nothing was written")
    engine.reset()
    if problem := verification.self_test(engine, off):
        raise RunFailed(
            f"export: the {kind} graph with {chosen} weights fails the self-test of a run, {problem}; nothing was "
            "written: take larger weights"
        )
    return Made(made, chosen, measured, *_decisions(network, exact, found))


def write(path: Path, made: Made) -> None:
    """Raises InputRefused if the place can't be written, RunFailed if what was written can't be loaded."""
    try:
        edge_ssm_files.write(path, made.content)
    except OSError as error:
        raise InputRefused(f"{path}: can't be written ({error.strerror})") from None
    loading.load(path)


def _streamed(engine: Engine, samples: Array) -> Array:
    """Outputs (n, d_output) float64, the state reset where each of the network's windows begins."""
    window = engine.network.window if engine.network.pooling != "none" else len(samples)
    parts = []
    for begin in range(0, len(samples), window):
        engine.reset()
        parts.append(engine.chunk(samples[begin : begin + window]))
    return np.concatenate(parts).astype(np.float64)


def _decisions(network: Network, exact: Array, found: Array) -> tuple[int, float, int]:
    """Whole windows, the largest error of their pooled outputs, and labels that differ (0 in a regression)."""
    whole = len(exact) // network.window
    if network.pooling == "none" or not whole:
        return 0, 0.0, 0

    def pooled(outputs: Array) -> Array:
        shaped = outputs[: whole * network.window].reshape(whole, network.window, -1)
        last: Array = shaped.mean(axis=1) if network.pooling == "mean" else shaped[:, -1]
        return last

    a, b = pooled(exact), pooled(found)
    differing = int((a.argmax(axis=1) != b.argmax(axis=1)).sum()) if network.task == "classification" else 0
    return whole, float(np.abs(a - b).max()), differing
