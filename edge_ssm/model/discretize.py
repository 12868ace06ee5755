"""Discretisation: from the continuous-time parameters (A, B, C, dt) to the parameters of one step.

The recurrence of one channel, in the notation of S4D (arXiv 2206.11893) and S4 (arXiv 2111.00396, eq. 3), where the
stored half of the conjugate pairs gives 2 Re:

    x_k = Abar x_{k-1} + Bbar u_k,    y_k = 2 Re(C x_k) + D u_k

Zero-order hold (S4D, section 3.1; Mamba, arXiv 2312.00752, eq. 4):

    Abar = exp(dt A),    Bbar = (dt A)^-1 (exp(dt A) - 1) dt B = (Abar - 1) / A * B

Bilinear (S4, eq. 3):

    Abar = (1 - dt A / 2)^-1 (1 + dt A / 2),    Bbar = (1 - dt A / 2)^-1 dt B

The step is computed in delta form, x += (Abar - 1) x + Bbar u. A slow state has Abar so close to 1 that rounding Abar
itself to float32 changes its decay by up to 1e-4 of its size, while Abar - 1 keeps its relative precision. Everything
in this module is complex128.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_ssm.model.network import SSM, Array, Discretization

ComplexArray = npt.NDArray[np.complex128]


@dataclass(frozen=True)
class StepParameters:
    """The recurrence of one layer: S states that belong to K active channels (``SSM.owner`` says which).

    For the input u of the channel that a state belongs to, and with sums over the states of one channel::

        q  = 2 Re(sum(r x)) + beta u           x before the update; only channels with a rank-one term
        x += delta x + u + p q
        y  = 2 Re(sum(C x))

    Every state is divided by its own Bbar, and C is multiplied by it. The input therefore enters with factor 1, and a
    state means the same in every engine.
    """

    delta: ComplexArray
    """Shape (S,): the diagonal of Abar - 1."""
    C: ComplexArray
    """Shape (S,): C Bbar."""
    p: ComplexArray
    """Shape (S,): column of the rank-one term, 0 for diagonal channels."""
    r: ComplexArray
    """Shape (S,): row of the rank-one term, 0 for diagonal channels."""
    beta: npt.NDArray[np.float64]
    """Shape (K,): share of the input in q."""
    pairs: npt.NDArray[np.int64]
    """Shape (K,): number of states of each channel."""
    rank_one: npt.NDArray[np.bool_]
    """Shape (K,): whether the channel has a rank-one term."""

    @property
    def owner(self) -> npt.NDArray[np.int64]:
        """Index of the channel that each state belongs to, shape (S,)."""
        return np.repeat(np.arange(len(self.pairs)), self.pairs)

    @property
    def first(self) -> npt.NDArray[np.int64]:
        """Index of each channel's first state, shape (K,)."""
        return np.cumsum(self.pairs) - self.pairs


def zoh_delta(dt_A: ComplexArray) -> ComplexArray:
    """Return Abar - 1 = exp(dt A) - 1, without the cancellation of exp(dt A) - 1. Any shape."""
    result: ComplexArray = np.expm1(dt_A)
    return result


def bilinear_delta(dt_A: ComplexArray) -> ComplexArray:
    """Return Abar - 1 = dt A / (1 - dt A / 2). Any shape."""
    return dt_A / (1 - dt_A / 2)


def step_parameters(ssm: SSM, discretization: Discretization) -> StepParameters:
    """Return the parameters of one step for a layer's active channels."""
    dt = ssm.dt[ssm.owner]
    dt_A: ComplexArray = (dt * ssm.A).astype(np.complex128)
    if discretization == "zoh":
        delta = zoh_delta(dt_A)
        Bbar: ComplexArray = delta / ssm.A * ssm.B
    else:
        delta = bilinear_delta(dt_A)
        Bbar = dt * ssm.B / (1 - dt_A / 2)
    if ssm.P is None or not ssm.rank_one.any():
        zeros: ComplexArray = np.zeros_like(delta)
        k = len(ssm.pairs)
        return StepParameters(delta, ssm.C * Bbar, zeros, zeros, np.zeros(k), ssm.pairs, np.zeros(k, dtype=bool))
    return _rank_one_parameters(ssm, ssm.P, delta, dt)


