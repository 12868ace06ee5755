"""One step of the whole network, expressed in the operators that ONNX and TFLite have in common.

The equations are those of ``edge_ssm.model.network`` and ``discretize.StepParameters``, with separate real and
imaginary parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from edge_ssm.formats.graph.parts import Group, Layer, Linear, Parts
from edge_ssm.model.network import Array, Norm

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """A tensor of a graph that is being written."""

    ref: Any
    """The writer's own reference to the tensor."""
    shape: Shape


class Writer(Protocol):
    """Writes operators into a graph. Each method adds operators and returns their result."""

    def constant(self, name: str, array: Array) -> Value:
        """Return a constant; the first one of a name is used again for the same name."""

    def add(self, a: Value, b: Value) -> Value:
        """Return a + b."""

    def sub(self, a: Value, b: Value) -> Value:
        """Return a - b."""

    def mul(self, a: Value, b: Value) -> Value:
        """Return a * b, element by element."""

    def gelu(self, x: Value) -> Value:
        """Return the exact GELU of x."""

    def sigmoid(self, x: Value) -> Value:
        """Return the logistic function of x."""

    def reshape(self, x: Value, shape: Shape) -> Value:
        """Return x in another shape."""

    def sum_last(self, x: Value, keep: bool) -> Value:
        """Return the sums over the last axis: (k, n) -> (k,), or (k, 1) with ``keep``."""

    def gather(self, x: Value, name: str, indices: Array) -> Value:
        """Return the elements of x at constant indices along the last axis."""

    def split(self, x: Value, sizes: Sequence[int]) -> list[Value]:
        """Return x in pieces of the given sizes along the last axis."""

    def concat(self, values: Sequence[Value]) -> Value:
        """Return the values joined along the last axis."""

    def linear(self, x: Value, name: str, linear: Linear, input_max: float) -> Value:
        """Return a linear map of x: (1, in) -> (1, out).

        ``input_max`` is the largest magnitude of x, for runtimes that quantise it with a static range.
        """

    def layer_norm(self, x: Value, name: str, norm: Norm) -> Value:
        """Return the LayerNorm of x, shape (1, H)."""

    def lookup(self, token: Value, name: str, rows: Array) -> Value:
        """Return the row with the number ``token``: (1, 1), float32 -> (1, H)."""


States = list[tuple[Value, Value]]
"""Real and imaginary part, (k, n) each, of every group's state, layer after layer."""


def state_names(parts: Parts) -> list[tuple[str, str, tuple[int, int]]]:
    """Return name of the real part, name of the imaginary part, and shape of each group's state.

    The names of the new states have the prefix ``new.``.
    """
    return [
        (f"blocks.{i}.re{j}", f"blocks.{i}.im{j}", group.shape)
        for i, layer in enumerate(parts.layers)
        for j, group in enumerate(layer.groups)
    ]


def write_step(
    w: Writer, parts: Parts, z: Value, states: States, input_maxima: Sequence[float]
) -> tuple[Value, States]:
    """Write one step.

    Parameters
    ----------
    w, parts
        The writer, and the arrays of the network.
    z
        A normalised sample or a token, shape (1, d_input).
    states
        The states before the step.
    input_maxima
        Largest magnitude of each layer's mixing input; empty if it is not quantised with a static range.

    Returns
    -------
    The outputs, shape (1, d_output), and the states after the step.
    """
    encoder = parts.encoder
    u = w.linear(z, "encoder", encoder, 0.0) if isinstance(encoder, Linear) else w.lookup(z, "encoder", encoder)
    after: States = []
    for i, layer in enumerate(parts.layers):
        before = states[len(after) : len(after) + len(layer.groups)]
        u, new = _block(w, f"blocks.{i}", layer, u, before, parts.prenorm, input_maxima[i] if input_maxima else 0.0)
        after += new
    return w.linear(u, "decoder", parts.decoder, 0.0), after


