"""Mixing weights in float16 or int8, rounded so that a network's outputs change the least.

Rounding each weight by itself shifts what a row yields on average, and a pooled logit is an average. GPTQ (arXiv
2210.17323, algorithm 1) rounds a matrix column by column and lets the columns still to come make up for each error, by
the second moments of their inputs; here about their mean, which the bias makes up for exactly. Before a block is
rounded it is refitted onto the unrounded network's outputs, so that it also makes up for the blocks before it.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from edge_ssm.model.network import MixingDtype
from edge_ssm.model.transforms import quantised
from edge_ssm_build.export.convert import mixing_of
from edge_ssm_build.pruning.calibration import BATCH
from edge_ssm_build.training.network import Mixing, SSMNetwork
from edge_ssm_build.training.scoring import predict_exactly

RIDGE = 1e-4
DAMPING = 1e-2
"""Both of the mean square of the inputs, as GPTQ has it."""
TOP = 127


def round_columns(weight: Tensor, moments: Tensor) -> Tensor:
    """(R, G) float64 -> the same in steps of each row's largest magnitude over TOP; ``moments`` (G, G) of the inputs.

    A row's largest weight stays as it is, and with it the step: to round the result again changes nothing.
    """
    left, rows = weight.clone(), torch.arange(len(weight))
    largest = left.abs().argmax(dim=1)
    kept = left[rows, largest]
    step = (kept.abs() / TOP).clamp(min=1e-30)
    damping = DAMPING * moments.diagonal().mean().clamp(min=1e-30)
    inverse = torch.linalg.inv(moments + damping * torch.eye(len(moments), dtype=moments.dtype))
    upper = torch.linalg.cholesky(inverse, upper=True)
    result = torch.empty_like(left)
    for column in range(left.shape[1]):
        rounded = (left[:, column] / step).round().clamp(-TOP, TOP) * step
        result[:, column] = torch.where(largest == column, kept, rounded)
        error = (left[:, column] - result[:, column]) / upper[column, column]
        left[:, column:] -= torch.outer(error, upper[column, column:])
    return result


@torch.no_grad()
def round_mixing(model: SSMNetwork, dtype: MixingDtype, x: Tensor, shown: Tensor) -> None:
    """Leave of the mixing weights what storing them as ``dtype`` does, and ship them so from now on.

    ``x`` (n, T, d_input), normalised, is what they are fitted on; ``shown``, of the same form, what the largest change
    of a logit is measured on, which the network states as its ``rounding_error``.
    """
    model.eval()
    model.mixing_dtype, model.rounding_error = dtype, 0.0
    if dtype == "float32":
        return
    original = copy.deepcopy(model)
    u, target = ([network.encoder(part) for part in x.split(BATCH)] for network in (model, original))
    for block, whole in zip(model.layers(), original.layers(), strict=True):
        mixing = block.mixing
        count, size = 0, len(mixing.columns) + 1
        gram = torch.zeros(size, size, dtype=torch.float64)
        cross = torch.zeros(size, len(mixing.weight), dtype=torch.float64)
        for i, (now, then) in enumerate(zip(u, target, strict=True)):
            wanted = whole.signals(then)
            both = block.signals(now).g, wanted.g
            g, of_whole = (signal[..., mixing.columns].flatten(0, 1).double() for signal in both)
            features = torch.cat([g, torch.ones(len(g), 1, dtype=g.dtype)], dim=1)
            gram += features.T @ features
            cross += features.T @ (of_whole @ mixing.weight.double().T)
            count += len(g)
            target[i] = wanted.out
        if mixing.weight.numel():
            _round(mixing, dtype, gram / count, cross / count)
        u = [block(now) for now in u]
    difference = predict_exactly(model, shown) - predict_exactly(original, shown)
    model.rounding_error = float(difference.abs().max())


def _round(mixing: Mixing, dtype: MixingDtype, gram: Tensor, cross: Tensor) -> None:
    """``gram`` E [g 1]^T [g 1] and ``cross`` E [g 1]^T W g', g' being the unrounded network's."""
    mean, wanted = gram[-1, :-1], cross[-1]
    moments = gram[:-1, :-1] - torch.outer(mean, mean)
    together = cross[:-1] - torch.outer(mean, wanted)
    weight = mixing.weight.double()
    pull = RIDGE * moments.diagonal().mean().clamp(min=1e-30)
    refitted = torch.linalg.solve(
        moments + pull * torch.eye(len(moments), dtype=moments.dtype), together + pull * weight.T
    ).T
    if dtype == "int8":
        refitted = round_columns(refitted, moments)
    mixing.weight.copy_(refitted)
    mixing.weight.copy_(torch.from_numpy(quantised(mixing_of(mixing), dtype).values()))
    mixing.bias[mixing.stacked_rows()] += (wanted - mixing.weight.double() @ mean).to(mixing.bias.dtype)
