"""Statistics of every block's signals over calibration windows, on which pruning decisions are based."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edge_ssm_build.training.network import Mixing, Signals, SSMNetwork
from edge_ssm_build.training.scoring import CALIBRATION_BATCH


@dataclass(frozen=True)
class Statistics:
    """Statistics of one block, each (H,) float64 unless stated otherwise. E is the mean over windows and samples."""

    input_power: Tensor
    """E v^2."""
    gain: Tensor
    """argmin_g E (y - g v)^2: the best static gain of the operator (least squares)."""
    identity_error: Tensor
    """E (y - v)^2."""
    gain_error: Tensor
    """E (y - gain v)^2."""
    mean: Tensor
    """E g, the mean of the channel after GELU."""
    deviation: Tensor
    """E (g - mean)^2."""
    slope: Tensor
    """E (dLoss / dy)^2."""
    taylor_identity: Tensor
    """E (sum_t dLoss/dy (y - v))^2 over windows: first-order change of the loss, squared (arXiv 1906.10771, eq. 8)."""
    taylor_gain: Tensor
    """The same for y against gain v."""
    taylor_zero: Tensor
    """The same for g against its mean."""
    row_mean: Tensor
    """E z."""
    row_taylor: Tensor
    """The same for z against its mean."""
    spectrum: Tensor
    """(H, T + 1): E |DFT of v over 2 T samples|^2, the input's power by frequency."""


def measure(model: SSMNetwork, x: Tensor, y: Tensor) -> list[Statistics]:
    """Return the statistics of every block for normalised windows (n, T, d_input) and their labels (n,)."""
    model.eval()
    sums = [_Sums() for _ in model.layers()]
    for part, labels in zip(x.split(CALIBRATION_BATCH), y.split(CALIBRATION_BATCH), strict=True):
        u, traces = model.encoder(part), []
        for block in model.layers():
            trace = block.signals(u)
            for signal in (trace.y, trace.g, trace.z):
                signal.retain_grad()
            traces.append(trace)
            u = trace.out
        nn.functional.cross_entropy(model.decide(u), labels, reduction="sum").backward()
        for total, trace in zip(sums, traces, strict=True):
            total.add(trace)
    model.zero_grad(set_to_none=True)
    return [total.statistics(len(x), x.shape[1]) for total in sums]


class _Sums:
    """Sums behind the statistics of a block, accumulated batch by batch; their memory does not grow with the window."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.by_window: dict[str, list[Tensor]] = {}

    def add(self, trace: Signals) -> None:
        """Add the signals of one batch, after the backward pass."""
        v, y, g, z = (signal.detach().double() for signal in trace[:4])
        dy, dg, dz = (_gradient(signal) for signal in (trace.y, trace.g, trace.z))
        spectrum = torch.fft.rfft(v, n=2 * v.shape[1], dim=1).abs().square().sum(dim=0)
        terms = {"vv": v * v, "yv": y * v, "yy": y * y, "g": g, "gg": g * g, "z": z, "dydy": dy * dy}
        for name, term in terms.items():
            self._total(name, term.sum(dim=(0, 1)))
        self._total("spectrum", spectrum)
        for name, term in {"y": dy * y, "v": dy * v, "g": dg * g, "dg": dg, "z": dz * z, "dz": dz}.items():
            self.by_window.setdefault(name, []).append(term.sum(dim=1))

    def _total(self, name: str, term: Tensor) -> None:
        self.totals[name] = self.totals[name] + term if name in self.totals else term

    def statistics(self, windows: int, length: int) -> Statistics:
        """Return the statistics of so many windows of so many samples."""
        mean = {name: total / (windows * length) for name, total in self.totals.items()}
        slopes = {name: torch.cat(parts) for name, parts in self.by_window.items()}

        def first_order(of: str, by: Tensor | float, other: str) -> Tensor:
            return (slopes[of] - by * slopes[other]).square().mean(dim=0)

        gain = mean["yv"] / mean["vv"].clamp_min(1e-30)
        return Statistics(
            input_power=mean["vv"],
            gain=gain,
            identity_error=(mean["yy"] - 2 * mean["yv"] + mean["vv"]).clamp_min(0),
            gain_error=(mean["yy"] - gain * mean["yv"]).clamp_min(0),
            mean=mean["g"],
            deviation=(mean["gg"] - mean["g"].square()).clamp_min(0),
            slope=mean["dydy"],
            taylor_identity=first_order("y", 1.0, "v"),
            taylor_gain=first_order("y", gain, "v"),
            taylor_zero=first_order("g", mean["g"], "dg"),
            row_mean=mean["z"],
            row_taylor=first_order("z", mean["z"], "dz"),
            spectrum=(self.totals["spectrum"] / windows).T.contiguous(),
        )


def _gradient(signal: Tensor) -> Tensor:
    assert signal.grad is not None
    return signal.grad.double()


@torch.no_grad()
def refit_mixing(model: SSMNetwork, reference: SSMNetwork, x: Tensor, ridge: float = 1e-3) -> None:
    """Refit each mixing, in place, to the reference's outputs by ridge regression on the remaining channels.

    This proceeds block by block, as ThiNet does for convolutions (arXiv 1707.06342). The inputs are those of the pruned
    and already refitted network, the targets are the linear outputs of the reference before the gate, and the penalty
    is on the distance from the current weights.

    Parameters
    ----------
    model
        The pruned network.
    reference
        The network before pruning.
    x
        Normalised windows, shape (n, T, d_input).
    ridge
        Weight of the penalty, relative to the mean square of the inputs.
    """
    model.eval()
    reference.eval()
    u, target = model.encoder(x), reference.encoder(x)
    for block, original in zip(model.layers(), reference.layers(), strict=True):
        expected = original.signals(target)
        _refit(block.mixing, original.mixing, block.signals(u).g, expected.g, ridge)
        u, target = block(u), expected.out


def _refit(mixing: Mixing, reference: Mixing, g: Tensor, g_reference: Tensor, ridge: float) -> None:
    """Refit one mixing, in place, from the mixing inputs (n, T, H) of both networks."""
    inputs = g[..., mixing.columns].reshape(-1, len(mixing.columns)).double()
    inputs_reference = g_reference[..., reference.columns].reshape(-1, len(reference.columns)).double()
    positions = {channel: i for i, channel in enumerate(reference.rows.tolist())}
    values = [positions[row] for row in mixing.rows.tolist()]
    rows = values + [i + len(reference.rows) for i in values] if mixing.glu else values
    weight = reference.weight[rows].double()
    target = inputs_reference @ weight.T + reference.bias[reference.stacked_rows()][rows]
    features = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], dim=1)
    stacked = mixing.stacked_rows()
    current = torch.cat([mixing.weight, mixing.bias[stacked][:, None]], dim=1).double()
    gram = features.T @ features
    penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram + penalty, features.T @ target + penalty @ current.T).T
    mixing.weight.copy_(solution[:, :-1])
    mixing.bias[stacked] = solution[:, -1].to(mixing.bias.dtype)