def _block(
    w: Writer, name: str, layer: Layer, u: Value, before: States, prenorm: bool, input_max: float
) -> tuple[Value, States]:
    v = _norm(w, name, layer.norm, u) if prenorm else u
    y, after = _ssm(w, name, layer, v, before)
    z = _mix(w, name, layer, y, input_max)
    if layer.order is not None:
        removed = w.constant(f"{name}.constants", layer.constants[None])
        z = removed if z is None else w.concat([z, removed])
        z = w.gather(z, f"{name}.order", layer.order)
    assert z is not None
    u = w.add(u, z)
    return (u if prenorm else _norm(w, name, layer.norm, u)), after


def _norm(w: Writer, name: str, norm: Norm | None, u: Value) -> Value:
    if norm is None:
        return u
    if norm.kind == "layer":
        return w.layer_norm(u, f"{name}.norm", norm)
    scaled = w.mul(u, w.constant(f"{name}.norm.weight", norm.weight[None]))
    return w.add(scaled, w.constant(f"{name}.norm.bias", norm.bias[None]))


def _ssm(w: Writer, name: str, layer: Layer, v: Value, before: States) -> tuple[Value | None, States]:
    """Return the SSM's outputs y, (1, H) -> (1, G) in the order of ``layer.columns``, and the new states.

    The outputs are None if no column is left.
    """
    if not len(layer.columns):
        return None, []
    if not np.array_equal(layer.columns, np.arange(v.shape[1])):
        v = w.gather(v, f"{name}.columns", layer.columns)
    sizes = [group.shape[0] for group in layer.groups]
    bypassed = len(layer.columns) - sum(sizes)
    inputs = w.split(v, [*sizes, bypassed] if bypassed else sizes) if len(sizes) + bool(bypassed) > 1 else [v]
    feedthrough = w.mul(v, w.constant(f"{name}.D", layer.D[None]))
    sums, after = [], []
    for j, (group, state) in enumerate(zip(layer.groups, before, strict=True)):
        total, new = _recurrence(w, f"{name}.{j}", group, inputs[j], state)
        sums.append(total)
        after.append(new)
    if not sums:
        return feedthrough, after
    if bypassed:
        sums.append(w.constant(f"{name}.bypassed", np.zeros(bypassed, dtype=np.float32)))
    return w.add(feedthrough, sums[0] if len(sums) == 1 else w.concat(sums)), after


def _recurrence(
    w: Writer, name: str, group: Group, v: Value, state: tuple[Value, Value]
) -> tuple[Value, tuple[Value, Value]]:
    """Return 2 Re(sum(C x)) of every channel after x += delta x + v (+ p q), (1, k) -> (k,), and the new x."""

    def pair(part: str, values: Array) -> tuple[Value, Value]:
        return w.constant(f"{name}.{part}_re", values[0]), w.constant(f"{name}.{part}_im", values[1])

    def inner(a: tuple[Value, Value], b: tuple[Value, Value], keep: bool) -> Value:
        return w.sum_last(w.add(w.mul(a[0], b[0]), w.mul(a[1], b[1])), keep)

    re, im = state
    column = w.reshape(v, (v.shape[1], 1))
    dr, di = pair("delta", group.delta)
    # The change is computed first and then added to the state: a slow state keeps the precision of its decay.
    new_re = w.sub(w.mul(dr, re), w.mul(di, im))
    new_im = w.add(w.mul(dr, im), w.mul(di, re))
    if group.p is not None and group.r is not None and group.beta is not None:
        q = w.add(inner(pair("r", group.r), state, True), w.mul(column, w.constant(f"{name}.beta", group.beta)))
        pr, pi = pair("p", group.p)
        new_re, new_im = w.add(new_re, w.mul(pr, q)), w.add(new_im, w.mul(pi, q))
    new = w.add(re, w.add(new_re, column)), w.add(im, new_im)
    return inner(pair("C", group.C), new, False), new


def _mix(w: Writer, name: str, layer: Layer, y: Value | None, input_max: float) -> Value | None:
    """Return the mixing's results, (1, G) -> (1, R); None if no row is left."""
    linear = layer.mixing
    if not len(linear.bias):
        return None
    if y is None:
        z = w.constant(f"{name}.mixing.bias", linear.bias[None])
    else:
        z = w.linear(w.gelu(y), f"{name}.mixing", linear, input_max)
    if not layer.is_gated:
        return z
    half = len(linear.bias) // 2
    value, gate = w.split(z, [half, half])
    return w.mul(value, w.sigmoid(gate))
