"""The LiteRT engine, or that of the older TFLite runtime: the whole step as one graph, on XNNPACK if it is built in.

The engine accesses the interpreter's tensors by their addresses. The interpreter's own methods copy every tensor, and
such calls would be most of a small network's step.

The state of one lane is in the input tensors; after a step, the new state is copied there. The states of the other
lanes are kept outside, and swapped in when their lane is stepped.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from edge_ssm.engines.graph.engine import ExportedEngine, error_line
from edge_ssm.errors import ArtifactError, RunFailed
from edge_ssm.formats.containers import GraphKind
from edge_ssm.model.network import Array

try:
    from ai_edge_litert.interpreter import Interpreter
except ModuleNotFoundError:
    if int(np.__version__.partition(".")[0]) >= 2:
        raise ImportError(f"tflite-runtime cannot use numpy {np.__version__}: pip install 'numpy<2'") from None
    from tflite_runtime.interpreter import Interpreter

STDERR = 2


class TfliteEngine(ExportedEngine):
    """Runs a network as a TFLite graph in LiteRT or the TFLite runtime."""

    name: ClassVar[str] = "tflite"
    kind: ClassVar[GraphKind] = "tflite"

    def _open(self, threads: int) -> None:
        try:
            self._interpreter = self._create_interpreter(threads)
            inputs, outputs = (
                {detail["name"]: detail for detail in details}
                for details in (self._interpreter.get_input_details(), self._interpreter.get_output_details())
            )
            self._check(_shapes(inputs), _shapes(outputs))
            self._chunk_runner: Any = None
            if self.graph.spec.chunk > 1:
                # A second interpreter, because one that has a signature runner cannot be invoked directly.
                self._chunk_runner = self._create_interpreter(threads).get_signature_runner("chunk")
            for detail in inputs.values():
                self._interpreter.tensor(detail["index"])()[...] = 0
            self._interpreter.invoke()  # so that it allocates all its memory now
        except (ValueError, RuntimeError, SystemError) as error:
            raise ArtifactError(
                f"tflite graph: the runtime refuses it ({error_line(error)}); export it again"
            ) from None
        self.where = f"{Interpreter.__module__.partition('.')[0]}, {threads} thread{'s' if threads > 1 else ''}"
        names = [name for tensor in self._tensors for name in tensor.names]
        self._input, self._output = self._view(inputs["input"])[0], self._view(outputs["output"])[0]
        self._old = [self._view(inputs[name]) for name in names]
        self._new = [self._view(outputs[f"new.{name}"]) for name in names]
        self._copies = list(zip(self._old, self._new, strict=True))
        self._current = 0
        """The lane whose state is in the input tensors."""
        self._saved = [[np.zeros_like(array) for array in self._old] for _ in range(self.lanes)]
        self.reset()

    def _create_interpreter(self, threads: int) -> Any:
        with _silent():
            interpreter = Interpreter(model_content=self.graph.content, num_threads=threads)
            interpreter.allocate_tensors()
        return interpreter

    def _view(self, detail: dict[str, Any]) -> Array:
        """Return a tensor's memory as an array.

        The interpreter counts references to the arrays that it returns, and refuses to run while there are any. It does
        not know of this one.
        """
        tensor = self._interpreter.tensor(detail["index"])()
        memory = (ctypes.c_float * tensor.size).from_address(tensor.ctypes.data)
        view: Array = np.frombuffer(memory, dtype=np.float32).reshape(tensor.shape)
        return view

    def _swap_in(self, lane: int) -> None:
        """Put the state of ``lane`` into the input tensors."""
        if lane == self._current:
            return
        for old, outgoing, incoming in zip(self._old, self._saved[self._current], self._saved[lane], strict=True):
            np.copyto(outgoing, old)
            np.copyto(old, incoming)
        self._current = lane

    def _advance(self, lane: int, z: Array, outputs: Array) -> None:
        self._swap_in(lane)
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
            raise RunFailed(f"engine tflite: the runtime failed in a step ({error_line(error)})") from None

    def _advance_chunks(self, z: Array, outputs: Array) -> int:
        """Step as many samples as fill whole chunks, and return their number."""
        size = self.graph.spec.chunk
        names = [name for tensor in self._tensors for name in tensor.names]
        whole = len(z) // size * size
        for begin in range(0, whole, size):
            states = dict(zip(names, self._old, strict=True))
            results = self._chunk_runner(input=z[begin : begin + size].astype(np.float32), **states)
            for name, old in states.items():
                np.copyto(old, results[f"new.{name}"])
            outputs[begin : begin + size] = results["output"]
        return whole

    def _read(self, lane: int) -> list[tuple[Array, Array]]:
        self._swap_in(lane)
        arrays = [array.copy() for array in self._old]
        return list(zip(arrays[::2], arrays[1::2], strict=True))

    def _write(self, lane: int, states: list[tuple[Array, Array]]) -> None:
        self._swap_in(lane)
        for old, new in zip(self._old, (part for parts in states for part in parts), strict=True):
            np.copyto(old, new)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Discard what is written to stderr. The runtime prints a greeting there that no option turns off."""
    try:
        copy = os.dup(STDERR)
    except OSError:  # stderr is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, STDERR)
    try:
        yield
    finally:
        os.dup2(copy, STDERR)
        os.close(copy)
        os.close(nowhere)


def _shapes(details: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the float32 tensors by name."""
    return {
        name: tuple(int(size) for size in detail["shape"])
        for name, detail in details.items()
        if detail["dtype"] == np.float32
    }
