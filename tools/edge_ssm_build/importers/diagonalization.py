"""Which form a rank-one channel streams in: diagonal where float32 holds it, diagonal plus rank one where not.

A diagonal step costs less, but the eigenvectors of HiPPO-LegS are so nearly dependent that its residues reach 1e6 and
cancel; float32 can't hold that (docs/import.md). So every channel is tried, on noise with an offset, in float32.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edge_ssm.model.discretize import StepParameters, step_parameters
from edge_ssm.model.network import SSM, Array, Discretization

STEPS = 1000
TOLERANCE = 3e-6
"""Largest error of a diagonal channel's output in float32, over its largest output."""
MOST_STATES = 1.5
"""A real eigenvalue takes the place of a pair, so that a diagonal form may have more states: up to this many times."""


def _response(step: StepParameters, v: Array, dtype: type[np.complexfloating]) -> Array:
    """(T, K) inputs -> (T, K) outputs without D, in delta form as the engines run it, in one precision."""
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
    """(A, C) of one channel with B = 1, or None where it has no usable diagonal form."""
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
    kept = np.concatenate([eigenvalues[upper], eigenvalues[real].real])
    if len(kept) > MOST_STATES * len(A) or not (kept.real < 0).all() or 2 * upper.sum() + real.sum() != len(dense):
        return None
    return kept, np.concatenate([residues[upper], residues[real].real / 2])


def choose(ssm: SSM, discretization: Discretization) -> SSM:
    """The same layer with every channel diagonal that can be."""
    if ssm.P is None:
        return ssm
    ends = np.cumsum(ssm.pairs)
    slices = [slice(int(end - n), int(end)) for end, n in zip(ends, ssm.pairs, strict=True)]
    found = [_diagonal(*(values[at] for values in (ssm.A, ssm.P, ssm.B, ssm.C))) for at in slices]
    trial = _joined(ssm, slices, found)
    noise = np.random.default_rng(0).standard_normal((STEPS, len(slices))) + 1.0
    truth = _response(step_parameters(ssm, discretization), noise, np.complex128)
    own = _response(step_parameters(trial, discretization), noise, np.complex64)
    error = np.abs(own - truth).max(axis=0) / np.maximum(np.abs(truth).max(axis=0), 1e-30)
    kept = [form if e <= TOLERANCE else None for form, e in zip(found, error, strict=True)]
    return _joined(ssm, slices, kept)


def _joined(ssm: SSM, slices: list[slice], forms: list[tuple[Array, Array] | None]) -> SSM:
    """Diagonal forms where there is one, the channel as it was elsewhere."""
    assert ssm.P is not None
    columns: list[list[Array]] = [[], [], [], []]
    pairs = []
    for at, form in zip(slices, forms, strict=True):
        if form is None:
            parts = ssm.A[at], ssm.B[at], ssm.C[at], ssm.P[at]
        else:
            parts = form[0].astype(np.complex128), np.ones_like(form[1]), form[1], np.zeros_like(form[1])
        for values, part in zip(columns, parts, strict=True):
            values.append(part)
        pairs.append(len(parts[0]))
    joined = [np.concatenate(values).astype(np.complex128) for values in columns]
    rank_one = joined[3] if joined[3].any() else None
    number = np.array(pairs, dtype=np.int64)
    return replace(ssm, pairs=number, A=joined[0], B=joined[1], C=joined[2], P=rank_one)