def _rank_one_parameters(ssm: SSM, P: ComplexArray, delta: ComplexArray, dt: Array) -> StepParameters:
    """Return the bilinear step (S4, eq. 3) of the diagonal-plus-rank-one matrix A - P P*.

    S4 computes this step in O(N) (Theorem 2). Here it is written as a diagonal map plus one rank-one term. The step is

        x += dt (I - dt/2 (A - P P*))^-1 ((A - P P*) x + B u)

    and the Sherman-Morrison formula gives the inverse. With E = 1 / (1 - dt/2 A), kappa = P* E P,
    c = (dt/2) / (1 + kappa dt/2) and s = P* x:

        x += dt E (A x + B u) - dt E P q,    q = (1 - c kappa) s + c P* E (A x + B u)

    Every product with P* is a sum over conjugate pairs, and therefore a real number.
    """
    owner, k = ssm.owner, len(ssm.pairs)

    def over_pairs(values: ComplexArray) -> npt.NDArray[np.float64]:
        total: npt.NDArray[np.float64] = np.bincount(owner, weights=2 * values.real, minlength=k).astype(np.float64)
        return total

    E = 1 / (1 - dt * ssm.A / 2)
    kappa = over_pairs(P.conj() * E * P)
    c = ssm.dt / 2 / (1 + kappa * ssm.dt / 2)
    Bbar = dt * E * ssm.B
    r = P.conj() * ((1 - c * kappa)[owner] + c[owner] * E * ssm.A)
    beta = c * over_pairs(P.conj() * E * ssm.B)
    # A state with B = 0 cannot be divided by Bbar. A tiny Bbar serves: its effect on the output is as tiny.
    Bbar = np.where(Bbar == 0, 1e-12, Bbar).astype(np.complex128)
    C: ComplexArray = (ssm.C * Bbar).astype(np.complex128)
    return StepParameters(delta, C, -dt * E * P / Bbar, r * Bbar, beta, ssm.pairs, ssm.rank_one)


def gap_power(delta: ComplexArray, k: int) -> ComplexArray:
    """Return Abar^k for a diagonal ``delta`` = Abar - 1 and k of at least 1. Any shape."""
    Abar = 1 + delta
    with np.errstate(divide="ignore", invalid="ignore"):
        power: ComplexArray = np.exp(k * np.log1p(delta))
    # A bilinear step can have Abar = 0, which has no logarithm.
    result: ComplexArray = np.where(Abar == 0, 0, power)
    return result


GAP_STEPS = 256
"""Longest gap, in samples, that rank-one channels step through; for longer gaps a matrix power is cheaper."""


def decayed(step: StepParameters, x: ComplexArray, k: int) -> ComplexArray:
    """Return Abar^k x, the state after ``k`` samples without input. Shape (..., S)."""
    result: ComplexArray = x * gap_power(step.delta, k)
    for channel in np.flatnonzero(step.rank_one):
        states = slice(step.first[channel], step.first[channel] + step.pairs[channel])
        result[..., states] = _rank_one_decayed(step.delta[states], step.p[states], step.r[states], x[..., states], k)
    return result


def _rank_one_decayed(delta: ComplexArray, p: ComplexArray, r: ComplexArray, x: ComplexArray, k: int) -> ComplexArray:
    """Return Abar^k x for one channel of M states. Shape (..., M)."""
    if k <= GAP_STEPS:
        for _ in range(k):
            x = x + delta * x + p * (2 * (r * x).sum(axis=-1, keepdims=True).real)
        return x
    # Over both halves of the spectrum, the real inner product 2 Re(r x) is a plain product.
    p, r = np.concatenate([p, p.conj()]), np.concatenate([r, r.conj()])
    step = np.eye(len(p)) + np.diag(np.concatenate([delta, delta.conj()])) + np.outer(p, r)
    both = np.concatenate([x, x.conj()], axis=-1) @ np.linalg.matrix_power(step, k).T
    result: ComplexArray = both[..., : x.shape[-1]]
    return result
