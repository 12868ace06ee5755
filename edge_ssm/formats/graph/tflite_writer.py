"""Writing the step as a TFLite model. Needs ``flatbuffers``, and ``ai_edge_litert`` for the schema.

The signature ``step`` has the inputs ``input``, a normalised sample or a token of shape (1, d_input), and the states,
and the outputs ``output``, shape (1, d_output), and the new states. With a chunk of T samples there is a second
signature ``chunk``, the step unrolled, from (T, d_input) to (T, d_output). Both share the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edge_ssm.formats.graph.parts import Linear, Parts
from edge_ssm.formats.graph.step import Shape, States, Value, state_names, write_step
from edge_ssm.model.network import Array, Norm

ALIGNMENT = 16
"""Alignment of a buffer in bytes, which the schema demands and the generated code does not provide."""
BUILDER_BYTES = 1 << 20
OPTIONS = {
    "ADD": "Add",
    "SUB": "Sub",
    "MUL": "Mul",
    "SUM": "Reducer",
    "MEAN": "Reducer",
    "RSQRT": "",
    "GELU": "Gelu",
    "LOGISTIC": "",
    "RESHAPE": "Reshape",
    "GATHER": "Gather",
    "SLICE": "Slice",
    "CONCATENATION": "Concatenation",
    "FULLY_CONNECTED": "FullyConnected",
    "DEQUANTIZE": "Dequantize",
    "CAST": "Cast",
}
"""Every operator that is used, and the name of its options in the schema."""
TYPES = {
    np.dtype(np.float32): schema.TensorType.FLOAT32,
    np.dtype(np.float16): schema.TensorType.FLOAT16,
    np.dtype(np.int8): schema.TensorType.INT8,
    np.dtype(np.int32): schema.TensorType.INT32,
}


class _Buffer(schema.BufferT):  # type: ignore[misc]
    """A buffer that is written in one piece, and aligned."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.content = content

    def Pack(self, builder: Any) -> Any:
        size = len(self.content)
        builder.StartVector(1, size, ALIGNMENT)
        builder.head -= size
        builder.Bytes[builder.head : builder.head + size] = self.content
        data = builder.EndVector()
        schema.BufferStart(builder)
        schema.BufferAddData(builder, data)
        return schema.BufferEnd(builder)


class TfliteModel:
    """The buffers and operator codes that the graphs of one file share."""

    def __init__(self) -> None:
        self.buffers: list[Any] = [schema.BufferT()]  # the empty buffer of every tensor that is computed
        self.codes: list[tuple[int, int]] = []
        self.constants: dict[str, int] = {}

    def buffer(self, content: bytes) -> int:
        """Add a buffer, and return its number."""
        self.buffers.append(_Buffer(content))
        return len(self.buffers) - 1

    def code(self, kind: str, version: int) -> int:
        """Return the number of an operator code, which is added if it is new."""
        entry = getattr(schema.BuiltinOperator, kind), version
        if entry not in self.codes:
            self.codes.append(entry)
        return self.codes.index(entry)


