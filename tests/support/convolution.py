"""The network in convolution mode, computed from the continuous parameters with none of the package's own formulas.

y = K * v + D v,   K[l] = 2 Re(sum_n C_n Bbar_n Abar_n^l)
"""

import math
from typing import Any

import numpy as np

from edge_ssm.model.network import SSM, Block, Network, Norm, TokenEncoder


def kernel(ssm: SSM, discretization: str, length: int) -> Any:
    """(K, length) float64, channel by channel, over dense matrices of both halves of the spectrum."""
    rows = []
    first = 0
    for dt, pairs in zip(ssm.dt, ssm.pairs, strict=True):
        at = slice(first, first + pairs)
        first += pairs
        A, B, C = (np.concatenate([v[at], v[at].conj()]) for v in (ssm.A, ssm.B, ssm.C))
        if discretization == "zoh":
            Abar = np.diag(np.exp(dt * A))
            Bbar = (np.exp(dt * A) - 1) / A * B
        else:
            P = np.zeros_like(A) if ssm.P is None else np.concatenate([ssm.P[at], ssm.P[at].conj()])
            dense = np.diag(A) - np.outer(P, P.conj())
            inverse = np.linalg.inv(np.eye(len(A)) - dt / 2 * dense)
            Abar, Bbar = inverse @ (np.eye(len(A)) + dt / 2 * dense), inverse @ (dt * B)
        row, x = [], Bbar
        for _ in range(length):
            row.append((C @ x).real)
            x = Abar @ x
        rows.append(row)
    return np.array(rows).reshape(len(ssm.dt), length)


def _norm(norm: Norm, u: Any) -> Any:
    if norm.kind == "layer":
        u = (u - u.mean(axis=1, keepdims=True)) / np.sqrt(u.var(axis=1, keepdims=True) + norm.eps)
    return u * norm.weight + norm.bias


def _block(block: Block, network: Network, u: Any) -> Any:
    v = _norm(block.norm, u) if block.norm and network.prenorm else u
    y = v * block.ssm.D
    for row, channel in zip(kernel(block.ssm, network.discretization, len(u)), block.ssm.active, strict=True):
        y[:, channel] += np.convolve(row, v[:, channel])[: len(u)]
    g = np.array([[0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in row] for row in y])
    mixing, h = block.mixing, u.shape[1]
    parts = 2 if mixing.kind == "glu" else 1
    full = np.zeros((parts, h, h))
    stored = mixing.weight.astype(np.float64) * (1.0 if mixing.scale is None else mixing.scale[:, None])
    for part, half in zip(full, np.split(stored, parts), strict=True):
        part[np.ix_(mixing.rows, mixing.columns)] = half
    z = g @ full.reshape(parts * h, h).T + mixing.bias
    if block.mixing.kind == "glu":
        z = z[:, :h] / (1 + np.exp(-z[:, h:]))
    u = u + z
    return _norm(block.norm, u) if block.norm and not network.prenorm else u


def outputs(network: Network, samples: Any) -> Any:
    """(T, d_input) in the sensor's units -> (T, d_output): the decoder's output for every sample."""
    if isinstance(network.encoder, TokenEncoder):
        u = network.encoder.embedding[samples[:, 0].astype(int)].astype(np.float64)
    else:
        z = (samples - network.input.mean) / network.input.std
        u = z @ network.encoder.weight.T.astype(np.float64) + network.encoder.bias
    for block in network.blocks:
        u = _block(block, network, u)
    return u @ network.decoder.weight.T.astype(np.float64) + network.decoder.bias


def pooled(network: Network, samples: Any) -> Any:
    """One window's output, (d_output,)."""
    per_sample = outputs(network, samples)
    return per_sample.mean(axis=0) if network.pooling == "mean" else per_sample[-1]
