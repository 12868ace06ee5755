"""Which samples a network accepts: finite values within a range around the training data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from edge_ssm.model.network import Array, Network, TokenEncoder

INPUT_LIMIT = 1e9
"""Largest magnitude of a normalised input value. Past it, squares in LayerNorm could leave float32's range
and the state would never recover, so such a sample is treated like a non-finite one."""
FEW_CHANNELS = 32


@dataclass(frozen=True)
class InputRange:
    """The values that may reach an engine's state; all else is a gap."""

    low: Array  # (d_input,) float64, in the sensor's units
    high: Array  # (d_input,) float64
    whole: bool
    """Whether only whole numbers are meant: tokens."""

    def bad(self, values: Array) -> Array:
        """Which of ``values`` (..., d_input) must not be stepped, as bool. NaN is always among them."""
        bad: Array = ~((values >= self.low) & (values <= self.high))
        return bad | (values != np.floor(values)) if self.whole else bad

    def takes(self, values: Array) -> bool:
        """Whether none of ``values`` (d_input,) is bad: each sample is asked, and nearly all are good.

        Of a few channels Python compares faster than NumPy makes four arrays (0.3 against 1.7 us for six).
        """
        if self.whole or len(values) > FEW_CHANNELS:
            return not self.bad(values).any()
        for low, value, high in zip(self._lows, values.tolist(), self._highs, strict=True):
            if not low <= value <= high:
                return False
        return True

    @cached_property
    def _lows(self) -> list[float]:
        return list(self.low.tolist())

    @cached_property
    def _highs(self) -> list[float]:
        return list(self.high.tolist())


def input_range(network: Network) -> InputRange:
    """Tokens of the vocabulary, or values within INPUT_LIMIT standard deviations of the mean."""
    if isinstance(network.encoder, TokenEncoder):
        last = len(network.encoder.embedding) - 1
        return InputRange(np.zeros(1), np.full(1, float(last)), True)
    spread = INPUT_LIMIT * network.input.std
    return InputRange(network.input.mean - spread, network.input.mean + spread, False)
