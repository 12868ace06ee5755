"""The floor of a step: the time in which one core reads as many bytes as a step's weights and states have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from edge_ssm.engines.cpu import simd
from edge_ssm.engines.cpu.layout import aligned
from edge_ssm.model.cost import cost
from edge_ssm.model.network import Network

PASSES = 16
"""Number of passes of one call, so that the call itself does not count."""
eight_vectors = simd.MULTIPLY_ONE["float32"][8]


@njit
def read(w: int, y: int, z: int, columns: int, passes: int) -> None:
    """Multiply eight vectors of rows, the kernel's widest loop."""
    weights, inputs, sums = simd.float32_at(w), simd.float32_at(y), simd.float32_at(z)
    for _ in range(passes):
        eight_vectors(weights, 0, weights, columns, inputs, sums, 0)


def reader(size: int) -> Callable[[], Any]:
    """Return a call that reads ``size`` bytes PASSES times, 64 float32 at a time, each into a sum of its own."""
    columns = -(-size // 256)
    arrays = [aligned(np.ones(n, dtype=np.float32)) for n in (64 * columns, columns, 64)]
    addresses = [array.ctypes.data for array in arrays]
    # The addresses do not keep the arrays alive; the default argument does.
    return lambda arrays=arrays: read(*addresses, columns, PASSES)


def read_bytes(network: Network) -> int:
    """Return the number of bytes of the weights and states that a step reads."""
    total = cost(network)
    return int(total.weight_bytes + 4 * total.state_values)
