"""Reduction of the number of states without retraining: three scores that drop modes, and a fit in the H2 norm.

All methods work on discrete poles a = exp(p) and residues c, which give a channel's impulse response
K[l] = 2 Re(sum c exp(p l)) + d [l = 0].

- ``modal`` drops the modes with the least energy, |c|^2 / (1 - |a|^2).
- ``last`` (arXiv 2411.02824) drops by the H-infinity norm of each mode, |c| / (1 - |a|), relative to the sum of the
  larger ones in the layer.
- ``aire`` (arXiv 2602.00534) drops by the energy of each mode's impulse response, normalised in the same way.
- ``h2`` (after arXiv 2507.10078) fits new poles and residues for every channel and number of pairs. The fit minimises
  the output error for an input with the power spectrum that the channel has on calibration data (for white noise this
  is the H2 norm), by damped Gauss-Newton from a Hankel start. A rank-one channel becomes diagonal.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_ssm.errors import UsageError
from edge_ssm_build.pruning.calibration import Statistics
from edge_ssm_build.training.network import SSM, Block, SSMNetwork

Reduction = Callable[[SSMNetwork, list[Statistics], int, int], None]
"""Function of (model, statistics, length, total) that reduces a network in place, as ``reduce`` does."""
Increase = tuple[float, int, int, int, int]
"""Increase of a channel's pairs: negative gain per pair, layer, channel, pairs before, pairs after."""
ITERATIONS = 25
"""Iterations of the fit."""
RIDGE = 1e-6
"""Penalty on the power of each single mode, relative to the target's. Without it two poles can meet, and their residues
then grow without bound with opposite signs, which float32 cannot represent."""


@dataclass(frozen=True)
class Modes:
    """Discrete poles and residues of K channels with M pairs each."""

    p: Tensor
    """Logarithm of the pole, shape (K, M), complex128, Re p < 0."""
    c: Tensor
    """Residue, shape (K, M), complex128."""
    d: Tensor
    """Term that is added to the K[0] of the modes, shape (K,), float64."""


def impulse_response(modes: Modes, length: int) -> Tensor:
    """Return the impulse response of each channel, shape (K, length), float64."""
    response = 2 * (modes.c[..., None] * torch.exp(modes.p[..., None] * torch.arange(length))).real.sum(dim=1)
    response[:, 0] += modes.d
    return response


def _modes_of(ssm: SSM) -> Modes:
    """Return the modes of a diagonal kernel. Removed states have c = 0."""
    A = torch.complex(-torch.exp(ssm.log_A_real.double()), ssm.A_imag.double())
    dt = torch.exp(ssm.log_dt.double())[:, None]
    C = torch.view_as_complex(ssm.C.double()) * ssm.kept
    if ssm.discretization == "zoh":
        p, c = dt * A, C * torch.expm1(dt * A) / A
    else:
        half = dt * A / 2
        p, c = torch.log((1 + half) / (1 - half)), C * dt / (1 - half)
    return Modes(p, c, torch.zeros(len(p), dtype=torch.float64))


def _install(ssm: SSM, modes: Modes, pairs: Tensor) -> None:
    """Write the first ``pairs`` modes of each channel back as continuous parameters, in place; d is added to D."""
    dt = torch.exp(ssm.log_dt.double())[:, None]
    if ssm.discretization == "zoh":
        A = modes.p / dt
        C = modes.c * A / torch.expm1(modes.p)
    else:
        a = torch.exp(modes.p)
        # A pole at -1 has no bilinear counterpart, but the fit keeps all poles inside the unit circle.
        A = 2 / dt * (a - 1) / (a + 1)
        C = modes.c * (1 - dt * A / 2) / dt
    kept = torch.arange(modes.p.shape[1]) < pairs[:, None]
    if ssm.rank_one:
        C = C * (1 - torch.exp(modes.p * ssm.l_kernel))
        ssm.B = torch.nn.Parameter(torch.view_as_real(torch.ones_like(A)).float())
        ssm.P = torch.nn.Parameter(torch.view_as_real(torch.zeros_like(A)).float())
    A = torch.where(kept, A, torch.full_like(A, -0.5))
    C = torch.where(kept, C, torch.zeros_like(C))
    ssm.log_A_real = torch.nn.Parameter(torch.log(-A.real).float())
    ssm.A_imag = torch.nn.Parameter(A.imag.float())
    ssm.C = torch.nn.Parameter(torch.view_as_real(C.contiguous()).float())
    ssm.D.data[ssm.active] += modes.d.float()
    ssm.pairs = pairs.clone()
    ssm.kept = kept
    ssm.shrink()


