"""One sample through the whole network, written down once in the operators that ONNX and TFLite both have.

The equations are those of ``network`` and ``discretize.StepParameters``, with real and imaginary parts apart.
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
    """What the writer knows it by."""
    shape: Shape


class Writer(Protocol):
    """Writes operators into a graph. A constant's name is its identity: a second one of a name is the first."""

    def constant(self, name: str, array: Array) -> Value: ...
    def add(self, a: Value, b: Value) -> Value: ...
    def sub(self, a: Value, b: Value) -> Value: ...
    def mul(self, a: Value, b: Value) -> Value: ...
    def gelu(self, x: Value) -> Value: ...
    def sigmoid(self, x: Value) -> Value: ...

    def reshape(self, x: Value, shape: Shape) -> Value: ...

    def sum_last(self, x: Value, keep: bool) -> Value:
        """(k, n) -> (k,), or (k, 1) with ``keep``."""

    def gather(self, x: Value, name: str, places: Array) -> Value:
        """Along the last axis."""

    def split(self, x: Value, sizes: Sequence[int]) -> list[Value]:
        """Along the last axis."""

    def concat(self, values: Sequence[Value]) -> Value:
        """Along the last axis."""

    def linear(self, x: Value, name: str, linear: Linear, reach: float) -> Value:
        """(1, in) -> (1, out). ``reach``: largest size of x that was seen, for runtimes that quantise it by that."""

    def layer_norm(self, x: Value, name: str, norm: Norm) -> Value: ...

    def lookup(self, token: Value, name: str, rows: Array) -> Value:
        """(1, 1) float -> (1, H): the row of that number."""


States = list[tuple[Value, Value]]
"""Real and imaginary part (k, n) of each group's state, layer after layer."""


def state_names(parts: Parts) -> list[tuple[str, str, tuple[int, int]]]:
    """Name of the real part, of the imaginary one, and shape of each group's state. New ones begin with ``new.``"""
    return [
        (f"blocks.{i}.re{j}", f"blocks.{i}.im{j}", group.shape)
        for i, layer in enumerate(parts.layers)
        for j, group in enumerate(layer.groups)
    ]


def write_step(w: Writer, parts: Parts, z: Value, states: States, reach: Sequence[float]) -> tuple[Value, States]:
    """``z`` (1, d_input): a normalised sample, or a token; ``reach``: largest size of each layer's mixing input.

    Returns the outputs (1, d_output) and the new states.
    """
    encoder = parts.encoder
    u = w.linear(z, "encoder", encoder, 0.0) if isinstance(encoder, Linear) else w.lookup(z, "encoder", encoder)
    after: States = []
    for i, layer in enumerate(parts.layers):
        before = states[len(after) : len(after) + len(layer.groups)]
        u, new = _block(w, f"blocks.{i}", layer, u, before, parts.prenorm, reach[i] if reach else 0.0)
        after += new
    return w.linear(u, "decoder", parts.decoder, 0.0), after


def _block(
    w: Writer, name: str, layer: Layer, u: Value, before: States, prenorm: bool, reach: float
) -> tuple[Value, States]:
    v = _normalised(w, name, layer.norm, u) if prenorm else u
    y, after = _ssm(w, name, layer, v, before)
    z = _mixed(w, name, layer, y, reach)
    if layer.order is not None:
        removed = w.constant(f"{name}.constants", layer.constants[None])
        z = removed if z is None else w.concat([z, removed])
        z = w.gather(z, f"{name}.order", layer.order)
    assert z is not None
    u = w.add(u, z)
    return (u if prenorm else _normalised(w, name, layer.norm, u)), after


def _normalised(w: Writer, name: str, norm: Norm | None, u: Value) -> Value:
    if norm is None:
        return u
    if norm.kind == "layer":
        return w.layer_norm(u, f"{name}.norm", norm)
    scaled = w.mul(u, w.constant(f"{name}.norm.weight", norm.weight[None]))
    return w.add(scaled, w.constant(f"{name}.norm.bias", norm.bias[None]))


def _ssm(w: Writer, name: str, layer: Layer, v: Value, before: States) -> tuple[Value | None, States]:
    """(1, H) -> (1, G) in the order of ``layer.columns``, None for no column; and the new states."""
    if not len(layer.columns):
        return None, []
    if not np.array_equal(layer.columns, np.arange(v.shape[1])):
        v = w.gather(v, f"{name}.columns", layer.columns)
    sizes = [group.shape[0] for group in layer.groups]
    bypassed = len(layer.columns) - sum(sizes)
    driven = w.split(v, [*sizes, bypassed] if bypassed else sizes) if len(sizes) + bool(bypassed) > 1 else [v]
    through = w.mul(v, w.constant(f"{name}.D", layer.D[None]))
    sums, after = [], []
    for j, (group, state) in enumerate(zip(layer.groups, before, strict=True)):
        total, new = _recurrence(w, f"{name}.{j}", group, driven[j], state)
        sums.append(total)
        after.append(new)
    if not sums:
        return through, after
    if bypassed:
        sums.append(w.constant(f"{name}.bypassed", np.zeros(bypassed, dtype=np.float32)))
    return w.add(through, sums[0] if len(sums) == 1 else w.concat(sums)), after


def _recurrence(
    w: Writer, name: str, group: Group, v: Value, state: tuple[Value, Value]
) -> tuple[Value, tuple[Value, Value]]:
    """x += delta x + v (+ p q), summed over a channel's states: (1, k) -> (k,)."""

    def pair(what: str, values: Array) -> tuple[Value, Value]:
        return w.constant(f"{name}.{what}_re", values[0]), w.constant(f"{name}.{what}_im", values[1])

    def inner(a: tuple[Value, Value], b: tuple[Value, Value], keep: bool) -> Value:
        return w.sum_last(w.add(w.mul(a[0], b[0]), w.mul(a[1], b[1])), keep)

    re, im = state
    column = w.reshape(v, (v.shape[1], 1))
    dr, di = pair("delta", group.delta)
    # The change is summed before the state is added to it: a slow state keeps its decay's precision.
    new_re = w.sub(w.mul(dr, re), w.mul(di, im))
    new_im = w.add(w.mul(dr, im), w.mul(di, re))
    if group.p is not None and group.r is not None and group.beta is not None:
        q = w.add(inner(pair("r", group.r), state, True), w.mul(column, w.constant(f"{name}.beta", group.beta)))
        pr, pi = pair("p", group.p)
        new_re, new_im = w.add(new_re, w.mul(pr, q)), w.add(new_im, w.mul(pi, q))
    new = w.add(re, w.add(new_re, column)), w.add(im, new_im)
    return inner(pair("C", group.C), new, False), new


def _mixed(w: Writer, name: str, layer: Layer, y: Value | None, reach: float) -> Value | None:
    """(1, G) -> (1, R); None where no row is left."""
    linear = layer.mixing
    if not len(linear.bias):
        return None
    if y is None:
        z = w.constant(f"{name}.mixing.bias", linear.bias[None])
    else:
        z = w.linear(w.gelu(y), f"{name}.mixing", linear, reach)
    if not layer.gated:
        return z
    half = len(linear.bias) // 2
    value, gate = w.split(z, [half, half])
    return w.mul(value, w.sigmoid(gate))
