"""Mixing weights in float16 or int8, rounded so that a network's outputs change as little as possible.

Rounding each weight by itself shifts the mean of a row's output, and a pooled logit is a mean. GPTQ (arXiv 2210.17323,
algorithm 1) rounds a matrix column by column and lets the remaining columns compensate for each error, based on the
second moments of their inputs. Here the moments are central ones, because the bias compensates exactly for the mean.
Before a block is rounded, it is refitted to the outputs of the unrounded network, so that it also compensates for the
blocks before it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from edge_ssm.engines.registry import create
from edge_ssm.model.network import MixingDtype, Network
from edge_ssm.model.transforms import quantised
from edge_ssm.profiler.step_table import measure
from edge_ssm_build.data.datasets import Dataset
from edge_ssm_build.export.agreement import convolve_windows, stream_windows
from edge_ssm_build.export.convert import mixing_of, to_network
from edge_ssm_build.training.checkpoint import Checkpoint
from edge_ssm_build.training.network import Block, Mixing, SSMNetwork
from edge_ssm_build.training.scoring import (
    CALIBRATION_BATCH,
    as_input,
    calibration_windows,
    predict_exactly,
    split_windows,
)

RIDGE = 1e-4
"""Weight of the ridge penalty, relative to the mean square of the inputs."""
DAMPING = 1e-2
"""Damping of the moments, relative to the mean square of the inputs, as in GPTQ."""
MAX_LEVEL = 127
"""Largest magnitude of an int8 weight."""
MIN_SPEEDUP = 0.95
"""A smaller type is chosen only if its step takes less than this share of the time."""


def round_columns(weight: Tensor, moments: Tensor) -> Tensor:
    """Round a matrix to multiples of one step per row, by GPTQ.

    A row's step is its largest magnitude over ``MAX_LEVEL``. That weight is not changed, and therefore neither is the
    step: rounding the result again changes nothing.

    Parameters
    ----------
    weight
        Shape (R, G), float64.
    moments
        Second moments of the inputs, shape (G, G), float64.

    Returns
    -------
    Tensor
        The rounded matrix, shape (R, G), float64.
    """
    remaining, rows = weight.clone(), torch.arange(len(weight))
    largest = remaining.abs().argmax(dim=1)
    peak = remaining[rows, largest]
    step = (peak.abs() / MAX_LEVEL).clamp(min=1e-30)
    damping = DAMPING * moments.diagonal().mean().clamp(min=1e-30)
    inverse = torch.linalg.inv(moments + damping * torch.eye(len(moments), dtype=moments.dtype))
    upper = torch.linalg.cholesky(inverse, upper=True)
    result = torch.empty_like(remaining)
    for column in range(remaining.shape[1]):
        rounded = (remaining[:, column] / step).round().clamp(-MAX_LEVEL, MAX_LEVEL) * step
        result[:, column] = torch.where(largest == column, peak, rounded)
        error = (remaining[:, column] - result[:, column]) / upper[column, column]
        remaining[:, column:] -= torch.outer(error, upper[column, column:])
    return result


@torch.no_grad()
def round_mixing(model: SSMNetwork, dtype: MixingDtype, calibration: Tensor, evaluation: Tensor) -> None:
    """Round the mixing weights of a network, in place, to what storing them as ``dtype`` preserves.

    Sets ``mixing_dtype`` and ``rounding_error`` (the largest change of a logit on the evaluation windows) of the model.

    Parameters
    ----------
    model
        The network to change.
    dtype
        Type in which the mixing weights will be stored. float32 changes no weight.
    calibration
        Normalised windows that the weights are fitted on, shape (n, T, d_input).
    evaluation
        Normalised windows that the change of the logits is measured on, shape (n, T, d_input).
    """
    model.eval()
    model.mixing_dtype, model.rounding_error = dtype, 0.0
    if dtype == "float32":
        return
    original = copy.deepcopy(model)
    u, target = (
        [network.encoder(part) for part in calibration.split(CALIBRATION_BATCH)] for network in (model, original)
    )
    for block, unrounded in zip(model.layers(), original.layers(), strict=True):
        gram, cross, target = _block_moments(block, unrounded, u, target)
        if block.mixing.weight.numel():
            _round_block(block.mixing, dtype, gram, cross)
        u = [block(part) for part in u]
    difference = predict_exactly(model, evaluation) - predict_exactly(original, evaluation)
    model.rounding_error = float(difference.abs().max())


def _block_moments(
    block: Block, unrounded: Block, inputs: list[Tensor], targets: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return E [g 1]^T [g 1], E [g 1]^T W g' and the unrounded block's outputs.

    g and g' are the mixing inputs of the two networks, each (samples, G); W is the weight before rounding.
    """
    mixing = block.mixing
    count, size = 0, len(mixing.columns) + 1
    gram = torch.zeros(size, size, dtype=torch.float64)
    cross = torch.zeros(size, len(mixing.weight), dtype=torch.float64)
    outputs = []
    for part, target in zip(inputs, targets, strict=True):
        expected = unrounded.signals(target)
        signals = block.signals(part).g, expected.g
        g, g_unrounded = (signal[..., mixing.columns].flatten(0, 1).double() for signal in signals)
        features = torch.cat([g, torch.ones(len(g), 1, dtype=g.dtype)], dim=1)
        gram += features.T @ features
        cross += features.T @ (g_unrounded @ mixing.weight.double().T)
        count += len(g)
        outputs.append(expected.out)
    return gram / count, cross / count, outputs