# --- dropping modes --------------------------------------------------------------------------------------------


def _mode_scores(modes: Modes, kept: Tensor, method: str) -> Tensor:
    """Return a score per mode, shape (K, M): the higher, the more is lost by dropping it."""
    radius = torch.exp(modes.p.real)
    if method == "last":
        score = (modes.c.abs() / (1 - radius)).square()
    else:
        score = modes.c.abs().square() / (1 - radius.square())
    score = torch.where(kept, score, torch.zeros_like(score))
    if method == "modal":
        return score
    # Share of the cumulative sum over the larger ones in the layer: comparable between layers (LAST, eq. 9).
    flat, order = torch.sort(score.flatten(), descending=True, stable=True)
    shares = torch.empty_like(flat)
    shares[order] = flat / torch.cumsum(flat, dim=0).clamp_min(1e-300)
    return shares.reshape(score.shape)


def _drop_modes(model: SSMNetwork, total: int, method: str) -> None:
    """Keep the ``total`` pairs with the highest scores, at least one per channel."""
    ranked = []
    per_layer = [_modes_of(ssm) for ssm in model.ssms()]
    for layer, (ssm, modes) in enumerate(zip(model.ssms(), per_layer, strict=True)):
        scores = _mode_scores(modes, ssm.kept, method)
        best = scores.argmax(dim=1)
        for k, m in ssm.kept.nonzero().tolist():
            ranked.append((bool(m != best[k]), -scores[k, m].item(), layer, k, m))
    chosen: list[dict[int, list[int]]] = [{} for _ in per_layer]
    for _, _, layer, k, m in sorted(ranked)[:total]:
        chosen[layer].setdefault(k, []).append(m)
    for ssm, modes, keep in zip(model.ssms(), per_layer, chosen, strict=True):
        if not keep:
            continue
        pairs = torch.tensor([len(keep[k]) for k in range(len(ssm.active))])
        p = torch.full((len(pairs), int(pairs.max())), -1.0 + 0j, dtype=torch.complex128)
        c = torch.zeros_like(p)
        for k, indices in keep.items():
            p[k, : len(indices)], c[k, : len(indices)] = modes.p[k, sorted(indices)], modes.c[k, sorted(indices)]
        _install(ssm, Modes(p, c, modes.d), pairs)


# --- the H2-optimal fit ----------------------------------------------------------------------------------------


