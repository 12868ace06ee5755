"""What pruning decisions are measured on: the signals of every block over some windows of the training split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edge_ssm_build.datasets import Dataset
from edge_ssm_build.model import SSMNetwork
from edge_ssm_build.training import Checkpoint, as_input, split_windows

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


def _signals(model: SSMNetwork, x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    """Of every block: v, y, g, z (windows, T, H) float64 and the loss's gradients dy, dg, dz."""
    found: list[dict[str, list[Tensor]]] = [{} for _ in model.layers()]
    model.eval()
    for part, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        u, traces = model.encoder(part), []
        for block in model.layers():
            trace = block.signals(u)
            for signal in (trace.y, trace.g, trace.z):
                signal.retain_grad()
            traces.append(trace)
            u = trace.out
        nn.functional.cross_entropy(model.decide(u), labels, reduction="sum").backward()
        for store, trace in zip(found, traces, strict=True):
            for name in ("v", "y", "g", "z"):
                signal = getattr(trace, name)
                store.setdefault(name, []).append(signal.detach())
                if name != "v":
                    store.setdefault("d" + name, []).append(signal.grad)
    model.zero_grad(set_to_none=True)
    return [{name: torch.cat(parts).double() for name, parts in store.items()} for store in found]


def measure(model: SSMNetwork, x: Tensor, y: Tensor) -> list[Statistics]:
    """Statistics of every block, of normalised windows (n, T, d_input) and their labels."""
    return [_statistics(**signals) for signals in _signals(model, x, y)]


def _statistics(v: Tensor, y: Tensor, g: Tensor, z: Tensor, dy: Tensor, dg: Tensor, dz: Tensor) -> Statistics:
    def mean(signal: Tensor) -> Tensor:
        return signal.mean(dim=(0, 1))

    def first_order(gradient: Tensor, difference: Tensor) -> Tensor:
        return (gradient * difference).sum(dim=1).square().mean(dim=0)

    power = mean(v * v)
    gain = mean(y * v) / power.clamp_min(1e-30)
    centre, row_centre = mean(g), mean(z)
    return Statistics(
        input_power=power,
        gain=gain,
        identity_error=mean((y - v).square()),
        gain_error=mean((y - gain * v).square()),
        mean=centre,
        deviation=mean((g - centre).square()),
        slope=mean(dy.square()),
        taylor_identity=first_order(dy, y - v),
        taylor_gain=first_order(dy, y - gain * v),
        taylor_zero=first_order(dg, g - centre),
        row_mean=row_centre,
        row_taylor=first_order(dz, z - row_centre),
        spectrum=torch.fft.rfft(v, n=2 * v.shape[1], dim=1).abs().square().mean(dim=0).T.contiguous(),
    )


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
