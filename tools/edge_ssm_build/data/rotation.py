"""Random rotations of inertial recordings, because a sensor is never worn in exactly the same way twice."""

from __future__ import annotations

import numpy as np

from edge_ssm.errors import UsageError
from edge_ssm_build.data.datasets import Array


def rotate(x: Array, degrees: float, rng: np.random.Generator) -> Array:
    """Rotate each window about a random axis by a normally distributed angle (Rodrigues' formula).

    Every three adjacent channels are one vector; all vectors of a window are rotated together.

    Parameters
    ----------
    x
        Windows in the sensor's units, shape (n, window, d_input).
    degrees
        Standard deviation of the angle.
    rng
        Source of the axes and angles.

    Returns
    -------
    Array
        The rotated windows, of the same shape.

    Raises
    ------
    UsageError
        If d_input is not a multiple of three.
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
    rotation = np.eye(3) + sine * cross + versine * cross @ cross
    vectors = x.reshape(n, -1, d_input // 3, 3)
    rotated: Array = np.einsum("nij,ntvj->ntvi", rotation, vectors).reshape(x.shape)
    return rotated
