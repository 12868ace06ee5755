"""Windows of a split, predictions of the torch network on them, and scores."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edge_ssm.model.network import InputSpec
from edge_ssm_build.data.datasets import Array, Dataset, SplitName, windows
from edge_ssm_build.training.checkpoint import Checkpoint
from edge_ssm_build.training.network import SSMNetwork


def split_windows(data: Dataset, split: SplitName, window: int) -> tuple[Array, Array]:
    """Return the split's tumbling windows, (n, window, d_input) in the sensor's units, and labels (n,) for scoring."""
    return windows(data.splits[split], window, window)


def as_input(x: Array, spec: InputSpec, dtype: type[np.floating[Any]] = np.float32) -> Tensor:
    """Return normalised windows (n, window, d_input): float32, as in training, or another ``dtype``."""
    return torch.from_numpy(((x - spec.mean) / spec.std).astype(dtype))


MAX_CALIBRATION_WINDOWS = 256
CALIBRATION_BATCH = 32
"""Windows per batch in computations over the calibration windows."""


def calibration_windows(checkpoint: Checkpoint, data: Dataset) -> tuple[Tensor, Tensor]:
    """Return at most MAX_CALIBRATION_WINDOWS normalised windows of the training split, evenly spread, and labels."""
    x, y = split_windows(data, "train", checkpoint.recipe.window)
    chosen = torch.linspace(0, len(x) - 1, min(len(x), MAX_CALIBRATION_WINDOWS)).round().long()
    return as_input(x[chosen.numpy()], checkpoint.spec), torch.from_numpy(y)[chosen]


@torch.no_grad()
def predict(model: SSMNetwork, x: Tensor, batch: int = 256) -> Tensor:
    """Return logits (n, d_output) in convolution mode."""
    model.eval()
    return torch.cat([model(part) for part in x.split(batch)])


BATCH_VALUES = 2**20
"""Values of one signal per batch of ``predict_exactly`` (8 MiB); several signals are alive at a time."""


def predict_exactly(model: SSMNetwork, x: Tensor) -> Tensor:
    """Return logits (n, d_output) in convolution mode, computed in float64. The model is not changed.

    Streams are compared with these: a network in float32 is itself off by 1e-5 and more, too much for a bound of 1e-4.
    """
    batch = max(1, BATCH_VALUES // max(1, x.shape[1] * model.config.d_model))
    return predict(copy.deepcopy(model).double(), x.double(), batch)


@dataclass(frozen=True)
class Score:
    """Quality of predictions on the windows of a split."""

    accuracy: float
    balanced_accuracy: float
    """Mean of the recall over the classes."""
    loss: float
    """Mean cross-entropy."""
    windows: int

    def is_better_than(self, other: Score) -> bool:
        """Return True for a higher balanced accuracy or, if that is equal, a lower loss."""
        return self.rank > other.rank

    @property
    def rank(self) -> tuple[float, float]:
        """Sort key: higher is better."""
        return self.balanced_accuracy, -self.loss


def score_logits(logits: Tensor, y: Tensor) -> Score:
    """Score logits (n, d_output) against class numbers (n,)."""
    is_correct = logits.argmax(dim=1) == y
    recalls = [is_correct[y == label].float().mean().item() for label in y.unique()]
    loss = nn.functional.cross_entropy(logits, y).item()
    return Score(is_correct.float().mean().item(), float(np.mean(recalls)), loss, len(y))


def score(model: SSMNetwork, x: Tensor, y: Tensor) -> Score:
    """Score the model on normalised windows (n, window, d_input) with class numbers (n,)."""
    return score_logits(predict(model, x), y)
