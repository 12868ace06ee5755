"""Transformations of a network: quantised mixing weights, and another sample rate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edge_ssm.errors import NetworkError
from edge_ssm.model.network import Mixing, MixingDtype, Network

MAX_RATE_CHANGE = 1000.0
"""Largest ratio of a stream's sample rate to the trained one. A larger ratio means that a unit was mistaken."""


def quantised(mixing: Mixing, dtype: MixingDtype) -> Mixing:
    """Return the same map with weights of type ``dtype`` and one scale per row.

    The scale makes the largest weight of a row the largest value of int8. float16 is scaled too, to 2^14: its
    subnormals, which some processors flush to zero, are then too small to matter.
    """
    values = mixing.values()
    if dtype == "float32":
        return replace(mixing, weight=values.astype(np.float32), scale=None)
    largest = np.abs(values).max(axis=1, initial=0.0)
    top = 127.0 if dtype == "int8" else 2.0**14
    # The lower bound keeps 1 / scale within the range of float32.
    scale = np.maximum(largest / top, 1e-30).astype(np.float32)
    scaled = values / scale.astype(np.float64)[:, None]
    weight = np.clip(np.rint(scaled), -127, 127).astype(np.int8) if dtype == "int8" else scaled.astype(np.float16)
    return replace(mixing, weight=weight, scale=scale)


def at_sample_rate(network: Network, hz: float) -> Network:
    """Return the same continuous-time network for a stream of ``hz`` samples per second: dt and window are rescaled.

    Raises NetworkError if the network states no sample rate, or if ``hz`` differs from it by more than
    MAX_RATE_CHANGE.
    """
    trained = network.input.sample_rate_hz
    if trained is None:
        raise NetworkError("sample rate: the network does not state its own, so that it cannot be changed")
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
