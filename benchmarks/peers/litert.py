"""LiteRT: the step as a TFLite file (``edge_ssm.graphs``), run by XNNPACK on one thread, driven in its own two ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edge_ssm.formats import exported
from edge_ssm.model.network import Array
from peers.parts import Parts


def _interpreter(parts: Parts) -> tuple[Any, list[int], list[int]]:
    from ai_edge_litert.interpreter import Interpreter

    graph = exported.build("tflite", parts.network)
    made = Interpreter(model_content=graph.content, num_threads=1)
    made.allocate_tensors()
    inputs, outputs = made.get_input_details(), made.get_output_details()
    by_name = {detail["name"]: detail["index"] for detail in inputs}
    named = {detail["name"]: detail["index"] for detail in outputs}
    states = [name for layer in graph.spec.states for state in layer for name in (state.re, state.im)]
    return made, [by_name[name] for name in ["input", *states]], [named["output"], *(named[f"new.{n}"] for n in states)]


def as_called(parts: Parts) -> Callable[[Array], Array]:
    """set_tensor, invoke, get_tensor: the states go out and in again as copies."""
    interpreter, inputs, outputs = _interpreter(parts)
    states = [np.zeros_like(interpreter.get_tensor(index)) for index in inputs[1:]]

    def step(sample: Array) -> Array:
        interpreter.set_tensor(inputs[0], ((sample - parts.mean) * parts.scale).astype(np.float32)[None])
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
        before[0]()[0] = (sample - parts.mean) * parts.scale
        interpreter.invoke()
        for old, new in zip(before[1:], after[1:], strict=True):
            np.copyto(old(), new())
        result: Array = after[0]()[0].copy()
        return result

    return step
