"""Writing the step as an ONNX model, which ONNX's own checker verifies. Needs the package ``onnx``.

The inputs are ``input``, a normalised sample or a token of shape (1, d_input), and the states; the outputs are
``output``, shape (1, d_output), and the new states. With ``chunk`` the model takes any number of samples, (T, d_input)
to (T, d_output), as a Scan over the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper

from edge_ssm.formats.graph.parts import Linear, Parts
from edge_ssm.formats.graph.step import Shape, States, Value, state_names, write_step
from edge_ssm.model.network import Array, Norm

OPSET, IR = 20, 9
"""Opset 20 is the first one with Gelu; ONNX Runtime supports it, and this IR version, since 1.17."""


class OnnxWriter:
    """A ``step.Writer`` for ONNX, in which the reference to a value is its name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def constant(self, name: str, array: Array) -> Value:
        """Return the constant of this name, which is added if it is new."""
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return Value(name, array.shape)

    def node(self, kind: str, inputs: Sequence[Value], shape: Shape, name: str = "", **attributes: Any) -> Value:
        """Add an operator with one output of the given shape, and return the output."""
        name = name or f"{kind.lower()}.{len(self.nodes)}"
        refs = [x.ref for x in inputs]
        self.nodes.append(helper.make_node(kind, refs, [name], name=name, **attributes))
        return Value(name, shape)

    def _elementwise(self, kind: str, a: Value, b: Value) -> Value:
        return self.node(kind, [a, b], np.broadcast_shapes(a.shape, b.shape))

    def add(self, a: Value, b: Value) -> Value:
        """Return a + b."""
        return self._elementwise("Add", a, b)

    def sub(self, a: Value, b: Value) -> Value:
        """Return a - b."""
        return self._elementwise("Sub", a, b)

    def mul(self, a: Value, b: Value) -> Value:
        """Return a * b, element by element."""
        return self._elementwise("Mul", a, b)

    def gelu(self, x: Value) -> Value:
        """Return the exact GELU of x."""
        return self.node("Gelu", [x], x.shape)

    def sigmoid(self, x: Value) -> Value:
        """Return the logistic function of x."""
        return self.node("Sigmoid", [x], x.shape)

    def _integers(self, *numbers: int) -> Value:
        return self.constant("whole." + "x".join(map(str, numbers)), np.array(numbers, dtype=np.int64))

    def reshape(self, x: Value, shape: Shape) -> Value:
        """Return x in another shape."""
        return self.node("Reshape", [x, self._integers(*shape)], shape)

    def sum_last(self, x: Value, keep: bool) -> Value:
        """Return the sums over the last axis."""
        shape = (*x.shape[:-1], 1) if keep else x.shape[:-1]
        return self.node("ReduceSum", [x, self._integers(-1)], shape, keepdims=int(keep))

    def gather(self, x: Value, name: str, indices: Array) -> Value:
        """Return the elements of x at constant indices along the last axis."""
        return self.node("Gather", [x, self.constant(name, indices)], (*x.shape[:-1], len(indices)), axis=-1)

    def split(self, x: Value, sizes: Sequence[int]) -> list[Value]:
        """Return x in pieces along the last axis."""
        name = f"split.{len(self.nodes)}"
        pieces = [Value(f"{name}.{i}", (*x.shape[:-1], size)) for i, size in enumerate(sizes)]
        refs = [piece.ref for piece in pieces]
        self.nodes.append(helper.make_node("Split", [x.ref, self._integers(*sizes).ref], refs, name=name, axis=-1))
        return pieces

    def concat(self, values: Sequence[Value]) -> Value:
        """Return the values joined along the last axis."""
        shape = (*values[0].shape[:-1], sum(value.shape[-1] for value in values))
        return self.node("Concat", values, shape, axis=-1)

    def linear(self, x: Value, name: str, linear: Linear, input_max: float) -> Value:
        """Return a linear map of x."""
        rows, columns = linear.weight.shape
        shape, transposed = (1, rows), np.ascontiguousarray(linear.weight.T)
        bias = self.constant(f"{name}.bias", linear.bias)
        weight = self.constant(f"{name}.weight", transposed)
        if linear.scale is None:
            return self.node("Gemm", [x, weight, bias], shape)
        scale = self.constant(f"{name}.scale", linear.scale)
        if linear.weight.dtype == np.float16:
            wide = self.node("Cast", [weight], (columns, rows), to=TensorProto.FLOAT)
        else:
            # Quantise-dequantise pairs, symmetric as TensorRT requires; the runtime merges them and the MatMul into
            # one integer product. Shared constants would make it fail with a duplicate name when it changes their type.
            step = self.constant(f"{name}.x_step", np.array(input_max / 127, dtype=np.float32))
            zero = self.constant(f"{name}.x_zero", np.array(0, dtype=np.int8))
            one = self.constant(f"{name}.weight_step", np.array(1, dtype=np.float32))
            weight_zero = self.constant(f"{name}.weight_zero", np.array(0, dtype=np.int8))
            x = self.node("QuantizeLinear", [x, step, zero], x.shape)
            x = self.node("DequantizeLinear", [x, step, zero], x.shape)
            wide = self.node("DequantizeLinear", [weight, one, weight_zero], (columns, rows))
        # The product with the scales separates MatMul and Add, which ONNX Runtime would otherwise merge into a Gemm.
        return self.add(self.mul(self.node("MatMul", [x, wide], shape), scale), bias)

    def layer_norm(self, x: Value, name: str, norm: Norm) -> Value:
        """Return the LayerNorm of x, shape (1, H)."""
        bias = self.constant(f"{name}.bias", norm.bias)
        if x.shape[-1] == 1:  # ONNX Runtime 1.23 refuses to normalise a single element; the result is the bias.
            return self.add(self.sub(x, x), bias)
        weights = self.constant(f"{name}.weight", norm.weight), bias
        return self.node("LayerNormalization", [x, *weights], x.shape, axis=-1, epsilon=norm.eps)

    def lookup(self, token: Value, name: str, rows: Array) -> Value:
        """Return the row with the number ``token``."""
        number = self.reshape(self.node("Cast", [token], token.shape, to=TensorProto.INT64), (1,))
        return self.node("Gather", [self.constant(name, rows), number], (1, rows.shape[1]), axis=0)


