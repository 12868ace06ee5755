"""Random rotations of inertial recordings: nobody wears a sensor twice in the same way."""

from __future__ import annotations

import numpy as np

from edge_ssm.errors import UsageError
from edge_ssm_build.data.datasets import Array


def rotate(x: Array, degrees: float, rng: np.random.Generator) -> Array:
    """Turn each window (n, window, d_input), in the sensor's units, about a random axis.

    Every three channels in a row are one vector; all of a window turn together, by a normally distributed angle of
    standard deviation ``degrees`` (Rodrigues' formula). Raises UsageError unless d_input is a multiple of three.
    """
    n, _, d_input = x.shape
    if d_input % 3:
        raise UsageError(f"rotation: {d_input} channels, expected vectors of three (ax, ay, az, wx, wy, wz)")
    axis = rng.standard_normal((n, 3))
    axis /= np.linalg.norm(axis, axis=1, keepdims=True)
    angle = np.radians(degrees) * rng.standard_normal(n)
    cross = np.zeros((n, 3, 3))
    cross[:, [2, 0, 1], [1, 2, 0]] = axis
    cross -= cross.transpose(0, 2, 1)
    sine, versine = np.sin(angle)[:, None, None], (1 - np.cos(angle))[:, None, None]
    turn = np.eye(3) + sine * cross + versine * cross @ cross
    vectors = x.reshape(n, -1, d_input // 3, 3)
    turned: Array = np.einsum("nij,ntvj->ntvi", turn, vectors).reshape(x.shape)
    return turned
