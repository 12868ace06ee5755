"""Networks derived from networks: quantised mixing weights and another sample rate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edge_ssm.errors import NetworkError
from edge_ssm.model.network import Mixing, MixingDtype, Network

MAX_RATE_CHANGE = 1000.0
"""Largest factor between a stream's sample rate and the trained one; past it a unit was mistaken."""


def quantised(mixing: Mixing, dtype: MixingDtype) -> Mixing:
    """The same map with weights of ``dtype`` and one scale a row, so that its largest weight is the type's largest.

    float16 is scaled too, to 2^14: its subnormals, which some processors flush, are then too small to matter.
    """
    values = mixing.values()
    if dtype == "float32":
        return replace(mixing, weight=values.astype(np.float32), scale=None)
    largest = np.abs(values).max(axis=1, initial=0.0)
    top = 127.0 if dtype == "int8" else 2.0**14
    # The smallest scale keeps 1 / scale within float32.
    scale = np.maximum(largest / top, 1e-30).astype(np.float32)
    scaled = values / scale.astype(np.float64)[:, None]
    weight = np.clip(np.rint(scaled), -127, 127).astype(np.int8) if dtype == "int8" else scaled.astype(np.float16)
    return replace(mixing, weight=weight, scale=scale)


def at_sample_rate(network: Network, hz: float) -> Network:
    """The same continuous-time network for a stream at ``hz`` samples a second: dt and window are rescaled.

    Raises NetworkError if the network has no sample rate of its own or ``hz`` is too far from it.
    """
    trained = network.input.sample_rate_hz
    if trained is None:
        raise NetworkError("sample rate: the network states none of its own, so it can't be moved to another one")
    if not trained / MAX_RATE_CHANGE <= hz <= trained * MAX_RATE_CHANGE:
        raise NetworkError(
            f"sample rate: {hz:g} Hz, expected {trained / MAX_RATE_CHANGE:g} to {trained * MAX_RATE_CHANGE:g} "
            f"(the network was trained at {trained:g} Hz)"
        )
    if hz == trained:
        return network
    ratio = trained / hz
    blocks = tuple(replace(b, ssm=replace(b.ssm, dt=b.ssm.dt * ratio)) for b in network.blocks)
    window = 1 if network.pooling == "none" else max(1, round(network.window / ratio))
    return replace(network, blocks=blocks, window=window, input=replace(network.input, sample_rate_hz=float(hz)))
