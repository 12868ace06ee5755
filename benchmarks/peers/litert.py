"""LiteRT: the step as a TFLite file, written by the flatbuffer schema alone, and run by XNNPACK on one thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edge_ssm.network import Array
from peers.parts import Parts


class _Graph:
    def __init__(self) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self.schema = schema
        self.tensors: list[Any] = []
        self.buffers: list[Any] = [schema.BufferT()]
        self.operators: list[Any] = []
        self.codes: list[int] = []

    def tensor(self, name: str, shape: tuple[int, ...], kind: Any = None, buffer: int = 0) -> int:
        made = self.schema.TensorT()
        made.name, made.shape, made.buffer = name.encode(), list(shape), buffer
        made.type = self.schema.TensorType.FLOAT32 if kind is None else kind
        self.tensors.append(made)
        return len(self.tensors) - 1

    def constant(self, name: str, value: Any) -> int:
        array = np.asarray(value)
        whole = array.dtype.kind == "i"
        buffer = self.schema.BufferT()
        raw = np.ascontiguousarray(array.astype(np.int32 if whole else np.float32)).tobytes()
        buffer.data = np.frombuffer(raw, np.uint8)
        self.buffers.append(buffer)
        kind = self.schema.TensorType.INT32 if whole else None
        return self.tensor(name, array.shape, kind, len(self.buffers) - 1)

    def node(self, kind: str, inputs: list[int], shapes: list[tuple[int, ...]], name: str, **options: Any) -> list[int]:
        """An operator; its options' class is that of its first inputs' family: ADD has AddOptions."""
        outputs = [self.tensor(f"{name}.{i}", shape) for i, shape in enumerate(shapes)]
        code = getattr(self.schema.BuiltinOperator, kind)
        if code not in self.codes:
            self.codes.append(code)
        made = self.schema.OperatorT()
        made.opcodeIndex, made.inputs, made.outputs = self.codes.index(code), inputs, outputs
        title = {"SUM": "Reducer", "MEAN": "Reducer"}.get(kind, "".join(part.title() for part in kind.split("_")))
        if hasattr(self.schema, f"{title}OptionsT") and kind != "LOGISTIC":
            made.builtinOptionsType = getattr(self.schema.BuiltinOptions, f"{title}Options")
            made.builtinOptions = getattr(self.schema, f"{title}OptionsT")()
            for key, value in options.items():
                setattr(made.builtinOptions, key, value)
        self.operators.append(made)
        return outputs

    def content(self, inputs: list[int], outputs: list[int]) -> bytes:
        import flatbuffers

        schema = self.schema
        graph, model = schema.SubGraphT(), schema.ModelT()
        graph.tensors, graph.operators, graph.inputs, graph.outputs = self.tensors, self.operators, inputs, outputs
        graph.name = b"step"
        model.version, model.subgraphs, model.buffers = 3, [graph], self.buffers
        model.operatorCodes = []
        for code in self.codes:
            made = schema.OperatorCodeT()
            made.builtinCode, made.deprecatedBuiltinCode, made.version = code, min(code, 127), 1
            model.operatorCodes.append(made)
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())


def model_of(parts: Parts) -> bytes:
    """Inputs ``sample`` (1, d_input), ``re0``, ``im0``, ...; outputs in the same order, ``outputs`` first."""
    g, h = _Graph(), parts.h

    def op(kind: str, *inputs: int, shape: tuple[int, ...], name: str, **options: Any) -> int:
        return g.node(kind, list(inputs), [shape], name, **options)[0]

    inputs = [g.tensor("sample", (1, len(parts.mean)))]
    at = (1, len(parts.mean))
    centred = op("SUB", inputs[0], g.constant("mean", parts.mean), shape=at, name="centred")
    scaled = op("MUL", centred, g.constant("scale", parts.scale), shape=at, name="scaled")
    names = g.constant("encoder", parts.encoder), g.constant("encoder_bias", parts.encoder_bias)
    u = op("FULLY_CONNECTED", scaled, *names, shape=(1, h), name="u")
    last, second = g.constant("last", np.array([-1])), g.constant("second", np.array(1))
    states: list[int] = []
    for i, layer in enumerate(parts.layers):
        k, n = layer.delta[0].shape
        full = (k, n)
        re, im = g.tensor(f"re{i}", full), g.tensor(f"im{i}", full)
        inputs += [re, im]
        (dr, di), (cr, ci) = (
            [g.constant(f"{name}{j}.{i}", values[j]) for j in range(2)]
            for name, values in (("delta", layer.delta), ("C", layer.C))
        )
        v = u
        if k < h:
            v = op("GATHER", u, g.constant(f"active{i}", layer.active), shape=(1, k), name=f"v{i}", axis=1)
        shape = g.constant(f"shape{i}", np.array([k, 1]))
        column = op("RESHAPE", v, shape, shape=(k, 1), name=f"column{i}", newShape=[k, 1])

        def plane(kind: str, a: int, b: int, name: str, i: int = i, full: tuple[int, ...] = full) -> int:
            return op(kind, a, b, shape=full, name=f"{name}{i}")

        kept = plane("ADD", re, plane("MUL", dr, re, "a"), "b")
        new_re = plane("ADD", plane("SUB", kept, plane("MUL", di, im, "c"), "d"), column, "new_re")
        kept = plane("ADD", im, plane("MUL", dr, im, "e"), "f")
        new_im = plane("ADD", kept, plane("MUL", di, re, "g"), "new_im")
        both = plane("ADD", plane("MUL", cr, new_re, "h"), plane("MUL", ci, new_im, "j"), "k")
        states += [new_re, new_im]
        summed = op("SUM", both, last, shape=(k,), name=f"l{i}", keepDims=False)
        through = op("MUL", v, g.constant(f"D{i}", layer.D), shape=(1, k), name=f"m{i}")
        y = op("ADD", through, summed, shape=(1, k), name=f"y{i}")
        gelu = op("GELU", y, shape=(1, k), name=f"gelu{i}", approximate=False)
        names = g.constant(f"weight{i}", layer.weight), g.constant(f"bias{i}", layer.bias)
        z = op("FULLY_CONNECTED", gelu, *names, shape=(1, 2 * h), name=f"z{i}")
        value, gate = g.node("SPLIT", [second, z], [(1, h), (1, h)], f"split{i}", numSplits=2)
        gated = op("MUL", value, op("LOGISTIC", gate, shape=(1, h), name=f"s{i}"), shape=(1, h), name=f"gated{i}")
        total = op("ADD", u, gated, shape=(1, h), name=f"total{i}")
        mean = op("MEAN", total, second, shape=(1, 1), name=f"mean{i}", keepDims=True)
        apart = op("SUB", total, mean, shape=(1, h), name=f"apart{i}")
        squares = op("MUL", apart, apart, shape=(1, h), name=f"squares{i}")
        variance = op("MEAN", squares, second, shape=(1, 1), name=f"variance{i}", keepDims=True)
        eps = g.constant(f"eps{i}", np.full((1, 1), layer.eps, np.float32))
        inverse = op("RSQRT", op("ADD", variance, eps, shape=(1, 1), name=f"v+{i}"), shape=(1, 1), name=f"rsqrt{i}")
        normed = op("MUL", apart, inverse, shape=(1, h), name=f"normed{i}")
        normed = op("MUL", normed, g.constant(f"norm{i}", layer.norm[0]), shape=(1, h), name=f"weighted{i}")
        u = op("ADD", normed, g.constant(f"shift{i}", layer.norm[1]), shape=(1, h), name=f"u{i}")
    names = g.constant("decoder", parts.decoder), g.constant("decoder_bias", parts.decoder_bias)
    outputs = op("FULLY_CONNECTED", u, *names, shape=(1, len(parts.decoder)), name="outputs")
    return g.content(inputs, [outputs, *states])


def _interpreter(parts: Parts) -> tuple[Any, list[int], list[int]]:
    from ai_edge_litert.interpreter import Interpreter

    made = Interpreter(model_content=model_of(parts), num_threads=1)
    made.allocate_tensors()
    inputs, outputs = made.get_input_details(), made.get_output_details()
    order = ["sample"] + [f"{part}{i}" for i in range(len(parts.layers)) for part in ("re", "im")]
    by_name = {detail["name"]: detail["index"] for detail in inputs}
    named = {detail["name"]: detail["index"] for detail in outputs}
    after = ["outputs.0"] + [f"new_{part}{i}.0" for i in range(len(parts.layers)) for part in ("re", "im")]
    return made, [by_name[name] for name in order], [named[name] for name in after]


def as_called(parts: Parts) -> Callable[[Array], Array]:
    """set_tensor, invoke, get_tensor: the states go out and in again as copies."""
    interpreter, inputs, outputs = _interpreter(parts)
    states = [np.zeros_like(interpreter.get_tensor(index)) for index in inputs[1:]]

    def step(sample: Array) -> Array:
        interpreter.set_tensor(inputs[0], sample.astype(np.float32)[None])
        for index, state in zip(inputs[1:], states, strict=True):
            interpreter.set_tensor(index, state)
        interpreter.invoke()
        states[:] = [interpreter.get_tensor(index) for index in outputs[1:]]
        result: Array = interpreter.get_tensor(outputs[0])[0]
        return result

    return step


def in_place(parts: Parts) -> Callable[[Array], Array]:
    """Views of the interpreter's own buffers; the new states are copied onto the old ones, once."""
    interpreter, inputs, outputs = _interpreter(parts)
    before, after = ([interpreter.tensor(index) for index in indices] for indices in (inputs, outputs))
    for place in before[1:]:
        place()[...] = 0

    def step(sample: Array) -> Array:
        before[0]()[0] = sample
        interpreter.invoke()
        for old, new in zip(before[1:], after[1:], strict=True):
            np.copyto(old(), new())
        result: Array = after[0]()[0].copy()
        return result

    return step
