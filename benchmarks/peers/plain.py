"""NumPy and JAX: the step as one would write it down, in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from edge_ssm.engines.cpu.activations import ERF
from edge_ssm.model.network import Array
from peers.parts import Parts


def _erf(x: Array) -> Array:
    """NumPy has no erf."""
    limit, (top, bottom) = ERF
    x = np.clip(x, -limit, limit)
    square = x * x
    result: Array = x * np.polyval(np.float32(top), square) / np.polyval(np.float32(bottom), square)
    return result


def numpy_step(parts: Parts) -> Callable[[Array], Array]:
    deltas = [(layer.delta[0] + 1j * layer.delta[1]).astype(np.complex64) for layer in parts.layers]
    Cs = [(layer.C[0] - 1j * layer.C[1]).astype(np.complex64) for layer in parts.layers]
    states = [np.zeros_like(delta) for delta in deltas]

    def step(sample: Array) -> Array:
        u = parts.encoder @ ((sample - parts.mean) * parts.scale).astype(np.float32) + parts.encoder_bias
        for layer, delta, C, x in zip(parts.layers, deltas, Cs, states, strict=True):
            v = u[layer.active]
            x += delta * x + v[:, None]
            y = (C * x).sum(axis=1).real + layer.D * v
            g = 0.5 * y * (1 + _erf(y * np.float32(math.sqrt(0.5))))
            value, gate = np.split(layer.weight @ g + layer.bias, 2)
            u = u + value / (1 + np.exp(-gate))
            apart = u - u.mean()
            u = apart / np.sqrt((apart * apart).mean() + np.float32(layer.eps)) * layer.norm[0] + layer.norm[1]
        result: Array = parts.decoder @ u + parts.decoder_bias
        return result

    return step


def jax_step(parts: Parts) -> Callable[[Array], Array]:
    """Jitted, its state donated: XLA may write the new one where the old one was."""
    import jax
    import jax.numpy as jnp

    def body(x: Any, sample: Any) -> Any:
        u = parts.encoder @ ((sample - parts.mean) * parts.scale) + parts.encoder_bias
        states = []
        for layer, (re, im) in zip(parts.layers, x, strict=True):
            v = u[layer.active]
            dr, di = layer.delta
            new_re = re + dr * re - di * im + v[:, None]
            new_im = im + dr * im + di * re
            states.append((new_re, new_im))
            y = (layer.C[0] * new_re + layer.C[1] * new_im).sum(axis=1) + layer.D * v
            value, gate = jnp.split(layer.weight @ jax.nn.gelu(y, approximate=False) + layer.bias, 2)
            u = u + value * jax.nn.sigmoid(gate)
            apart = u - u.mean()
            u = apart * jax.lax.rsqrt((apart * apart).mean() + layer.eps) * layer.norm[0] + layer.norm[1]
        return states, parts.decoder @ u + parts.decoder_bias

    jitted = jax.jit(body, donate_argnums=0)
    state = [tuple(jnp.zeros(layer.delta[0].shape, jnp.float32) for _ in range(2)) for layer in parts.layers]

    def step(sample: Array) -> Array:
        nonlocal state
        state, output = jitted(state, sample.astype(np.float32))
        return np.asarray(output)

    return step
