"""From a checkpoint to an artifact, which is written only if its stream says what the torch network says."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import edge_ssm
from edge_ssm.engines.registry import create
from edge_ssm.errors import RunFailed
from edge_ssm.formats import artifact
from edge_ssm.model.network import InputSpec, MixingDtype, Network
from edge_ssm.profiler.step_table import measure
from edge_ssm_build.data.datasets import Array, Dataset
from edge_ssm_build.export.convert import to_network
from edge_ssm_build.export.quantization import round_mixing
from edge_ssm_build.pruning.calibration import windows
from edge_ssm_build.training.checkpoint import Checkpoint
from edge_ssm_build.training.network import SSMNetwork
from edge_ssm_build.training.scoring import Score, as_input, predict_exactly, score_logits, split_windows

REFERENCE_WINDOWS = 50
"""The float64 reference streams a sample in a tenth of a millisecond: it sees so many windows, evenly spread, while the
engine that ships sees all."""


@dataclass(frozen=True)
class Agreement:
    """Of an engine's stream with the torch network's convolution mode, computed in float64, window by window."""

    windows: int
    labels_differing: int
    """Windows decided otherwise, ties aside."""
    ties: int
    """Windows whose two largest logits in float64 are closer than two errors of ``bound``: either label is right."""
    ties_differing: int
    """Those of them that the stream decides otherwise, between logits that are so close."""
    max_error: float
    """Of a logit."""
    bound: float
    """Largest error that passes, the network's tolerance."""

    def passes(self) -> bool:
        """Whether no label differs and no logit is off by more than the bound."""
        return not self.labels_differing and self.max_error <= self.bound

    def line(self) -> str:
        """The comparison in words, for people."""
        labels = f"{self.labels_differing} labels differ" if self.labels_differing else "every label equal"
        if self.ties:
            labels += " but for ties" if self.ties_differing and not self.labels_differing else ""
            labels += f", {self.ties} ties (two largest logits within {2 * self.bound:.1e})"
            labels += f" of which {self.ties_differing} decided otherwise" if self.ties_differing else ""
        return f"{self.windows} windows, {labels}, largest error of a logit {self.max_error:.1e}"


def stream_windows(network: Network, engine: str, x: Array) -> Array:
    """Windows in the sensor's units (n, window, d_input), each streamed from zero state: (n, d_output) float64."""
    runner = create(engine, network, lanes=1)
    pooled = []
    for window in x:
        runner.reset()
        outputs = runner.chunk(window).astype(np.float64)
        pooled.append(outputs.mean(axis=0) if network.pooling == "mean" else outputs[-1])
    return np.stack(pooled)


def convolve_windows(model: SSMNetwork, spec: InputSpec, x: Array) -> Array:
    """The same windows through the torch network in convolution mode, in float64: (n, d_output)."""
    logits = predict_exactly(model, as_input(x, spec, np.float64)).numpy()
    return logits[:, -1] if model.config.pooling == "none" else logits


def agreement_of(expected: Array, found: Array, bound: float) -> Agreement:
    """Of two sets of logits, (n, d_output) float64; ``expected`` decides what is a tie.

    Logits that are right to within ``bound`` can change places only if they lie within twice that.
    """
    rows = np.arange(len(expected))
    ranked = np.sort(expected, axis=1)
    ties = ranked[:, -1] - ranked[:, -2] < 2 * bound if expected.shape[1] > 1 else np.zeros(len(rows), bool)
    chosen = found.argmax(axis=1)
    otherwise = chosen != expected.argmax(axis=1)
    apart = otherwise & ~(ranked[:, -1] - expected[rows, chosen] < 2 * bound)
    error = float(np.abs(expected - found).max())
    return Agreement(len(rows), int(apart.sum()), int(ties.sum()), int((otherwise & ~apart).sum()), error, bound)


def compare(model: SSMNetwork, network: Network, engine: str, x: Array) -> Agreement:
    """The torch network, in float64, against an engine's stream of the same windows, (n, window, d_input)."""
    expected = convolve_windows(model, network.input, x)
    return agreement_of(expected, stream_windows(network, engine, x), network.tolerance)


def provenance(checkpoint: Checkpoint, data: Dataset, scores: dict[str, Score]) -> dict[str, Any]:
    """What made the artifact. No time and no path of a machine: the same run gives the same bytes."""
    return {
        "tool": f"edge-ssm-build {edge_ssm.__version__}, torch {torch.__version__.split('+')[0]}",
        "data": {"name": data.name, "source": data.source},
        "recipe": asdict(checkpoint.recipe),
        "history": checkpoint.history,
        "scores": {split: asdict(reached) for split, reached in scores.items()},
    }


