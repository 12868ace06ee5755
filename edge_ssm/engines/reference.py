"""The reference engine: NumPy, float64, one equation after another. It defines what every other engine must compute.

The names are those of S4D (arXiv 2206.11893) and S4 (arXiv 2111.00396). The input of a layer is u, its state x, its
output y; Abar, Bbar and C are the discretised parameters. ``model.network`` states the equations of a block, and
``model.discretize`` derives the parameters of a step.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from edge_ssm.engines.base import Engine, sample_error
from edge_ssm.engines.options import DEFAULT_OPTIONS, EngineOptions
from edge_ssm.model.input_range import input_range
from edge_ssm.model.network import SSM, Array, Block, Mixing, Network, Norm, TokenEncoder

_erf = np.frompyfunc(math.erf, 1, 1)


def gelu(x: Array) -> Array:
    """GELU, x Phi(x), with the exact normal distribution function Phi (Hendrycks and Gimpel, arXiv 1606.08415)."""
    Phi: Array = 0.5 * (1 + np.asarray(_erf(x / math.sqrt(2)), dtype=np.float64))
    return x * Phi


def sigmoid(x: Array) -> Array:
    """Logistic function 1 / (1 + exp(-x)), written so that it cannot overflow."""
    result: Array = 0.5 * (1 + np.tanh(0.5 * x))
    return result


def normalise(norm: Norm, u: Array) -> Array:
    """LayerNorm over the last axis (arXiv 1607.06450, biased variance), or an affine map. Shape (L, H)."""
    if norm.kind == "layer":
        centred = u - u.mean(axis=-1, keepdims=True)
        u = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + norm.eps)
    return u * norm.weight.astype(np.float64) + norm.bias


class ReferenceEngine(Engine):
    """The network in NumPy and float64, written for reading rather than for speed."""

    name: ClassVar[str] = "reference"
    dtype: ClassVar[npt.DTypeLike] = np.dtype(np.float64)

    def __init__(self, network: Network, options: EngineOptions = DEFAULT_OPTIONS) -> None:
        super().__init__(network, options)
        self._range = input_range(network)
        self._x = [np.zeros((self.lanes, len(b.ssm.A)), dtype=np.complex128) for b in network.blocks]
        self._weights = [b.mixing.values() for b in network.blocks]
        self._constants = [b.mixing.constant() for b in network.blocks]

    def _run(self, samples: Array, outputs: Array) -> None:
        network = self.network
        if self._range.bad(samples).any():
            raise sample_error(network, samples)
        z = (samples - network.input.mean) / network.input.std
        for t in range(len(samples)):
            u = self._encode(samples[t], z[t])
            for i, block in enumerate(network.blocks):
                u = self._block(i, block, u)
            outputs[t] = u @ network.decoder.weight.T.astype(np.float64) + network.decoder.bias

    def _encode(self, sample: Array, z: Array) -> Array:
        """Encode one sample: (L, d_input) -> (L, H). ``z`` is the sample after normalisation."""
        encoder = self.network.encoder
        if isinstance(encoder, TokenEncoder):
            return encoder.embedding[sample[:, 0].astype(np.int64)].astype(np.float64)
        result: Array = z @ encoder.weight.T.astype(np.float64) + encoder.bias
        return result

    def _block(self, i: int, block: Block, u: Array) -> Array:
        """One block for all lanes: (L, H) -> (L, H)."""
        v = normalise(block.norm, u) if block.norm and self.network.prenorm else u
        ssm, mixing = block.ssm, block.mixing
        y = ssm.D * v
        if len(ssm.active):
            y[:, ssm.active] += self._ssm(i, ssm, v[:, ssm.active])
        u = u + self._constants[i]
        u[:, mixing.rows] += self._mix(i, mixing, gelu(y[:, mixing.columns]))
        return normalise(block.norm, u) if block.norm and not self.network.prenorm else u

    def _mix(self, i: int, mixing: Mixing, g: Array) -> Array:
        """Position-wise linear map, with GLU (arXiv 1612.08083) if the block has it: (L, G) -> (L, R)."""
        z: Array = g @ self._weights[i].T + mixing.bias[mixing.stacked_rows()].astype(np.float64)
        if mixing.kind == "plain":
            return z
        value, gate = np.split(z, 2, axis=-1)
        gated: Array = value * sigmoid(gate)
        return gated

    def _ssm(self, i: int, ssm: SSM, u: Array) -> Array:
        """One step of the active channels' SSMs, without D: (L, K) -> (L, K).

        The recurrence of S4 (eq. 3) in delta form, with Bbar folded into C, for the stored half of the conjugate
        pairs:

            x_k = x_{k-1} + (Abar - 1) x_{k-1} + u_k [+ p q]
            y_k = 2 Re(C x_k)

        ``discretize.StepParameters`` explains the rank-one term p q.
        """
        step, x = self._step_parameters[i], self._x[i]
        first, owner = step.first, step.owner
        change = step.delta * x + u[:, owner]
        if step.rank_one.any():
            q = 2 * np.add.reduceat(step.r * x, first, axis=1).real + step.beta * u
            change += step.p * q[:, owner]
        x += change
        y: Array = 2 * np.add.reduceat(step.C * x, first, axis=1).real
        return y

    def reset(self, lane: int | None = None) -> None:
        """Set the state of one lane, or of all lanes, to zero."""
        for x in self._x:
            x[slice(None) if lane is None else lane] = 0

    def _state(self) -> tuple[Array, ...]:
        return tuple(x.copy() for x in self._x)

    def _set_state(self, state: tuple[Array, ...]) -> None:
        for x, new in zip(self._x, state, strict=True):
            x[...] = new
