"""Derive the rational approximations of erf and tanh in edge_ssm/engines/cpu/activations.py.

    python tools/fit_rational.py

The approximations have the form f(x) = x P(x^2) / Q(x^2). They are fitted by linearised least squares on Chebyshev
nodes, with Lawson's reweighting, which converges towards the minimax solution. The script prints the coefficients,
highest power first, and the largest error of a float32 evaluation. It needs NumPy only.
"""

import math
from collections.abc import Callable

import numpy as np


def fit(f: Callable[[float], float], limit: float, p_degree: int, q_degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the coefficients of P and Q, highest power first, that approximate ``f`` on [-limit, limit]."""
    x = limit * np.cos(np.pi * (np.arange(4000) + 0.5) / 8000)  # (0, limit)
    y = np.array([f(v) for v in x]) / x
    s = x * x
    lawson, q = np.ones_like(x), np.ones_like(x)
    best = (np.inf, np.zeros(1), np.zeros(1))
    for _ in range(60):
        weight = np.sqrt(lawson) * x / q
        columns = [s**i for i in range(p_degree + 1)] + [-y * s**i for i in range(1, q_degree + 1)]
        scale = [np.abs(c * weight).max() for c in columns]
        matrix = np.stack([c / k for c, k in zip(columns, scale, strict=True)], axis=1) * weight[:, None]
        solution = np.linalg.lstsq(matrix, y * weight, rcond=None)[0] / scale
        p = solution[: p_degree + 1]
        coefficients = np.concatenate([[1.0], solution[p_degree + 1 :]])
        q = np.polyval(coefficients[::-1], s)
        error = np.abs(x * (np.polyval(p[::-1], s) / q - y))
        if error.max() < best[0]:
            best = (error.max(), p, coefficients)
        lawson *= error / error.mean()
        lawson = np.maximum(lawson / lawson.max(), 1e-12)
    return best[1][::-1], best[2][::-1]


def float32_error(f: Callable[[float], float], limit: float, p: np.ndarray, q: np.ndarray) -> float:
    """Return the largest error of a float32 evaluation on [-1.5 limit, 1.5 limit], arguments being clamped."""
    x = np.linspace(-1.5 * limit, 1.5 * limit, 400_001).astype(np.float32)
    c = np.clip(x, -np.float32(limit), np.float32(limit))
    s = c * c
    num, den = np.full_like(s, p[0]), np.full_like(s, q[0])
    for a in p[1:]:
        num = num * s + np.float32(a)
    for a in q[1:]:
        den = den * s + np.float32(a)
    return float(np.abs(c * num / den - np.array([f(float(v)) for v in x])).max())


if __name__ == "__main__":
    for name, f, limit, p_degree, q_degree in (("erf", math.erf, 3.9, 6, 4), ("tanh", math.tanh, 8.6, 4, 4)):
        p, q = fit(f, limit, p_degree, q_degree)
        print(f"{name}: limit {limit}, largest float32 error {float32_error(f, limit, p, q):.1e}")
        for label, values in (("P", p), ("Q", q)):
            print(f"  {label} = ({', '.join(f'{v:.9e}' for v in values)})")
