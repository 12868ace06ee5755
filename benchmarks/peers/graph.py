"""ONNX Runtime and OpenVINO: the step as an ONNX graph (``edge_ssm.graphs``), its states bound to buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edge_ssm.formats import exported
from edge_ssm.model.network import Array
from peers.parts import Parts


def _normalised(parts: Parts, sample: Array) -> Array:
    result: Array = (sample - parts.mean) * parts.scale
    return result


def _buffers(parts: Parts) -> list[dict[str, Array]]:
    """Two sets of states: each step reads one and writes the other, so that none is copied."""
    states = [state for layer in exported.build("onnx", parts.network).spec.states for state in layer]
    names = [(name, (len(state.channels), state.pairs)) for state in states for name in (state.re, state.im)]
    return [{name: np.zeros(shape, dtype=np.float32) for name, shape in names} for _ in range(2)]


def _alternating(
    parts: Parts, run: list[Callable[[], None]], sample_in: Array, output: Array
) -> Callable[[Array], Array]:
    turn = 0

    def step(sample: Array) -> Array:
        nonlocal turn
        sample_in[0] = _normalised(parts, sample)
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
    session = ort.InferenceSession(exported.build("onnx", parts.network).content, options, providers=[provider])
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
        bound("input", sample, binding.bind_input)
        bound("output", output, binding.bind_output)
        for name in old:
            binding.bind_ortvalue_input(name, old[name])
            binding.bind_ortvalue_output(f"new.{name}", new[name])
        bindings.append(binding)
    # The bindings know addresses only: the arrays live as long as what runs on them.
    run = [lambda binding=binding, kept=sets: session.run_with_iobinding(binding) for binding in bindings]
    return _alternating(parts, run, sample, output)


def openvino_step(parts: Parts) -> Callable[[Array], Array]:
    import openvino as ov

    core = ov.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(exported.build("onnx", parts.network).content), "CPU", settings)
    sample, output = np.zeros((1, len(parts.mean)), np.float32), np.zeros((1, len(parts.decoder)), np.float32)
    sets = _buffers(parts)
    requests = []
    for old, new in (sets, sets[::-1]):
        request = compiled.create_infer_request()
        given = {"input": sample, "output": output} | old | {f"new.{name}": new[name] for name in new}
        for name, array in given.items():
            request.set_tensor(name, ov.Tensor(array, shared_memory=True))
        requests.append(request)
    run = [lambda request=request, kept=sets: request.infer() for request in requests]
    return _alternating(parts, run, sample, output)
