"""The networks that are compared, and a step's parts: real arrays, from which every peer builds its own form."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from support.networks import random_network

from edge_ssm.model.discretize import step_parameters
from edge_ssm.model.network import Array, LinearEncoder, Network

SIZES = {"tiny": (8, 4, 2), "small": (64, 32, 2), "ecg": (128, 32, 4), "large": (256, 32, 6)}
"""H, N / 2, layers."""
PRUNED = (0, 50, 70)
SHAPES = [f"{name}-{percent}" if percent else name for name in SIZES if name != "tiny" for percent in PRUNED]


def network_of(shape: str) -> Network:
    """``small``, or ``small-50``: half of the operators removed, their mixing columns with them."""
    name, _, percent = shape.partition("-")
    h, pairs, layers = SIZES[name]
    left = round(h * (1 - int(percent or 0) / 100))
    return random_network(h=h, pairs=pairs, layers=layers, d_input=1, d_output=5, active=[left] * layers, columns=left)


@dataclass(frozen=True)
class Layer:
    """One block in float32: x += delta x + v[active]; y = C x + D v[active]; GELU; GLU; residual sum; LayerNorm."""

    active: Array
    """(K,) int64: the channels that have an operator, which are those that enter the mixing."""
    delta: Array
    """(2, K, N/2): real and imaginary part of Abar - 1."""
    C: Array
    """(2, K, N/2): of 2 C Bbar, the imaginary part negated, so that y is one sum of products."""
    D: Array  # (K,)
    weight: Array  # (2H, K)
    bias: Array  # (2H,)
    norm: Array
    """(2, H): weight and bias."""
    eps: float


@dataclass(frozen=True)
class Parts:
    network: Network
    h: int
    mean: Array  # (d_input,) float32
    scale: Array  # (d_input,) float32, 1 / std
    encoder: Array  # (H, d_input)
    encoder_bias: Array  # (H,)
    layers: tuple[Layer, ...]
    decoder: Array  # (d_output, H)
    decoder_bias: Array  # (d_output,)


def parts_of(network: Network) -> Parts:
    layers = []
    for block in network.blocks:
        ssm, mixing, norm = block.ssm, block.mixing, block.norm
        step = step_parameters(ssm, network.discretization)
        assert norm is not None
        assert norm.kind == "layer"
        assert mixing.kind == "glu"
        assert len(mixing.rows) == network.d_model
        assert np.array_equal(mixing.columns, ssm.active)
        k = len(ssm.active)

        def both(real: Any, imag: Any, k: int = k) -> Array:
            return np.stack([real, imag]).reshape(2, k, -1).astype(np.float32)

        delta, C = both(step.delta.real, step.delta.imag), both(2 * step.C.real, -2 * step.C.imag)
        weights = np.stack([norm.weight, norm.bias]).astype(np.float32)
        gains = ssm.D[ssm.active].astype(np.float32)
        layers.append(Layer(ssm.active, delta, C, gains, mixing.weight, mixing.bias, weights, norm.eps))
    assert isinstance(network.encoder, LinearEncoder)
    assert not network.prenorm
    return Parts(
        network,
        network.d_model,
        network.input.mean.astype(np.float32),
        (1 / network.input.std).astype(np.float32),
        network.encoder.weight,
        network.encoder.bias,
        tuple(layers),
        network.decoder.weight,
        network.decoder.bias,
    )
