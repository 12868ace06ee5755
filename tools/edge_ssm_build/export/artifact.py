"""Export of a checkpoint as an artifact, which is written only if its stream agrees with the torch network."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import edge_ssm
from edge_ssm.errors import RunFailed
from edge_ssm.formats import artifact
from edge_ssm.model.network import Array, Network
from edge_ssm_build.data.datasets import Dataset
from edge_ssm_build.export.agreement import Agreement, compare_logits, convolve_windows, stream_windows
from edge_ssm_build.export.convert import to_network
from edge_ssm_build.training.checkpoint import Checkpoint
from edge_ssm_build.training.scoring import Score, score_logits, split_windows

REFERENCE_WINDOWS = 50
"""Number of windows that the float64 reference streams, evenly spread over the split. It takes a tenth of a millisecond
per sample; the CPU engine, which runs on the device, streams all windows."""


def network_of(checkpoint: Checkpoint) -> Network:
    """Return the checkpoint's network in the form that the engines run."""
    return to_network(checkpoint.model, checkpoint.spec, checkpoint.recipe.window, checkpoint.labels)


def provenance(checkpoint: Checkpoint, data: Dataset, scores: dict[str, Score]) -> dict[str, Any]:
    """Return the provenance of an artifact. It holds no time and no path: the same run gives the same bytes."""
    return {
        "tool": f"edge-ssm-build {edge_ssm.__version__}, torch {torch.__version__.split('+')[0]}",
        "data": {"name": data.name, "source": data.source},
        "recipe": asdict(checkpoint.recipe),
        "history": checkpoint.history,
        "scores": {split: asdict(score) for split, score in scores.items()},
    }


def export_artifact(checkpoint: Checkpoint, data: Dataset, path: Path) -> tuple[dict[str, Agreement], dict[str, Any]]:
    """Write a checkpoint as an artifact after comparing its stream with the torch network in float64.

    The network is read back from a temporary file first; what is compared and scored is the stream of that network.

    Returns
    -------
    tuple
        The agreement of each engine on the test split, by engine name, and the artifact's provenance.

    Raises
    ------
    RunFailed
        If one label differs or one logit is off by more than the network's tolerance. Nothing is written then.
    """
    network = network_of(checkpoint)
    shipped = _round_trip(network)
    x, y = split_windows(data, "test", checkpoint.recipe.window)
    expected = convolve_windows(checkpoint.model, checkpoint.spec, x)
    streamed = stream_windows(shipped, "cpu", x)
    agreements = _compare_engines(shipped, x, expected, streamed)
    x_validation, y_validation = split_windows(data, "validation", checkpoint.recipe.window)
    validation = stream_windows(shipped, "cpu", x_validation)
    scores = {
        "validation": score_logits(torch.from_numpy(validation), torch.from_numpy(y_validation)),
        "test": score_logits(torch.from_numpy(streamed), torch.from_numpy(y)),
    }
    content = provenance(checkpoint, data, scores)
    artifact.save(path, network, content)
    return agreements, content


def _round_trip(network: Network) -> Network:
    """Return the network as read back from an artifact file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trial.safetensors"
        artifact.save(path, network, {})
        return artifact.load(path).network


def _compare_engines(network: Network, x: Array, expected: Array, streamed: Array) -> dict[str, Agreement]:
    """Compare both engines with the expected logits. Raise RunFailed for the first that disagrees."""
    subset = np.linspace(0, len(x) - 1, min(len(x), REFERENCE_WINDOWS)).round().astype(int)
    reference = stream_windows(network, "reference", x[subset])
    agreements = {
        "reference": compare_logits(expected[subset], reference, network.tolerance),
        "cpu": compare_logits(expected, streamed, network.tolerance),
    }
    for engine, agreement in agreements.items():
        if not agreement.passes():
            raise RunFailed(
                f"export: the {engine} engine's stream differs from torch in float64 on {agreement.labels_differing} "
                f"of {agreement.windows} windows, largest error of a logit {agreement.max_error:.1e}, bound "
                f"{agreement.bound:.1e}; nothing was written"
            )
    return agreements