def _round_block(mixing: Mixing, dtype: MixingDtype, gram: Tensor, cross: Tensor) -> None:
    """Refit and round one mixing, in place. The arguments are those that ``_block_moments`` returns."""
    mean, expected = gram[-1, :-1], cross[-1]
    moments = gram[:-1, :-1] - torch.outer(mean, mean)
    covariance = cross[:-1] - torch.outer(mean, expected)
    weight = mixing.weight.double()
    ridge = RIDGE * moments.diagonal().mean().clamp(min=1e-30)
    refitted = torch.linalg.solve(
        moments + ridge * torch.eye(len(moments), dtype=moments.dtype), covariance + ridge * weight.T
    ).T
    if dtype == "int8":
        refitted = round_columns(refitted, moments)
    mixing.weight.copy_(refitted)
    mixing.weight.copy_(torch.from_numpy(quantised(mixing_of(mixing), dtype).values()))
    mixing.bias[mixing.stacked_rows()] += (expected - mixing.weight.double() @ mean).to(mixing.bias.dtype)


# --- the choice of a type --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A checkpoint with its mixing weights in one type, and what that type costs and gains on this machine."""

    checkpoint: Checkpoint
    network: Network
    max_error: float
    """Largest absolute difference of a logit, streamed on the CPU engine over the test split, from the original
    checkpoint in float64."""
    labels_differing: int
    windows: int
    step_us: float
    """Duration of one step of the CPU engine, in microseconds."""

    def summary(self, dtype: str) -> str:
        """Return the figures as one line of text."""
        return (
            f"{dtype} mixing weights: largest change of a logit {self.max_error:.1e}, {self.labels_differing} of "
            f"{self.windows} test labels differ, a step {self.step_us:.2f} us here"
        )


def quantize_checkpoint(
    checkpoint: Checkpoint, data: Dataset, dtypes: Sequence[MixingDtype]
) -> dict[MixingDtype, QuantizedCheckpoint]:
    """Return the checkpoint with its mixing weights in each type, all timed side by side."""
    x, _ = split_windows(data, "test", checkpoint.recipe.window)
    calibration, evaluation = calibration_windows(checkpoint, data)[0], as_input(x, checkpoint.spec)
    expected = convolve_windows(checkpoint.model, checkpoint.spec, x)
    variants: dict[MixingDtype, tuple[Checkpoint, Network]] = {}
    for dtype in dtypes:
        rounded = replace(checkpoint, model=copy.deepcopy(checkpoint.model), history=list(checkpoint.history))
        round_mixing(rounded.model, dtype, calibration, evaluation)
        variants[dtype] = rounded, to_network(rounded.model, rounded.spec, rounded.recipe.window, rounded.labels)
    steps_us = measure([create("cpu", network) for _, network in variants.values()], x[0])
    results = {}
    for (dtype, (rounded, network)), step_us in zip(variants.items(), steps_us, strict=True):
        streamed = stream_windows(network, "cpu", x)
        error = float(np.abs(streamed - expected).max())
        differing = int((streamed.argmax(axis=1) != expected.argmax(axis=1)).sum())
        rounded.history.append(
            {"stage": "round", "mixing_dtype": dtype, "max_error": error, "labels_differing": differing}
        )
        results[dtype] = QuantizedCheckpoint(rounded, network, error, differing, len(x), step_us)
    return results


def fastest_within(variants: dict[MixingDtype, QuantizedCheckpoint], bound: float) -> MixingDtype:
    """Return the type with the shortest step among those within ``bound``.

    A type that saves less than a twentieth of the step counts as no faster.
    """
    fastest: MixingDtype = "float32"
    for dtype, variant in variants.items():
        if variant.max_error <= bound and variant.step_us < MIN_SPEEDUP * variants[fastest].step_us:
            fastest = dtype
    return fastest