def _info(name: str, *shape: int | str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _name_output(w: OnnxWriter, value: Value, name: str) -> None:
    """Give an output of the graph its name; an output that no operator computes becomes that of an Identity."""
    for node in w.nodes:
        for refs in (node.input, node.output):
            for i, ref in enumerate(refs):
                if ref == value.ref:
                    refs[i] = name
    if not any(name in node.output for node in w.nodes):
        w.node("Identity", [value], value.shape, name)


def write(parts: Parts, input_maxima: Sequence[float], chunk: bool, metadata: dict[str, str]) -> bytes:
    """Return the content of a model file.

    Parameters
    ----------
    parts, input_maxima
        See ``step.write_step``.
    chunk
        Whether the model takes any number of samples; else it takes one.
    metadata
        Metadata texts by key.
    """
    w = OnnxWriter()
    at = "at." if chunk else ""  # a name inside the Scan must differ from the names outside
    names = state_names(parts)
    flat = [(name, shape) for re, im, shape in names for name in (re, im)]
    states: States = [(Value(at + re, shape), Value(at + im, shape)) for re, im, shape in names]
    sample = Value(f"{at}input", (parts.d_input,) if chunk else (1, parts.d_input))
    row = w.reshape(sample, (1, parts.d_input)) if chunk else sample
    output, after = write_step(w, parts, row, states, input_maxima)
    d_output = output.shape[1]
    if chunk:
        output = w.reshape(output, (d_output,))
    _name_output(w, output, f"{at}output")
    for value, (name, _) in zip([part for pair in after for part in pair], flat, strict=True):
        _name_output(w, value, f"{at}new.{name}")
    old_states = [_info(at + name, *shape) for name, shape in flat]
    new_states = [_info(f"{at}new.{name}", *shape) for name, shape in flat]
    nodes, length = w.nodes, "samples" if chunk else 1
    if chunk:
        body = helper.make_graph(
            nodes,
            "step",
            [*old_states, _info(sample.ref, *sample.shape)],
            [*new_states, _info(f"{at}output", d_output)],
        )
        ins, outs = [name for name, _ in flat], [f"new.{name}" for name, _ in flat]
        nodes = [helper.make_node("Scan", [*ins, "input"], [*outs, "output"], "scan", body=body, num_scan_inputs=1)]
        old_states, new_states = (
            [_info(name, *shape) for name, (_, shape) in zip(outer, flat, strict=True)] for outer in (ins, outs)
        )
    graph = helper.make_graph(
        nodes,
        "chunk" if chunk else "step",
        [_info("input", length, parts.d_input), *old_states],
        [_info("output", length, d_output), *new_states],
        list(w.constants.values()),
    )
    return _model(graph, metadata)


def _model(graph: Any, metadata: dict[str, str]) -> bytes:
    model: ModelProto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR, producer_name="edge-ssm"
    )
    helper.set_model_props(model, metadata)
    checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString(deterministic=True)
    return content
