"""Continuous (A, B, dt) to the parameters of one step.

    x_k = Abar x_{k-1} + Bbar u_k,   y_k = 2 Re(C x_k) + D u_k

Zero-order hold (S4D, arXiv 2206.11893, eq. 4):  Abar = exp(dt A),  Bbar = (Abar - 1) / A * B.
Bilinear (S4, arXiv 2111.00396, eq. 3):          Abar = (1 + dt A / 2) / (1 - dt A / 2),  Bbar = dt B / (1 - dt A / 2).

Everything here is complex128. Steps are given in the delta form, ``x += (Abar - 1) x + u``: a slow state has
Abar so near to 1 that rounding Abar itself to float32 shifts its decay by up to 1e-4 of its size, while
Abar - 1 keeps its relative precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_ssm.model.network import SSM, Array, Discretization

ComplexArray = npt.NDArray[np.complex128]


@dataclass(frozen=True)
class StepParameters:
    """One layer's recurrence, for S states of K active channels (``SSM.owner`` says whose):

        x += delta * x + u                     (plus the rank-one term p q, where a channel has one)
        q  = 2 Re(sum(r x)) + beta u           with x before the update; sums run over a channel's own states
        y  = 2 Re(sum(C x))

    Each state is scaled by its own Bbar, which is folded into C, so that a state of any engine means the same thing.
    """

    delta: ComplexArray
    """(S,), the diagonal of Abar - 1."""
    C: ComplexArray
    """(S,), C * Bbar."""
    p: ComplexArray
    """(S,), 0 where a channel is diagonal."""
    r: ComplexArray
    """(S,)"""
    beta: npt.NDArray[np.float64]
    """(K,)"""
    pairs: npt.NDArray[np.int64]
    """(K,), states of each channel."""
    rank_one: npt.NDArray[np.bool_]
    """(K,)"""

    @property
    def owner(self) -> npt.NDArray[np.int64]:
        """(S,): to which of the K channels each state belongs."""
        return np.repeat(np.arange(len(self.pairs)), self.pairs)

    @property
    def first(self) -> npt.NDArray[np.int64]:
        """(K,): where the states of each channel begin."""
        return np.cumsum(self.pairs) - self.pairs


def zoh_delta(dt_A: ComplexArray) -> ComplexArray:
    """Abar - 1 = exp(dt A) - 1, without the cancellation of computing exp first. Any shape."""
    result: ComplexArray = np.expm1(dt_A)
    return result


def bilinear_delta(dt_A: ComplexArray) -> ComplexArray:
    """Abar - 1 = dt A / (1 - dt A / 2). Any shape."""
    return dt_A / (1 - dt_A / 2)


def step_parameters(ssm: SSM, discretization: Discretization) -> StepParameters:
    """Parameters of one step of the layer's active channels."""
    dt = ssm.dt[ssm.owner]
    dt_A: ComplexArray = (dt * ssm.A).astype(np.complex128)
    if discretization == "zoh":
        delta = zoh_delta(dt_A)
        Bbar: ComplexArray = delta / ssm.A * ssm.B
    else:
        delta = bilinear_delta(dt_A)
        Bbar = dt * ssm.B / (1 - dt_A / 2)
    if ssm.P is None or not ssm.rank_one.any():
        nothing: ComplexArray = np.zeros_like(delta)
        k = len(ssm.pairs)
        return StepParameters(delta, ssm.C * Bbar, nothing, nothing, np.zeros(k), ssm.pairs, np.zeros(k, dtype=bool))
    return _rank_one_parameters(ssm, ssm.P, delta, dt)


def _rank_one_parameters(ssm: SSM, P: ComplexArray, delta: ComplexArray, dt: Array) -> StepParameters:
    """The bilinear step of A - P P*, written as a diagonal and one rank-one term of a real inner product.

    x += dt (I - dt/2 (A - P P*))^-1 ((A - P P*) x + B u), the inverse by Sherman and Morrison: with
    E = 1 / (1 - dt/2 A), kappa = P* E P, c = (dt/2) / (1 + kappa dt/2) and s = P* x

        x += dt E (A x + B u) - dt E P q,   q = (1 - c kappa) s + c P* E (A x + B u)

    where every product with P* is a real number, being a sum over conjugate pairs.
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
    # A state whose B is 0 can't be scaled by it; a tiny B serves, its share of the output being as tiny.
    Bbar = np.where(Bbar == 0, 1e-12, Bbar).astype(np.complex128)
    C: ComplexArray = (ssm.C * Bbar).astype(np.complex128)
    return StepParameters(delta, C, -dt * E * P / Bbar, r * Bbar, beta, ssm.pairs, ssm.rank_one)


def gap_power(delta: ComplexArray, k: int) -> ComplexArray:
    """Abar^k from a diagonal Abar - 1. Any shape."""
    Abar = 1 + delta
    with np.errstate(divide="ignore", invalid="ignore"):
        power: ComplexArray = np.exp(k * np.log1p(delta))
    # A bilinear step can have Abar = 0, whose logarithm does not exist; k is at least 1 here.
    result: ComplexArray = np.where(Abar == 0, 0, power)
    return result


GAP_STEPS = 256
"""Up to so many samples a gap of a rank-one channel is stepped over; past it a matrix power is cheaper."""


def decayed(step: StepParameters, x: ComplexArray, k: int) -> ComplexArray:
    """What a gap of ``k`` samples without input makes of a state: Abar^k x. (..., S) -> (..., S)."""
    result: ComplexArray = x * gap_power(step.delta, k)
    for channel in np.flatnonzero(step.rank_one):
        states = slice(step.first[channel], step.first[channel] + step.pairs[channel])
        result[..., states] = _rank_one_decayed(step.delta[states], step.p[states], step.r[states], x[..., states], k)
    return result


def _rank_one_decayed(delta: ComplexArray, p: ComplexArray, r: ComplexArray, x: ComplexArray, k: int) -> ComplexArray:
    """One channel's, (..., M) -> (..., M)."""
    if k <= GAP_STEPS:
        for _ in range(k):
            x = x + delta * x + p * (2 * (r * x).sum(axis=-1, keepdims=True).real)
        return x
    # Over both halves of the spectrum the real inner product is a plain one.
    p, r = np.concatenate([p, p.conj()]), np.concatenate([r, r.conj()])
    step = np.eye(len(p)) + np.diag(np.concatenate([delta, delta.conj()])) + np.outer(p, r)
    both = np.concatenate([x, x.conj()], axis=-1) @ np.linalg.matrix_power(step, k).T
    result: ComplexArray = both[..., : x.shape[-1]]
    return result
