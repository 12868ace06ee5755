"""The reference engine: NumPy, float64, one equation after another. It defines what every other engine must compute."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from edge_ssm.engines.base import Engine, refusal
from edge_ssm.model.input_range import input_range
from edge_ssm.model.network import SSM, Array, Block, Mixing, Network, Norm, TokenEncoder

_erf = np.frompyfunc(math.erf, 1, 1)


def gelu(x: Array) -> Array:
    """x * Phi(x) with the exact normal distribution (arXiv 1606.08415, eq. 1). Any shape, float64."""
    phi: Array = 0.5 * (1 + np.asarray(_erf(x / math.sqrt(2)), dtype=np.float64))
    return x * phi


def sigmoid(x: Array) -> Array:
    result: Array = 0.5 * (1 + np.tanh(0.5 * x))
    return result


def normalise(norm: Norm, u: Array) -> Array:
    """LayerNorm over the last axis (arXiv 1607.06450, biased variance) or an affine map. (lanes, H)."""
    if norm.kind == "layer":
        centred = u - u.mean(axis=-1, keepdims=True)
        u = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + norm.eps)
    return u * norm.weight.astype(np.float64) + norm.bias


class ReferenceEngine(Engine):
    name: ClassVar[str] = "reference"
    dtype: ClassVar[npt.DTypeLike] = np.dtype(np.float64)

    def __init__(self, network: Network, lanes: int = 1) -> None:
        super().__init__(network, lanes)
        self._range = input_range(network)
        self._x = [np.zeros((lanes, len(b.ssm.A)), dtype=np.complex128) for b in network.blocks]
        self._weights = [b.mixing.values() for b in network.blocks]
        self._constants = [b.mixing.constant() for b in network.blocks]

    def _run(self, samples: Array, outputs: Array) -> None:
        network = self.network
        if self._range.bad(samples).any():
            raise refusal(network, samples)
        z = (samples - network.input.mean) / network.input.std
        for t in range(len(samples)):
            u = self._encode(samples[t], z[t])
            for i, block in enumerate(network.blocks):
                u = self._block(i, block, u)
            outputs[t] = u @ network.decoder.weight.T.astype(np.float64) + network.decoder.bias

    def _encode(self, sample: Array, z: Array) -> Array:
        encoder = self.network.encoder
        if isinstance(encoder, TokenEncoder):
            return encoder.embedding[sample[:, 0].astype(np.int64)].astype(np.float64)
        result: Array = z @ encoder.weight.T.astype(np.float64) + encoder.bias
        return result

    def _block(self, i: int, block: Block, u: Array) -> Array:
        """One block for all lanes, (lanes, H) -> (lanes, H); network.py states the equations."""
        v = normalise(block.norm, u) if block.norm and self.network.prenorm else u
        ssm, mixing = block.ssm, block.mixing
        y = ssm.D * v
        if len(ssm.active):
            y[:, ssm.active] += self._ssm(i, ssm, v[:, ssm.active])
        u = u + self._constants[i]
        u[:, mixing.rows] += self._mix(i, mixing, gelu(y[:, mixing.columns]))
        return normalise(block.norm, u) if block.norm and not self.network.prenorm else u

    def _mix(self, i: int, mixing: Mixing, g: Array) -> Array:
        """(lanes, G) -> (lanes, R)."""
        z: Array = g @ self._weights[i].T + mixing.bias[mixing.stacked_rows()].astype(np.float64)
        if mixing.kind == "plain":
            return z
        value, gate = np.split(z, 2, axis=-1)
        gated: Array = value * sigmoid(gate)
        return gated

    def _ssm(self, i: int, ssm: SSM, v: Array) -> Array:
        """(lanes, K) -> (lanes, K): the recurrence of ``discretize.StepParameters`` and its output without D."""
        step, x = self._step_parameters[i], self._x[i]
        first, owner = step.first, step.owner
        change = step.delta * x + v[:, owner]
        if step.rank_one.any():
            q = 2 * np.add.reduceat(step.r * x, first, axis=1).real + step.beta * v
            change += step.p * q[:, owner]
        x += change
        result: Array = 2 * np.add.reduceat(step.C * x, first, axis=1).real
        return result

    def reset(self, lane: int | None = None) -> None:
        for x in self._x:
            x[slice(None) if lane is None else lane] = 0

    def _state(self) -> tuple[Array, ...]:
        return tuple(x.copy() for x in self._x)

    def _set_state(self, state: tuple[Array, ...]) -> None:
        for x, new in zip(self._x, state, strict=True):
            x[...] = new
