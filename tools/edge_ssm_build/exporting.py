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
from edge_ssm import artifact
from edge_ssm.engines import create
from edge_ssm.errors import RunFailed
from edge_ssm.monitor.steptime import measure
from edge_ssm.network import MixingDtype, Network
from edge_ssm_build.calibration import windows
from edge_ssm_build.convert import to_network
from edge_ssm_build.datasets import Array, Dataset
from edge_ssm_build.model import SSMNetwork
from edge_ssm_build.rounding import round_mixing
from edge_ssm_build.training import Checkpoint, as_input, predict, score, split_windows

REFERENCE_WINDOWS = 50
"""The float64 reference streams a sample in a tenth of a millisecond: it sees so many windows, evenly spread, while the
engine that ships sees all."""


@dataclass(frozen=True)
class Agreement:
    windows: int
    labels_differing: int
    max_error: float


def stream_windows(network: Network, engine: str, x: Array) -> Array:
    """Windows in the sensor's units (n, window, d_input), each streamed from zero state: (n, d_output) float64."""
    runner = create(engine, network, lanes=1)
    pooled = []
    for window in x:
        runner.reset()
        outputs = runner.chunk(window).astype(np.float64)
        pooled.append(outputs.mean(axis=0) if network.pooling == "mean" else outputs[-1])
    return np.stack(pooled)


def compare(model: SSMNetwork, network: Network, engine: str, x: Array) -> Agreement:
    """The torch network's convolution mode against an engine's stream on the same windows, (n, window, d_input)."""
    expected = predict(model, as_input(x, network.input)).numpy()
    if network.pooling == "none":
        expected = expected[:, -1]
    found = stream_windows(network, engine, x)
    differing = int((expected.argmax(axis=1) != found.argmax(axis=1)).sum())
    return Agreement(len(x), differing, float(np.abs(expected - found).max()))


def provenance(checkpoint: Checkpoint, data: Dataset) -> dict[str, Any]:
    """What made the artifact. No time and no path of a machine: the same run gives the same bytes."""
    reached = {}
    for split in ("validation", "test"):
        x, y = split_windows(data, split, checkpoint.recipe.window)
        reached[split] = asdict(score(checkpoint.model, as_input(x, checkpoint.spec), torch.from_numpy(y)))
    return {
        "tool": f"edge-ssm-build {edge_ssm.__version__}, torch {torch.__version__.split('+')[0]}",
        "data": {"name": data.name, "source": data.source},
        "recipe": asdict(checkpoint.recipe),
        "history": checkpoint.history,
        "scores": reached,
    }


@dataclass(frozen=True)
class Rounded:
    """What one type of mixing weights costs, and what it gains here."""

    checkpoint: Checkpoint
    network: Network
    max_error: float
    """Largest difference of a logit from the checkpoint's as it was, streamed on the CPU engine over the test split."""
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
    expected = predict(checkpoint.model, shown).numpy()
    if checkpoint.model.config.pooling == "none":
        expected = expected[:, -1]
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
    """Write the artifact to ``path`` and return, an engine, how it agrees with torch on the test split, and provenance.

    What is compared is the artifact as read back from disk. Raises RunFailed, and writes nothing, if one label differs
    or one logit is off by more than the network's tolerance.
    """
    network = to_network(checkpoint.model, checkpoint.spec, checkpoint.recipe.window, checkpoint.labels)
    made_by = provenance(checkpoint, data)
    x, _ = split_windows(data, "test", checkpoint.recipe.window)
    with tempfile.TemporaryDirectory() as folder:
        artifact.save(Path(folder) / "trial.safetensors", network, made_by)
        shipped = artifact.load(Path(folder) / "trial.safetensors").network
        some = x[np.linspace(0, len(x) - 1, min(len(x), REFERENCE_WINDOWS)).round().astype(int)]
        compared = {"reference": some, "cpu": x}
        agreements = {engine: compare(checkpoint.model, shipped, engine, seen) for engine, seen in compared.items()}
    for engine, agreement in agreements.items():
        if agreement.labels_differing or not agreement.max_error <= network.tolerance:
            raise RunFailed(
                f"export: the {engine} engine's stream differs from torch on {agreement.labels_differing} of "
                f"{agreement.windows} windows, largest error of a logit {agreement.max_error:.1e}, bound "
                f"{network.tolerance:.1e}; nothing was written"
            )
    artifact.save(path, network, made_by)
    return agreements, made_by