class HankelStart:
    """Initial poles of the fit: those of the balanced reduction by each channel's Hankel matrix (Kung 1978).

    ``kernel`` holds the impulse responses, shape (K, T), float64.
    """

    def __init__(self, kernel: Tensor) -> None:
        self.kernel = kernel.numpy()
        self.half = min((kernel.shape[1] - 1) // 2, 128)
        rows = np.arange(self.half)
        self.U, self.S, _ = np.linalg.svd(self.kernel[:, 1 + rows[:, None] + rows])

    def poles(self, pairs: int) -> Tensor:
        """Return the logarithms of the poles, shape (K, pairs), complex128."""
        order = max(1, min(2 * pairs, self.half - 1))
        starts = []
        for u, s, kernel in zip(self.U, self.S, self.kernel, strict=True):
            basis = u[:, :order] * np.sqrt(s[:order])
            step = np.linalg.lstsq(basis[:-1], basis[1:], rcond=None)[0]
            poles = np.linalg.eigvals(step)
            poles = poles[poles.imag >= 0]
            poles = np.clip(np.abs(poles), 0.05, 0.9995) * np.exp(1j * np.angle(poles))
            poles = poles[np.argsort(-_energy(poles, kernel), kind="stable")][:pairs]
            spare = 0.5 * np.exp(1j * np.pi * (np.arange(pairs - len(poles)) + 0.5) / max(1, pairs))
            starts.append(np.log(np.concatenate([poles, spare])))
        return torch.from_numpy(np.stack(starts))


def _energy(poles: Any, kernel: Any) -> Any:
    """Return the energy of each pole in the least-squares fit of all poles to the impulse response (T,)."""
    powers = poles[:, None] ** np.arange(1, len(kernel))
    columns = np.concatenate([powers.real, powers.imag])
    residues = np.linalg.lstsq(columns.T, kernel[1:], rcond=1e-8)[0].reshape(2, -1)
    return (residues**2).sum(axis=0) / (1 - np.abs(poles) ** 2)


def _columns(p: Tensor, c: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the derivatives of the response by (Re c, Im c) and by (Re p, Im p), each (K, 2 M, length)."""
    power = torch.exp(p[..., None] * torch.arange(length))
    slope = c[..., None] * power * torch.arange(length)
    residues = torch.cat([2 * power.real, -2 * power.imag], dim=1)
    poles = torch.cat([2 * slope.real, -2 * slope.imag], dim=1)
    return residues, poles


class Fit:
    """Damped Gauss-Newton (Levenberg, Marquardt) on the poles and residues of K channels at once.

    ``kernel`` holds the impulse responses to fit, shape (K, T); ``weight`` the input's power at the frequencies of 2 T
    samples, shape (K, T + 1).
    """

    def __init__(self, kernel: Tensor, weight: Tensor) -> None:
        self.kernel, self.weight = kernel, weight
        self.length = kernel.shape[1]

    def weighted(self, response: Tensor) -> Tensor:
        """Map responses (K, n, T) to (K, n, 2 T + 2), real, whose squared norm is the power of the output."""
        spectrum = torch.fft.rfft(response, n=2 * self.length) * self.weight.sqrt()[:, None]
        return torch.cat([spectrum.real, spectrum.imag], dim=-1)

    def target(self) -> Tensor:
        """Return the weighted impulse responses to fit, shape (K, 2 T + 2)."""
        return self.weighted(self.kernel[:, None])[:, 0]

    def solve_residues(self, p: Tensor) -> tuple[Modes, Tensor, Tensor]:
        """Solve for the best residues of the poles (K, M).

        Returns
        -------
        tuple
            The modes, their error power relative to the target's (K,), and the same with the penalty (K,).
        """
        impulse = torch.zeros_like(self.kernel)[:, None]
        impulse[..., 0] = 1
        columns, _ = _columns(p, torch.zeros_like(p), self.length)
        J, target = self.weighted(torch.cat([columns, impulse], dim=1)), self.target()
        x = _solve(J, target, torch.full((len(p),), RIDGE, dtype=torch.float64))
        power = target.square().sum(dim=1).clamp_min(1e-300)
        error = (target - (x[:, None] @ J)[:, 0]).square().sum(dim=1) / power
        alone = (x.square() * J.square().sum(dim=2)).sum(dim=1) / power
        m = p.shape[1]
        return Modes(p, torch.complex(x[:, :m], x[:, m : 2 * m]), x[:, -1]), error, error + RIDGE * alone

    def run(self, p: Tensor) -> tuple[Modes, Tensor]:
        """Fit from the initial poles (K, M); return the modes and their error power relative to the target's (K,)."""
        best, error, cost = self.solve_residues(p)
        damping = torch.full((len(p),), 1e-2, dtype=torch.float64)
        m = p.shape[1]
        impulse = torch.zeros_like(self.kernel)[:, None]
        impulse[..., 0] = 1
        for _ in range(ITERATIONS):
            columns, poles = _columns(best.p, best.c, self.length)
            J = self.weighted(torch.cat([columns, poles, impulse], dim=1))
            residual = self.target() - self.weighted(impulse_response(best, self.length)[:, None])[:, 0]
            step = _solve(J, residual, damping)
            moved = best.p + torch.complex(step[:, 2 * m : 3 * m], step[:, 3 * m : 4 * m])
            moved = torch.complex(moved.real.clamp(-3.0, -2e-4), moved.imag.clamp(-torch.pi, torch.pi))
            trial, trial_error, trial_cost = self.solve_residues(moved)
            better = trial_cost < cost
            best = Modes(
                torch.where(better[:, None], trial.p, best.p),
                torch.where(better[:, None], trial.c, best.c),
                torch.where(better, trial.d, best.d),
            )
            error, cost = torch.where(better, trial_error, error), torch.where(better, trial_cost, cost)
            damping = torch.where(better, damping / 3, damping * 4).clamp(1e-9, 1e6)
        return best, error


def _solve(J: Tensor, residual: Tensor, damping: Tensor) -> Tensor:
    """Return argmin_x |residual - x J|^2 + damping |x|^2, with columns scaled: (K, n, F), (K, F), (K,) -> (K, n)."""
    norm = J.square().sum(dim=2).sqrt()
    # A vanishing column, such as that of the imaginary residue of a real pole, gets the solution zero.
    norm = torch.where(norm > 1e-4 * norm.amax(dim=1, keepdim=True), norm, torch.inf)
    J = J / norm[..., None]
    gram = J @ J.transpose(1, 2) + (damping[:, None, None] + 1e-12) * torch.eye(J.shape[1], dtype=J.dtype)
    solved: Tensor = torch.linalg.solve(gram, (J @ residual[..., None]))[..., 0] / norm
    return solved


def orders(largest: int) -> list[int]:
    """Return the numbers of pairs to try, ascending, below ``largest``."""
    return [r for r in (1, 2, 3, 4, 6, 8, 12, 16, 24) if r < largest]


def fit_layer(ssm: SSM, statistics: Statistics, length: int) -> tuple[dict[int, tuple[Modes, Tensor]], Tensor]:
    """Return the fits of a layer, by number of pairs, and each channel's output power without D, shape (K,)."""
    kernel = ssm.kernel(length).detach().double()
    weight = statistics.spectrum[ssm.active] + 1e-6 * statistics.spectrum[ssm.active].mean(dim=1, keepdim=True)
    fit = Fit(kernel, weight)
    fits = {}
    most = int(ssm.pairs.max()) if len(ssm.pairs) else 0
    start = HankelStart(kernel) if len(ssm.pairs) else None
    for r in orders(most):
        assert start is not None
        fits[r] = fit.run(start.poles(r))
    return fits, fit.target().square().sum(dim=1)


def _reduce_h2(model: SSMNetwork, statistics_by_layer: list[Statistics], length: int, total: int) -> None:
    """Assign ``total`` pairs to the channels where they reduce the weighted output error most, at least one each."""
    layers = []
    queue: list[Increase] = []
    chosen: list[list[int]] = []
    for i, (block, statistics) in enumerate(zip(model.layers(), statistics_by_layer, strict=True)):
        ssm = block.ssm
        fits, power = fit_layer(ssm, statistics, length)
        worth = power * _importance(block, statistics)[ssm.active]
        mean = worth.mean().clamp_min(1e-300) if len(worth) else torch.ones(())
        errors = {r: (error * worth / mean).tolist() for r, (_, error) in fits.items()}
        layers.append((fits, errors))
        chosen.append([min([1, *errors], default=1) if errors else int(n) for n in ssm.pairs.tolist()])
        for k in range(len(ssm.active)):
            _push(queue, errors, int(ssm.pairs[k]), i, k, chosen[i][k])
    spent = sum(sum(pairs) for pairs in chosen)
    while queue:
        _, i, k, before, after = heapq.heappop(queue)
        if before != chosen[i][k] or spent + after - before > total:
            continue
        spent += after - before
        chosen[i][k] = after
        _push(queue, layers[i][1], int(model.ssms()[i].pairs[k]), i, k, after)
    for ssm, (fits, _), pairs in zip(model.ssms(), layers, chosen, strict=True):
        _install_fits(ssm, fits, pairs)


def _importance(block: Block, statistics: Statistics) -> Tensor:
    """Return the relative sensitivity of the loss to an error of each channel's output, shape (H,)."""
    return statistics.slope / statistics.slope.mean().clamp_min(1e-300)


def _push(queue: list[Increase], errors: dict[int, list[float]], full: int, i: int, k: int, current: int) -> None:
    """Queue the increase of the pairs of channel k in layer i with the largest gain per pair.

    ``errors`` holds each channel's error by number of pairs; with its ``full`` number of pairs a channel has no error.
    """
    if current >= full:
        return
    options = [(pairs, errors[pairs][k]) for pairs in errors if current < pairs < full] + [(full, 0.0)]
    error_now = errors[current][k] if current in errors else 0.0
    gain, fewer = max(((error_now - error) / (pairs - current), -pairs) for pairs, error in options)
    heapq.heappush(queue, (-gain, i, k, current, -fewer))


def _install_fits(ssm: SSM, fits: dict[int, tuple[Modes, Tensor]], pairs: list[int]) -> None:
    """Write the fits to the layer. Channels that keep all their pairs are unchanged, including their rank-one term."""
    changed = [k for k, n in enumerate(pairs) if n < int(ssm.pairs[k])]
    if not changed:
        return
    widest = max(pairs)
    before = {
        name: getattr(ssm, name).detach().clone()
        for name in ("log_A_real", "A_imag", "C", "P", "B")
        if hasattr(ssm, name)
    }
    k = len(pairs)
    p = torch.full((k, widest), -1.0 + 0j, dtype=torch.complex128)
    c, d = torch.zeros_like(p), torch.zeros(k, dtype=torch.float64)
    for channel in changed:
        n = pairs[channel]
        modes, _ = fits[n]
        p[channel, :n], c[channel, :n], d[channel] = modes.p[channel], modes.c[channel], modes.d[channel]
    _install(ssm, Modes(p, c, d), torch.tensor(pairs))
    with torch.no_grad():
        for channel in set(range(k)) - set(changed):
            for name, values in before.items():
                getattr(ssm, name)[channel] = values[channel, : getattr(ssm, name).shape[1]]


@torch.no_grad()
def reduce(model: SSMNetwork, statistics: list[Statistics], length: int, total: int, method: str) -> None:
    """Reduce the network, in place, to ``total`` conjugate pairs.

    Parameters
    ----------
    model
        The network to change.
    statistics
        Statistics of every block.
    length
        Samples per window.
    total
        Number of pairs in all channels.
    method
        One of ``METHODS``.

    Raises
    ------
    UsageError
        If ``total`` is less than one pair per channel, or the method drops modes and the kernel is not diagonal.
    """
    channels = sum(len(ssm.active) for ssm in model.ssms())
    present = sum(int(ssm.pairs.sum()) for ssm in model.ssms())
    if total < channels:
        raise UsageError(f"states: {total} pairs for {channels} channels; each keeps at least one, remove fewer")
    if total >= present:
        return
    if method != "h2" and model.config.kernel == "s4":
        raise UsageError(f"states {method!r}: needs a diagonal kernel; h2 reduces s4 as well")
    METHODS[method](model, statistics, length, total)


def _dropping(method: str) -> Reduction:
    """Return the reduction that drops modes by one of the scores."""
    return lambda model, statistics, length, total: _drop_modes(model, total, method)


METHODS: dict[str, Reduction] = {
    "modal": _dropping("modal"),
    "last": _dropping("last"),
    "aire": _dropping("aire"),
    "h2": _reduce_h2,
}
"""Every reduction by its name."""
