"""Diagonalization of the rank-one channels whose diagonal form is accurate in float32.

A diagonal step is cheaper. But the eigenvectors of HiPPO-LegS are so close to linearly dependent that its residues
reach 1e6 and cancel, which float32 cannot represent (docs/import.md). The diagonal form of every channel is therefore
tested on noise with an offset, in float32.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edge_ssm.model.discretize import StepParameters, step_parameters
from edge_ssm.model.network import SSM, Array, Discretization
from edge_ssm_build.export.convert import state_slices

STEPS = 1000
"""Number of samples of the test."""
TOLERANCE = 3e-6
"""Largest error of a diagonal channel's output in float32, relative to its largest output."""
MAX_GROWTH = 1.5
"""Largest increase of the number of states, as a factor: a real eigenvalue needs as much room as a conjugate pair."""


def _response(step: StepParameters, v: Array, dtype: type[np.complexfloating]) -> Array:
    """Map inputs (T, K) to outputs (T, K) without D, in delta form as in the engines, with states of type ``dtype``."""
    delta, C, p, r = (values.astype(dtype) for values in (step.delta, step.C, step.p, step.r))
    x = np.zeros(len(delta), dtype=dtype)
    owner, first = step.owner, step.first
    inputs, beta = v.astype(x.real.dtype), step.beta.astype(x.real.dtype)
    outputs = []
    for u in inputs:
        q = 2 * np.add.reduceat(r * x, first).real + beta * u
        x = x + (delta * x + u[owner] + p * q[owner])
        outputs.append(2 * np.add.reduceat(C * x, first).real)
    return np.array(outputs)


def _diagonal(A: Array, P: Array, B: Array, C: Array) -> tuple[Array, Array] | None:
    """Return (A, C) of one channel with B = 1, or None if it has no usable diagonal form."""
    both = [np.concatenate([values, values.conj()]) for values in (A, P, B, C)]
    dense = np.diag(both[0]) - np.outer(both[1], both[1].conj())
    eigenvalues, V = np.linalg.eig(dense)
    try:
        residues = (both[3] @ V) * np.linalg.solve(V, both[2])
    except np.linalg.LinAlgError:
        return None
    size = np.abs(eigenvalues).max()
    real = np.abs(eigenvalues.imag) <= 1e-9 * size
    upper = ~real & (eigenvalues.imag > 0)
    poles = np.concatenate([eigenvalues[upper], eigenvalues[real].real])
    if len(poles) > MAX_GROWTH * len(A) or not (poles.real < 0).all() or 2 * upper.sum() + real.sum() != len(dense):
        return None
    return poles, np.concatenate([residues[upper], residues[real].real / 2])


def diagonalize(ssm: SSM, discretization: Discretization) -> SSM:
    """Return the same layer with every channel diagonal whose diagonal form is accurate in float32."""
    if ssm.P is None:
        return ssm
    slices = state_slices(ssm.pairs)
    forms = [_diagonal(*(values[states] for values in (ssm.A, ssm.P, ssm.B, ssm.C))) for states in slices]
    trial = _replace_channels(ssm, slices, forms)
    noise = np.random.default_rng(0).standard_normal((STEPS, len(slices))) + 1.0
    expected = _response(step_parameters(ssm, discretization), noise, np.complex128)
    actual = _response(step_parameters(trial, discretization), noise, np.complex64)
    error = np.abs(actual - expected).max(axis=0) / np.maximum(np.abs(expected).max(axis=0), 1e-30)
    accurate = [form if e <= TOLERANCE else None for form, e in zip(forms, error, strict=True)]
    return _replace_channels(ssm, slices, accurate)


def _replace_channels(ssm: SSM, slices: list[slice], forms: list[tuple[Array, Array] | None]) -> SSM:
    """Return the layer with each channel in its diagonal form, or unchanged if that is None."""
    assert ssm.P is not None
    columns: list[list[Array]] = [[], [], [], []]
    pairs = []
    for states, form in zip(slices, forms, strict=True):
        if form is None:
            parts = ssm.A[states], ssm.B[states], ssm.C[states], ssm.P[states]
        else:
            parts = form[0].astype(np.complex128), np.ones_like(form[1]), form[1], np.zeros_like(form[1])
        for values, part in zip(columns, parts, strict=True):
            values.append(part)
        pairs.append(len(parts[0]))
    joined = [np.concatenate(values).astype(np.complex128) for values in columns]
    rank_one = joined[3] if joined[3].any() else None
    return replace(ssm, pairs=np.array(pairs, dtype=np.int64), A=joined[0], B=joined[1], C=joined[2], P=rank_one)
