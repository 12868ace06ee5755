"""Run a torch network over windows and score its predictions."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edge_ssm.model.network import InputSpec
from edge_ssm_build.data.datasets import Array, Dataset, SplitName, windows
from edge_ssm_build.training.network import SSMNetwork


def split_windows(data: Dataset, split: SplitName, window: int) -> tuple[Array, Array]:
    """The split's tumbling windows, (n, window, d_input) in the sensor's units, and labels: for scores."""
    return windows(data.splits[split], window, window)


def as_input(x: Array, spec: InputSpec, dtype: type[np.floating[Any]] = np.float32) -> Tensor:
    """Normalised windows, (n, window, d_input): float32 as a network trains on them, or another ``dtype``."""
    return torch.from_numpy(((x - spec.mean) / spec.std).astype(dtype))


@torch.no_grad()
def predict(model: SSMNetwork, x: Tensor, batch: int = 256) -> Tensor:
    """Logits (n, d_output) in convolution mode."""
    model.eval()
    return torch.cat([model(part) for part in x.split(batch)])


BATCH_VALUES = 2**20
"""Values of one signal of a block in a batch of ``predict_exactly``, 8 MiB; several of them are alive at a time."""


def predict_exactly(model: SSMNetwork, x: Tensor) -> Tensor:
    """Logits in convolution mode with everything in float64: what streams are compared with. ``model`` stays as it is.

    A network in float32 is off by 1e-5 and more itself, too much to judge a bound of 1e-4 by.
    """
    batch = max(1, BATCH_VALUES // max(1, x.shape[1] * model.config.d_model))
    return predict(copy.deepcopy(model).double(), x.double(), batch)


@dataclass(frozen=True)
class Score:
    accuracy: float
    balanced_accuracy: float
    """Mean over the classes of the share that is found."""
    loss: float
    windows: int


def score_logits(logits: Tensor, y: Tensor) -> Score:
    """Logits (n, d_output) against class numbers (n,)."""
    right = logits.argmax(dim=1) == y
    found = [right[y == label].float().mean().item() for label in y.unique()]
    loss = nn.functional.cross_entropy(logits, y).item()
    return Score(right.float().mean().item(), float(np.mean(found)), loss, len(y))


def score(model: SSMNetwork, x: Tensor, y: Tensor) -> Score:
    return score_logits(predict(model, x), y)