class TfliteWriter:
    """A ``step.Writer`` for one graph of a TFLite model, in which the reference to a value is its tensor's number."""

    def __init__(self, model: TfliteModel) -> None:
        self.model = model
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.constants: dict[str, Value] = {}

    def tensor(self, name: str, shape: Shape, dtype: Any = np.float32, buffer: int = 0) -> Value:
        """Add a tensor."""
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.buffer = name.encode(), list(shape), buffer
        tensor.type = TYPES[np.dtype(dtype)]
        self.tensors.append(tensor)
        return Value(len(self.tensors) - 1, shape)

    def constant(self, name: str, array: Array) -> Value:
        """Return the constant of this name, which is added if it is new."""
        if name not in self.constants:
            array = array.astype(np.int32) if array.dtype == np.int64 else array
            if name not in self.model.constants:
                self.model.constants[name] = self.model.buffer(np.ascontiguousarray(array).tobytes())
            self.constants[name] = self.tensor(name, array.shape, array.dtype, self.model.constants[name])
        return self.constants[name]

    def node(
        self,
        kind: str,
        inputs: Sequence[Value],
        shape: Shape,
        version: int = 1,
        dtype: Any = np.float32,
        **options: Any,
    ) -> Value:
        """Add an operator with one output of the given shape, and return the output."""
        output = self.tensor(f"{kind.lower()}.{len(self.operators)}", shape, dtype)
        operator = schema.OperatorT()
        operator.opcodeIndex = self.model.code(kind, version)
        operator.inputs, operator.outputs = [x.ref for x in inputs], [output.ref]
        if OPTIONS[kind]:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, f"{OPTIONS[kind]}Options")
            operator.builtinOptions = getattr(schema, f"{OPTIONS[kind]}OptionsT")()
            for key, value in options.items():
                setattr(operator.builtinOptions, key, value)
        self.operators.append(operator)
        return output

    def _elementwise(self, kind: str, a: Value, b: Value) -> Value:
        return self.node(kind, [a, b], np.broadcast_shapes(a.shape, b.shape))

    def add(self, a: Value, b: Value) -> Value:
        """Return a + b."""
        return self._elementwise("ADD", a, b)

    def sub(self, a: Value, b: Value) -> Value:
        """Return a - b."""
        return self._elementwise("SUB", a, b)

    def mul(self, a: Value, b: Value) -> Value:
        """Return a * b, element by element."""
        return self._elementwise("MUL", a, b)

    def gelu(self, x: Value) -> Value:
        """Return the exact GELU of x."""
        return self.node("GELU", [x], x.shape, approximate=False)

    def sigmoid(self, x: Value) -> Value:
        """Return the logistic function of x."""
        return self.node("LOGISTIC", [x], x.shape)

    def _integers(self, *numbers: int) -> Value:
        return self.constant("whole." + "x".join(map(str, numbers)), np.array(numbers, dtype=np.int32))

    def reshape(self, x: Value, shape: Shape) -> Value:
        """Return x in another shape."""
        return self.node("RESHAPE", [x, self._integers(*shape)], shape, newShape=list(shape))

    def sum_last(self, x: Value, keep: bool) -> Value:
        """Return the sums over the last axis."""
        shape = (*x.shape[:-1], 1) if keep else x.shape[:-1]
        return self.node("SUM", [x, self._integers(len(x.shape) - 1)], shape, keepDims=keep)

    def gather(self, x: Value, name: str, indices: Array) -> Value:
        """Return the elements of x at constant indices along the last axis."""
        axis = len(x.shape) - 1
        return self.node("GATHER", [x, self.constant(name, indices)], (*x.shape[:-1], len(indices)), axis=axis)

    def slice(self, x: Value, begin: Shape, size: Shape) -> Value:
        """Return a part of x."""
        return self.node("SLICE", [x, self._integers(*begin), self._integers(*size)], size)

    def split(self, x: Value, sizes: Sequence[int]) -> list[Value]:
        """Return x in pieces along the last axis."""
        leading = x.shape[:-1]
        zeros, begins = (0,) * len(leading), np.cumsum([0, *sizes])
        return [self.slice(x, (*zeros, int(b)), (*leading, s)) for b, s in zip(begins, sizes, strict=False)]

    def concat(self, values: Sequence[Value], axis: int = -1) -> Value:
        """Return the values joined along an axis."""
        shape = list(values[0].shape)
        shape[axis] = sum(value.shape[axis] for value in values)
        return self.node("CONCATENATION", values, tuple(shape), axis=axis % len(shape))

    def linear(self, x: Value, name: str, linear: Linear, input_max: float) -> Value:
        """Return a linear map of x."""
        rows = len(linear.weight)
        weight, bias = self.constant(f"{name}.weight", linear.weight), self.constant(f"{name}.bias", linear.bias)
        if linear.scale is None:
            return self.node("FULLY_CONNECTED", [x, weight, bias], (1, rows))
        # The scales are applied after the product: not every runtime supports one per row inside the operator.
        version, absent = 1, Value(-1, ())
        if linear.weight.dtype == np.float16:
            weight = self.node("DEQUANTIZE", [weight], linear.weight.shape, version=3)
        else:
            # The runtime quantises x itself, by the range of x in each step.
            quantization = schema.QuantizationParametersT()
            quantization.scale, quantization.zeroPoint = [1.0], [0]
            self.tensors[weight.ref].quantization = quantization
            version = 9
        product = self.node(
            "FULLY_CONNECTED", [x, weight, absent], (1, rows), version=version, asymmetricQuantizeInputs=version > 1
        )
        return self.add(self.mul(product, self.constant(f"{name}.scale", linear.scale)), bias)

    def layer_norm(self, x: Value, name: str, norm: Norm) -> Value:
        """Return the LayerNorm of x, shape (1, H)."""
        axis, one = self._integers(1), (1, 1)
        centred = self.sub(x, self.node("MEAN", [x, axis], one, keepDims=True))
        variance = self.node("MEAN", [self.mul(centred, centred), axis], one, keepDims=True)
        eps = self.constant(f"{name}.eps", np.full(one, norm.eps, dtype=np.float32))
        scaled = self.mul(centred, self.node("RSQRT", [self.add(variance, eps)], one))
        weighted = self.mul(scaled, self.constant(f"{name}.weight", norm.weight[None]))
        return self.add(weighted, self.constant(f"{name}.bias", norm.bias[None]))

    def lookup(self, token: Value, name: str, rows: Array) -> Value:
        """Return the row with the number ``token``."""
        cast = self.node(
            "CAST", [token], (1, 1), dtype=np.int32, inDataType=TYPES[np.dtype("f4")], outDataType=TYPES[np.dtype("i4")]
        )
        number = self.reshape(cast, (1,))
        self.tensors[number.ref].type = TYPES[np.dtype("i4")]
        return self.node("GATHER", [self.constant(name, rows), number], (1, rows.shape[1]), axis=0)


