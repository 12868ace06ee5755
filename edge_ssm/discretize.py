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
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_ssm.network import SSM, Discretization

ComplexArray = npt.NDArray[np.complex128]


@dataclass(frozen=True)
class StepParameters:
    """One layer's recurrence ``x += delta * x + u;  y = 2 Re(sum(C x))``, for K active channels of M pairs.

    B is folded into C, so that a state of any engine means the same thing: x here is the S4D state over Bbar.
    """

    delta: ComplexArray
    """(K, M), Abar - 1."""
    C: ComplexArray
    """(K, M), C * Bbar."""


def zoh_delta(dt_A: ComplexArray) -> ComplexArray:
    """Abar - 1 = exp(dt A) - 1, without the cancellation of computing exp first. Any shape."""
    result: ComplexArray = np.expm1(dt_A)
    return result


def bilinear_delta(dt_A: ComplexArray) -> ComplexArray:
    """Abar - 1 = dt A / (1 - dt A / 2). Any shape."""
    return dt_A / (1 - dt_A / 2)


def step_parameters(ssm: SSM, discretization: Discretization) -> StepParameters:
    """Parameters of one step of the layer's active channels."""
    dt_A: ComplexArray = ssm.dt[:, None] * ssm.A
    if discretization == "zoh":
        delta = zoh_delta(dt_A)
        Bbar = delta / ssm.A * ssm.B
    else:
        delta = bilinear_delta(dt_A)
        Bbar = ssm.dt[:, None] * ssm.B / (1 - dt_A / 2)
    return StepParameters(delta=delta, C=ssm.C * Bbar)


def gap_power(delta: ComplexArray, k: int | npt.NDArray[Any]) -> ComplexArray:
    """Abar^k from Abar - 1: what a gap of ``k`` samples without input does to a state. Any shape."""
    Abar = 1 + delta
    with np.errstate(divide="ignore", invalid="ignore"):
        power: ComplexArray = np.exp(k * np.log1p(delta))
    # A bilinear step can have Abar = 0, whose logarithm does not exist; k is at least 1 here.
    result: ComplexArray = np.where(Abar == 0, 0, power)
    return result
