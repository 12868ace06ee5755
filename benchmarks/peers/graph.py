"""ONNX Runtime and OpenVINO: the step as an ONNX graph in real arithmetic, its states bound to buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edge_ssm.network import Array
from peers.parts import Parts

OPSET, IR = 20, 10
"""Opset 20 has Gelu."""


def model_of(parts: Parts) -> bytes:
    """Inputs ``sample`` (1, d_input), ``re0``, ``im0``, ...; outputs ``outputs`` (1, d_output), ``new_re0``, ..."""
    from onnx import TensorProto, checker, helper, numpy_helper

    nodes, weights, inputs, outputs = [], [], [], []

    def constant(name: str, value: Any) -> str:
        array = np.asarray(value)
        wide = array if array.dtype == np.int64 else array.astype(np.float32)
        weights.append(numpy_helper.from_array(np.ascontiguousarray(wide), name))
        return name

    def node(kind: str, *names: str, to: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, list(names), [to], **attributes))
        return to

    def info(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    inputs.append(info("sample", 1, len(parts.mean)))
    centred = node("Sub", "sample", constant("mean", parts.mean), to="centred")
    scaled = node("Mul", centred, constant("scale", parts.scale), to="scaled")
    names = constant("encoder", parts.encoder.T), constant("encoder_bias", parts.encoder_bias)
    u = node("Gemm", scaled, *names, to="u")
    axis = constant("axis", np.array([-1]))
    for i, layer in enumerate(parts.layers):
        k, n = layer.delta[0].shape
        inputs += [info(f"re{i}", k, n), info(f"im{i}", k, n)]
        outputs += [info(f"new_re{i}", k, n), info(f"new_im{i}", k, n)]
        dr, di = (constant(f"d{part}{i}", layer.delta[j]) for j, part in enumerate("ri"))
        cr, ci = (constant(f"c{part}{i}", layer.C[j]) for j, part in enumerate("ri"))
        v = u
        if k < parts.h:
            v = node("Gather", u, constant(f"active{i}", layer.active), to=f"v{i}", axis=1)
        column = node("Reshape", v, constant(f"shape{i}", np.array([k, 1])), to=f"column{i}")
        re, im = f"re{i}", f"im{i}"
        turned = node("Mul", di, im, to=f"a{i}")
        kept = node("Add", re, node("Mul", dr, re, to=f"b{i}"), to=f"c{i}")
        driven = node("Add", node("Sub", kept, turned, to=f"d{i}"), column, to=f"new_re{i}")
        kept = node("Add", im, node("Mul", dr, im, to=f"e{i}"), to=f"f{i}")
        other = node("Add", kept, node("Mul", di, re, to=f"g{i}"), to=f"new_im{i}")
        both = node("Add", node("Mul", cr, driven, to=f"h{i}"), node("Mul", ci, other, to=f"j{i}"), to=f"k{i}")
        summed = node("ReduceSum", both, axis, to=f"l{i}", keepdims=0)
        through = node("Mul", constant(f"D{i}", layer.D), v, to=f"m{i}")
        g = node("Gelu", node("Add", summed, through, to=f"y{i}"), to=f"gelu{i}")
        names = constant(f"weight{i}", layer.weight.T), constant(f"bias{i}", layer.bias)
        z = node("Gemm", g, *names, to=f"z{i}")
        nodes.append(helper.make_node("Split", [z], [f"value{i}", f"gate{i}"], axis=1, num_outputs=2))
        gated = node("Mul", f"value{i}", node("Sigmoid", f"gate{i}", to=f"s{i}"), to=f"gated{i}")
        names = constant(f"norm{i}", layer.norm[0]), constant(f"shift{i}", layer.norm[1])
        total = node("Add", u, gated, to=f"total{i}")
        u = node("LayerNormalization", total, *names, to=f"u{i}", axis=-1, epsilon=layer.eps)
    names = constant("decoder", parts.decoder.T), constant("decoder_bias", parts.decoder_bias)
    node("Gemm", u, *names, to="outputs")
    outputs.insert(0, info("outputs", 1, len(parts.decoder)))
    graph = helper.make_graph(nodes, "step", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def _buffers(parts: Parts) -> list[dict[str, Array]]:
    """Two sets of states: each step reads one and writes the other, so that none is copied."""
    names = [(f"{part}{i}", layer.delta[0].shape) for i, layer in enumerate(parts.layers) for part in ("re", "im")]
    return [{name: np.zeros(shape, dtype=np.float32) for name, shape in names} for _ in range(2)]


def _alternating(run: list[Callable[[], None]], sample_in: Array, output: Array) -> Callable[[Array], Array]:
    turn = 0

    def step(sample: Array) -> Array:
        nonlocal turn
        sample_in[0] = sample
        run[turn]()
        turn = 1 - turn
        result: Array = output[0].copy()
        return result

    return step


def onnxruntime_step(parts: Parts, device: str = "cpu") -> Callable[[Array], Array]:
    """``device``: where the states lie and the graph runs, cpu or cuda. Raises LookupError without such a provider."""
    import onnxruntime as ort

    provider = f"{device.upper()}ExecutionProvider"
    if provider not in ort.get_available_providers():
        raise LookupError(f"{provider} is not in this build of ONNX Runtime")

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    session = ort.InferenceSession(model_of(parts), options, providers=[provider])
    if provider not in session.get_providers():
        raise LookupError(f"{provider} does not start here")
    sample, output = np.zeros((1, len(parts.mean)), np.float32), np.zeros((1, len(parts.decoder)), np.float32)
    sets = [
        {name: ort.OrtValue.ortvalue_from_numpy(array, device, 0) for name, array in states.items()}
        for states in _buffers(parts)
    ]

    def bound(name: str, array: Array, bind: Any) -> None:
        bind(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)

    bindings = []
    for old, new in (sets, sets[::-1]):
        binding = session.io_binding()
        bound("sample", sample, binding.bind_input)
        bound("outputs", output, binding.bind_output)
        for name in old:
            binding.bind_ortvalue_input(name, old[name])
            binding.bind_ortvalue_output(f"new_{name}", new[name])
        bindings.append(binding)
    # The bindings know addresses only: the arrays live as long as what runs on them.
    run = [lambda binding=binding, kept=sets: session.run_with_iobinding(binding) for binding in bindings]
    return _alternating(run, sample, output)


def openvino_step(parts: Parts) -> Callable[[Array], Array]:
    import openvino as ov

    core = ov.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(model_of(parts)), "CPU", settings)
    sample, output = np.zeros((1, len(parts.mean)), np.float32), np.zeros((1, len(parts.decoder)), np.float32)
    sets = _buffers(parts)
    requests = []
    for old, new in (sets, sets[::-1]):
        request = compiled.create_infer_request()
        given = {"sample": sample, "outputs": output} | old | {f"new_{name}": new[name] for name in new}
        for name, array in given.items():
            request.set_tensor(name, ov.Tensor(array, shared_memory=True))
        requests.append(request)
    run = [lambda request=request, kept=sets: request.infer() for request in requests]
    return _alternating(run, sample, output)