def _graph(
    model: TfliteModel, parts: Parts, input_maxima: Sequence[float], samples: int, key: str, index: int
) -> tuple[Any, Any]:
    """Return the subgraph that takes so many samples, and its signature."""
    w = TfliteWriter(model)
    names = state_names(parts)
    input_ = w.tensor("input", (samples, parts.d_input))
    old_states: States = [(w.tensor(re, shape), w.tensor(im, shape)) for re, im, shape in names]
    states, outputs = old_states, []
    for t in range(samples):
        z = input_ if samples == 1 else w.slice(input_, (t, 0), (1, parts.d_input))
        output, states = write_step(w, parts, z, states, input_maxima)
        outputs.append(output)
    output = outputs[0] if samples == 1 else w.concat(outputs, axis=0)
    inputs = {"input": input_} | dict(_parts(old_states, names, ""))
    results = {"output": output} | dict(_parts(states, names, "new."))
    for name, value in results.items():
        w.tensors[value.ref].name = name.encode()
    graph = schema.SubGraphT()
    graph.name, graph.tensors, graph.operators = key.encode(), w.tensors, w.operators
    graph.inputs, graph.outputs = [v.ref for v in inputs.values()], [v.ref for v in results.values()]
    signature = schema.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = key.encode(), index
    signature.inputs, signature.outputs = _tensor_map(inputs), _tensor_map(results)
    return graph, signature


def _parts(states: States, names: Sequence[tuple[str, str, Shape]], prefix: str) -> list[tuple[str, Value]]:
    pairs = zip(states, names, strict=True)
    return [(prefix + name, value) for state, (re, im, _) in pairs for name, value in zip((re, im), state, strict=True)]


def _tensor_map(values: dict[str, Value]) -> list[Any]:
    entries = []
    for name, value in values.items():
        entry = schema.TensorMapT()
        entry.name, entry.tensorIndex = name.encode(), value.ref
        entries.append(entry)
    return entries


def write(parts: Parts, input_maxima: Sequence[float], chunk: int, metadata: dict[str, bytes]) -> bytes:
    """Return the content of a model file.

    Parameters
    ----------
    parts, input_maxima
        See ``step.write_step``.
    chunk
        Samples per call of the signature ``chunk``; with 1 there is only the signature ``step``.
    metadata
        Metadata by key.
    """
    shared, model = TfliteModel(), schema.ModelT()
    kinds = [("step", 1)] + ([("chunk", chunk)] if chunk > 1 else [])
    pairs = [_graph(shared, parts, input_maxima, samples, key, i) for i, (key, samples) in enumerate(kinds)]
    model.subgraphs, model.signatureDefs = [graph for graph, _ in pairs], [signature for _, signature in pairs]
    model.version, model.description, model.metadata, model.operatorCodes = 3, b"edge-ssm", [], []
    for key, content in metadata.items():
        entry = schema.MetadataT()
        entry.name, entry.buffer = key.encode(), shared.buffer(content)
        model.metadata.append(entry)
    for code, version in shared.codes:
        operator = schema.OperatorCodeT()
        operator.builtinCode, operator.deprecatedBuiltinCode, operator.version = code, min(code, 127), version
        model.operatorCodes.append(operator)
    model.buffers = shared.buffers
    builder = flatbuffers.Builder(BUILDER_BYTES)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())
