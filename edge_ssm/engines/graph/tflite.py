"""LiteRT, or the older TFLite runtime, as an engine: the whole step as one graph, by XNNPACK where the build has it.

The interpreter's tensors are reached by their addresses: its own calls copy each of them, and a step of a small network
is mostly such calls. The state of one lane lies in the inputs; after a step the new one is copied there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from edge_ssm.engines.graph.engine import ExportedEngine
from edge_ssm.errors import ArtifactError, RunFailed
from edge_ssm.formats.containers import GraphKind
from edge_ssm.model.network import Array

try:
    from ai_edge_litert.interpreter import Interpreter
except ModuleNotFoundError:
    if int(np.__version__.partition(".")[0]) >= 2:
        raise ImportError(f"tflite-runtime can't use numpy {np.__version__}: pip install 'numpy<2'") from None
    from tflite_runtime.interpreter import Interpreter

STDERR = 2


class TfliteEngine(ExportedEngine):
    name: ClassVar[str] = "tflite"
    kind: ClassVar[GraphKind] = "tflite"

    def _open(self, threads: int) -> None:
        try:
            self._interpreter = self._loaded(threads)
            inputs, outputs = (
                {detail["name"]: detail for detail in details}
                for details in (self._interpreter.get_input_details(), self._interpreter.get_output_details())
            )
            self._check(_shapes(inputs), _shapes(outputs))
            self._chunk_runner: Any = None
            if self.graph.spec.chunk > 1:
                # Another interpreter: one that has lent itself to a runner refuses to be invoked.
                self._chunk_runner = self._loaded(threads).get_signature_runner("chunk")
            for detail in inputs.values():
                self._interpreter.tensor(detail["index"])()[...] = 0
            self._interpreter.invoke()  # what it allocates, it has allocated then
        except (ValueError, RuntimeError, SystemError) as error:
            raise ArtifactError(f"tflite graph: the runtime refuses it ({_line(error)}); export it again") from None
        self.where = f"{Interpreter.__module__.partition('.')[0]}, {threads} thread{'s' if threads > 1 else ''}"
        names = [name for slot in self._slots for name in slot.names]
        self._input, self._output = self._view(inputs["input"])[0], self._view(outputs["output"])[0]
        self._old = [self._view(inputs[name]) for name in names]
        self._new = [self._view(outputs[f"new.{name}"]) for name in names]
        self._copies = list(zip(self._old, self._new, strict=True))
        self._held = 0
        """The lane whose state is in the inputs."""
        self._others = [[np.zeros_like(array) for array in self._old] for _ in range(self.lanes)]
        self.reset()

    def _loaded(self, threads: int) -> Any:
        with _silent():
            interpreter = Interpreter(model_content=self.graph.content, num_threads=threads)
            interpreter.allocate_tensors()
        return interpreter

    def _view(self, detail: dict[str, Any]) -> Array:
        """A tensor's memory as an array that the interpreter does not know of: beside known ones it won't run."""
        counted = self._interpreter.tensor(detail["index"])()
        memory = (ctypes.c_float * counted.size).from_address(counted.ctypes.data)
        view: Array = np.frombuffer(memory, dtype=np.float32).reshape(counted.shape)
        return view

    def _hold(self, lane: int) -> None:
        if lane == self._held:
            return
        for old, kept, coming in zip(self._old, self._others[self._held], self._others[lane], strict=True):
            np.copyto(kept, old)
            np.copyto(old, coming)
        self._held = lane

    def _advance(self, lane: int, z: Array, outputs: Array) -> None:
        self._hold(lane)
        done = 0
        try:
            if self._chunk_runner is not None:
                done = self._advance_chunks(z, outputs)
            for t in range(done, len(z)):
                self._input[...] = z[t]
                self._interpreter.invoke()
                for old, new in self._copies:
                    np.copyto(old, new)
                outputs[t] = self._output
        except (ValueError, RuntimeError) as error:
            raise RunFailed(f"engine tflite: the runtime failed in a step ({_line(error)})") from None

    def _advance_chunks(self, z: Array, outputs: Array) -> int:
        """As many samples as whole chunks have; returns their number."""
        size = self.graph.spec.chunk
        names = [name for slot in self._slots for name in slot.names]
        whole = len(z) // size * size
        for begin in range(0, whole, size):
            states = dict(zip(names, self._old, strict=True))
            made = self._chunk_runner(input=z[begin : begin + size].astype(np.float32), **states)
            for name, old in states.items():
                np.copyto(old, made[f"new.{name}"])
            outputs[begin : begin + size] = made["output"]
        return whole

    def _read(self, lane: int) -> list[tuple[Array, Array]]:
        self._hold(lane)
        arrays = [array.copy() for array in self._old]
        return list(zip(arrays[::2], arrays[1::2], strict=True))

    def _write(self, lane: int, states: list[tuple[Array, Array]]) -> None:
        self._hold(lane)
        for old, new in zip(self._old, (part for parts in states for part in parts), strict=True):
            np.copyto(old, new)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The runtime greets on stderr, past Python, and nothing turns that off; what fails it raises as well."""
    try:
        kept = os.dup(STDERR)
    except OSError:  # there is none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, STDERR)
    try:
        yield
    finally:
        os.dup2(kept, STDERR)
        os.close(kept)
        os.close(nowhere)


def _shapes(details: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of float32 tensors."""
    return {
        name: tuple(int(size) for size in detail["shape"])
        for name, detail in details.items()
        if detail["dtype"] == np.float32
    }


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
