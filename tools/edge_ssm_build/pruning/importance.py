"""Which operators matter: scores behind one small interface, and budgets that share a rate out over layers."""

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
    """What a score may look at, of one block."""

    block: Block
    statistics: Statistics
    bypass: Bypass
    """What a removed channel becomes: the score is of the operator minus that."""
    length: int
    """Samples of a window."""

    def error(self) -> Tensor:
        """(H,): E of the squared difference between operator and bypass."""
        s = self.statistics
        return {"identity": s.identity_error, "gain": s.gain_error, "zero": s.deviation}[self.bypass]

    def column_power(self) -> Tensor:
        """(H,): squared norm of each channel's mixing column; 0 where it is removed."""
        power = torch.zeros(len(self.statistics.gain), dtype=torch.float64)
        power[self.block.mixing.columns] = self.block.mixing.weight.detach().double().square().sum(dim=0)
        return power


Score = Callable[[Measured], Tensor]
"""(H,): the higher, the more is lost with the operator. Entries of channels without one don't count."""


def magnitude(m: Measured) -> Tensor:
    """Norm of the operator's own output weights C and D: knows nothing of data."""
    ssm = m.block.ssm
    power = ssm.D.detach().double().square()
    C = (ssm.C.detach() * ssm.kept[..., None]).double().square().sum(dim=(1, 2))
    return power.index_add(0, ssm.active, C).sqrt()


def taylor(m: Measured) -> Tensor:
    """First-order change of the loss when the operator becomes its bypass: weight times gradient."""
    s = m.statistics
    return {"identity": s.taylor_identity, "gain": s.taylor_gain, "zero": s.taylor_zero}[m.bypass]


def energy(m: Measured) -> Tensor:
    """Output energy of operator minus bypass on calibration data, as the mixing sees it."""
    return m.error() * m.column_power()


def sensitivity(m: Measured) -> Tensor:
    """The same energy, weighed by the loss's mean squared slope there: a diagonal second-order estimate."""
    return m.error() * m.statistics.slope


def _system(m: Measured) -> Tensor:
    """(K, T) float64: impulse responses of operator minus static bypass, over one window."""
    ssm = m.block.ssm
    kernel = ssm.kernel(m.length).detach().double()
    s = m.statistics
    static = {"identity": torch.ones_like(s.gain), "gain": s.gain, "zero": torch.zeros_like(s.gain)}[m.bypass]
    kernel[:, 0] += (ssm.full_D().detach().double() - static)[ssm.active]
    return kernel


def _of_system(m: Measured, norm: Tensor) -> Tensor:
    power = m.statistics.input_power * m.column_power()
    result = torch.zeros_like(power)
    result[m.block.ssm.active] = norm.square() * power[m.block.ssm.active]
    return result


def h2(m: Measured) -> Tensor:
    """H2 norm of operator minus bypass: the energy that white noise of the input's power would give."""
    return _of_system(m, _system(m).square().sum(dim=1).sqrt())


SCORES: dict[str, Score] = {
    "magnitude": magnitude,
    "taylor": taylor,
    "energy": energy,
    "sensitivity": sensitivity,
    "h2": h2,
}


def allocate(h: int, layers: int, total: int, budget: Budget, start: Sequence[int] | None = None) -> list[int]:
    """How many operators each layer has lost when ``total`` are gone, at most h - 1 a layer.

    ``depth`` is S4oP's law: layer i, from 1 on, takes a share proportional to 2^i, and layer 0 only what the full
    others leave. Given one at a time to the layer that lags furthest behind its share, so that a larger total never
    gives a layer back what a smaller one took; ``start`` is where to go on from.
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
    """The ``total`` least of all layers' candidates, each layer's scores over their mean; ``keep`` stay in a layer.

    Ties go to the lower layer and channel, so that the same numbers give the same choice.
    """
    ranked = []
    for i, (score, channels) in enumerate(zip(scores, candidates, strict=True)):
        own = score[list(channels)]
        scaled = (own / own.mean().clamp_min(1e-300)).tolist() if len(channels) else []
        ranked += [(value, i, channel) for value, channel in zip(scaled, channels, strict=True)]
    left = [len(channels) - keep for channels in candidates]
    chosen: list[list[int]] = [[] for _ in candidates]
    for _, i, channel in sorted(ranked):
        if total > 0 and left[i] > 0:
            chosen[i].append(channel)
            left[i] -= 1
            total -= 1
    return [sorted(channels) for channels in chosen]