@dataclass(frozen=True)
class Rounded:
    """What one type of mixing weights costs, and what it gains here."""

    checkpoint: Checkpoint
    network: Network
    max_error: float
    """Largest difference of a logit from the checkpoint's as it was, in float64, streamed on the CPU engine over the
    test split."""
    labels_differing: int
    windows: int
    step_us: float

    def line(self, dtype: str) -> str:
        return (
            f"{dtype} mixing weights: largest change of a logit {self.max_error:.1e}, {self.labels_differing} of "
            f"{self.windows} test labels differ, a step {self.step_us:.2f} us here"
        )


def round_all(checkpoint: Checkpoint, data: Dataset, dtypes: Sequence[MixingDtype]) -> dict[MixingDtype, Rounded]:
    """The checkpoint with its mixing weights in each type, all measured side by side."""
    x, _ = split_windows(data, "test", checkpoint.recipe.window)
    calibration, shown = windows(checkpoint, data)[0], as_input(x, checkpoint.spec)
    expected = convolve_windows(checkpoint.model, checkpoint.spec, x)
    made: dict[MixingDtype, tuple[Checkpoint, Network]] = {}
    for dtype in dtypes:
        rounded = replace(checkpoint, model=copy.deepcopy(checkpoint.model), history=list(checkpoint.history))
        round_mixing(rounded.model, dtype, calibration, shown)
        network = to_network(rounded.model, rounded.spec, rounded.recipe.window, rounded.labels)
        made[dtype] = rounded, network
    steps = measure([create("cpu", network) for _, network in made.values()], x[0])
    found = {}
    for (dtype, (rounded, network)), step_us in zip(made.items(), steps, strict=True):
        streamed = stream_windows(network, "cpu", x)
        error = float(np.abs(streamed - expected).max())
        differing = int((streamed.argmax(axis=1) != expected.argmax(axis=1)).sum())
        rounded.history.append(
            {"stage": "round", "mixing_dtype": dtype, "max_error": error, "labels_differing": differing}
        )
        found[dtype] = Rounded(rounded, network, error, differing, len(x), step_us)
    return found


def fastest_within(rounded: dict[MixingDtype, Rounded], bound: float) -> MixingDtype:
    """The type whose step is the shortest of those within ``bound``; a gain of less than a twentieth is none."""
    chosen: MixingDtype = "float32"
    for dtype, found in rounded.items():
        if found.max_error <= bound and found.step_us < 0.95 * rounded[chosen].step_us:
            chosen = dtype
    return chosen


def export(checkpoint: Checkpoint, data: Dataset, path: Path) -> tuple[dict[str, Agreement], dict[str, Any]]:
    """Write the artifact to ``path``; return how each engine agrees with torch on the test split, and provenance.

    What is compared with the torch network in float64, and what is scored, is the stream of the network as read back
    from disk. Raises RunFailed, and writes nothing, if one label differs or one logit is off by more than the network's
    tolerance.
    """
    network = to_network(checkpoint.model, checkpoint.spec, checkpoint.recipe.window, checkpoint.labels)
    x, y = split_windows(data, "test", checkpoint.recipe.window)
    with tempfile.TemporaryDirectory() as folder:
        artifact.save(Path(folder) / "trial.safetensors", network, {})
        shipped = artifact.load(Path(folder) / "trial.safetensors").network
    some = np.linspace(0, len(x) - 1, min(len(x), REFERENCE_WINDOWS)).round().astype(int)
    expected = convolve_windows(checkpoint.model, checkpoint.spec, x)
    streamed = stream_windows(shipped, "cpu", x)
    agreements = {
        "reference": agreement_of(expected[some], stream_windows(shipped, "reference", x[some]), shipped.tolerance),
        "cpu": agreement_of(expected, streamed, shipped.tolerance),
    }
    for engine, agreement in agreements.items():
        if not agreement.passes():
            raise RunFailed(
                f"export: the {engine} engine's stream differs from torch in float64 on {agreement.labels_differing} "
                f"of {agreement.windows} windows, largest error of a logit {agreement.max_error:.1e}, bound "
                f"{agreement.bound:.1e}; nothing was written"
            )
    x_val, y_val = split_windows(data, "validation", checkpoint.recipe.window)
    scores = {
        "validation": score_logits(torch.from_numpy(stream_windows(shipped, "cpu", x_val)), torch.from_numpy(y_val)),
        "test": score_logits(torch.from_numpy(streamed), torch.from_numpy(y)),
    }
    made_by = provenance(checkpoint, data, scores)
    artifact.save(path, network, made_by)
    return agreements, made_by
