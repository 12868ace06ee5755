"""Importance of operators: the scores, and the budgets that distribute a rate over the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edge_ssm.errors import UsageError
from edge_ssm_build.pruning.calibration import Statistics
from edge_ssm_build.training.network import Block

Bypass = Literal["identity", "gain", "zero"]
BYPASSES: tuple[Bypass, ...] = ("identity", "gain", "zero")
Budget = Literal["depth", "uniform", "global"]
BUDGETS: tuple[Budget, ...] = ("depth", "uniform", "global")


@dataclass(frozen=True)
class Measured:
    """One block and its statistics: the input of a score."""

    block: Block
    statistics: Statistics
    bypass: Bypass
    """What a removed channel becomes. A score rates the difference between the operator and that."""
    length: int
    """Samples per window."""

    def error(self) -> Tensor:
        """Return the mean squared difference between operator and bypass, shape (H,)."""
        s = self.statistics
        return {"identity": s.identity_error, "gain": s.gain_error, "zero": s.deviation}[self.bypass]

    def column_power(self) -> Tensor:
        """Return the squared norm of each channel's mixing column, shape (H,); 0 if it is removed."""
        power = torch.zeros(len(self.statistics.gain), dtype=torch.float64)
        power[self.block.mixing.columns] = self.block.mixing.weight.detach().double().square().sum(dim=0)
        return power


Score = Callable[[Measured], Tensor]
"""Function that returns a score per channel, shape (H,): the higher, the more is lost by removing the operator.
Entries of channels without an operator have no meaning."""


def magnitude(m: Measured) -> Tensor:
    """Return the norm of the operator's output weights C and D. It does not depend on data."""
    ssm = m.block.ssm
    power = ssm.D.detach().double().square()
    C = (ssm.C.detach() * ssm.kept[..., None]).double().square().sum(dim=(1, 2))
    return power.index_add(0, ssm.active, C).sqrt()


def taylor(m: Measured) -> Tensor:
    """Return the first-order change of the loss by the bypass, squared (arXiv 1906.10771)."""
    s = m.statistics
    return {"identity": s.taylor_identity, "gain": s.taylor_gain, "zero": s.taylor_zero}[m.bypass]


def energy(m: Measured) -> Tensor:
    """Return the output energy of operator minus bypass on calibration data, weighted by the mixing column."""
    return m.error() * m.column_power()


def sensitivity(m: Measured) -> Tensor:
    """Return that energy weighted by the mean squared slope of the loss: a diagonal second-order estimate."""
    return m.error() * m.statistics.slope


def _impulse_responses(m: Measured) -> Tensor:
    """Return the impulse responses of operator minus static bypass over one window, shape (K, T), float64."""
    ssm = m.block.ssm
    kernel = ssm.kernel(m.length).detach().double()
    s = m.statistics
    static = {"identity": torch.ones_like(s.gain), "gain": s.gain, "zero": torch.zeros_like(s.gain)}[m.bypass]
    kernel[:, 0] += (ssm.full_D().detach().double() - static)[ssm.active]
    return kernel


def h2(m: Measured) -> Tensor:
    """Return the squared H2 norm of operator minus bypass: the output energy for white noise of the input's power."""
    active, power = m.block.ssm.active, m.statistics.input_power * m.column_power()
    norm = _impulse_responses(m).square().sum(dim=1).sqrt()
    result = torch.zeros_like(power)
    result[active] = norm.square() * power[active]
    return result


SCORES: dict[str, Score] = {
    "magnitude": magnitude,
    "taylor": taylor,
    "energy": energy,
    "sensitivity": sensitivity,
    "h2": h2,
}
"""Every score by its name."""


def allocate(h: int, layers: int, total: int, budget: Budget, start: Sequence[int] | None = None) -> list[int]:
    """Distribute ``total`` removed operators over the layers, at most h - 1 per layer.

    The "depth" budget is S4oP's law: the share of layer i is proportional to 2^i for i > 0, and layer 0 gets only the
    remainder when the others are full. Operators are assigned one at a time to the layer that lags furthest behind its
    share, so that a larger total never removes fewer operators from a layer than a smaller one.

    Parameters
    ----------
    h, layers
        Channels per layer and number of layers.
    total
        Number of removed operators in the network.
    budget
        "depth", or "uniform" for equal shares.
    start
        Number already removed from each layer.

    Returns
    -------
    list
        Number of removed operators of each layer.

    Raises
    ------
    UsageError
        If a layer would become empty.
    """
    weights = [0.0 if i == 0 and layers > 1 else 2.0**i for i in range(layers)] if budget == "depth" else [1.0] * layers
    removed = list(start) if start is not None else [0] * layers
    for _ in range(total - sum(removed)):
        open_layers = [i for i in range(layers) if removed[i] < h - 1]
        weighted = [i for i in open_layers if weights[i] > 0] or open_layers
        if not weighted:
            raise UsageError(
                f"rate: removing {total} of {h * layers} operators would empty a layer; at least one stays in each"
            )
        chosen = min(weighted, key=lambda i: ((removed[i] + 1) / (weights[i] or 1.0), -i))
        removed[chosen] += 1
    return removed


def lowest(scores: Sequence[Tensor], candidates: Sequence[Sequence[int]], total: int, keep: int) -> list[list[int]]:
    """Choose the ``total`` channels with the lowest scores of all layers.

    Each layer's scores are divided by their mean, and at least ``keep`` channels remain in each layer. Ties go to the
    lower layer and channel, so that the choice is reproducible.

    Parameters
    ----------
    scores
        One score per channel of each layer, shape (H,).
    candidates
        Channels of each layer to choose from.
    total, keep
        Number of channels to choose, and to keep in each layer.

    Returns
    -------
    list
        The chosen channels of each layer, ascending.
    """
    ranked = []
    for i, (score, channels) in enumerate(zip(scores, candidates, strict=True)):
        selected = score[list(channels)]
        scaled = (selected / selected.mean().clamp_min(1e-300)).tolist() if len(channels) else []
        ranked += [(value, i, channel) for value, channel in zip(scaled, channels, strict=True)]
    removable = [len(channels) - keep for channels in candidates]
    chosen: list[list[int]] = [[] for _ in candidates]
    for _, i, channel in sorted(ranked):
        if total > 0 and removable[i] > 0:
            chosen[i].append(channel)
            removable[i] -= 1
            total -= 1
    return [sorted(channels) for channels in chosen]
