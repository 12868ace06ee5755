"""What pruning decisions are measured on: the signals of every block over some windows of the training split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edge_ssm_build.data.datasets import Dataset
from edge_ssm_build.training.checkpoint import Checkpoint
from edge_ssm_build.training.network import Signals, SSMNetwork
from edge_ssm_build.training.scoring import as_input, split_windows

MAX_WINDOWS = 256
BATCH = 32


@dataclass(frozen=True)
class Statistics:
    """Of one block, each (H,) float64 unless it says otherwise; means are over windows and samples."""

    input_power: Tensor
    """E v^2."""
    gain: Tensor
    """argmin_g E (y - g v)^2: the operator's best static gain (least squares)."""
    identity_error: Tensor
    """E (y - v)^2."""
    gain_error: Tensor
    """E (y - gain v)^2."""
    mean: Tensor
    """E g, of the channel after GELU."""
    deviation: Tensor
    """E (g - mean)^2."""
    slope: Tensor
    """E (dLoss / dy)^2."""
    taylor_identity: Tensor
    """E (sum_t dLoss/dy (y - v))^2 over windows: first-order change of the loss, squared (arXiv 1906.10771, eq. 8)."""
    taylor_gain: Tensor
    taylor_zero: Tensor
    """The same for g against its mean."""
    row_mean: Tensor
    """E z."""
    row_taylor: Tensor
    """The same for z against its mean."""
    spectrum: Tensor
    """(H, T + 1): E |DFT of v over 2 T samples|^2, the input's power by frequency."""


def windows(checkpoint: Checkpoint, data: Dataset) -> tuple[Tensor, Tensor]:
    """At most MAX_WINDOWS windows of the training split, evenly spread, and their labels."""
    x, y = split_windows(data, "train", checkpoint.recipe.window)
    chosen = torch.linspace(0, len(x) - 1, min(len(x), MAX_WINDOWS)).round().long()
    return as_input(x[chosen.numpy()], checkpoint.spec), torch.from_numpy(y)[chosen]


def measure(model: SSMNetwork, x: Tensor, y: Tensor) -> list[Statistics]:
    """Statistics of every block, of normalised windows (n, T, d_input) and their labels."""
    model.eval()
    sums = [_Sums() for _ in model.layers()]
    for part, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
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
    """What the statistics of a block are made of, a batch at a time: nothing here grows with the windows' length."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.by_window: dict[str, list[Tensor]] = {}

    def add(self, trace: Signals) -> None:
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
    """Let each mixing make the best of the channels it has left: ridge regression onto the reference's own outputs.

    Block after block, as ThiNet does for convolutions (arXiv 1707.06342): the inputs are those of the pruned network
    so far, the targets the reference's linear outputs before the gate, the pull is towards the weights at hand.
    """
    model.eval()
    reference.eval()
    u, target = model.encoder(x), reference.encoder(x)
    for block, original in zip(model.layers(), reference.layers(), strict=True):
        wanted = original.signals(target)
        mixing, full = block.mixing, original.mixing
        g = block.signals(u).g[..., mixing.columns].reshape(-1, len(mixing.columns)).double()
        stacked = mixing.stacked_rows()
        of_full = {channel: i for i, channel in enumerate(full.rows.tolist())}
        half = len(full.rows)
        at = [of_full[r] for r in mixing.rows.tolist()]
        rows = at + [a + half for a in at] if mixing.glu else at
        wide = wanted.g[..., full.columns].reshape(-1, len(full.columns)).double()
        goal = wide @ full.weight[rows].double().T + full.bias[full.stacked_rows()][rows]
        ones = torch.ones(len(g), 1, dtype=g.dtype)
        features = torch.cat([g, ones], dim=1)
        start = torch.cat([mixing.weight, mixing.bias[stacked][:, None]], dim=1).double()
        gram = features.T @ features
        pull = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        solved = torch.linalg.solve(gram + pull, features.T @ goal + pull @ start.T).T
        mixing.weight.copy_(solved[:, :-1])
        mixing.bias[stacked] = solved[:, -1].to(mixing.bias.dtype)
        u, target = block(u), wanted.out
