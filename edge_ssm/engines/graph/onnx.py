"""ONNX Runtime as an engine: the whole step as one graph, on TensorRT, CUDA or the CPU, whichever starts first.

States stay where the graph runs. Each lane has two sets of them that take turns: a step reads one and writes the other,
so that none is copied.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnxruntime as ort

from edge_ssm.engines.graph.engine import ExportedEngine
from edge_ssm.engines.registry import GPU_NODES
from edge_ssm.errors import ArtifactError, RunFailed
from edge_ssm.formats.containers import GraphKind
from edge_ssm.formats.exported import ANY_LENGTH
from edge_ssm.model.network import Array

TENSORRT, CUDA, CPU = "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"
TENSORRT_LIBRARIES = ("libnvinfer.so.10", "libnvinfer.so.8")
FATAL = 4
"""Log level: what does not start is said by us, in one line."""


@dataclass
class _Lane:
    sets: tuple[dict[str, Any], dict[str, Any]]
    """Name -> OrtValue."""
    turn: int = 0
    """Which set holds the state."""


class OnnxEngine(ExportedEngine):
    name: ClassVar[str] = "onnx"
    kind: ClassVar[GraphKind] = "onnx"

    def _open(self, threads: int) -> None:
        asked, self.warning = providers(ort.get_available_providers())
        self._session = self._session_on(asked, threads)
        found = self._session.get_providers()
        if asked[0] != CPU and found[0] == CPU:
            self.warning = f"{asked[0]} of this onnxruntime does not start here; engine onnx runs on the CPU"
        self.where = f"{found[0]}, {threads} thread{'s' if threads > 1 else ''}"
        self._device = "cpu" if found[0] == CPU else "cuda"
        self._check(_shapes(self._session.get_inputs()), _shapes(self._session.get_outputs()))
        self._lanes = [_Lane((self._zeros(), self._zeros())) for _ in range(self.lanes)]
        d_input, d_output = self.network.d_input, self.network.d_output
        self._input, self._output = np.zeros((1, d_input), np.float32), np.zeros((1, d_output), np.float32)
        self._bindings = [
            [self._binding(lane, turn, self._input, self._output) for turn in (0, 1)] for lane in self._lanes
        ]

    def _session_on(self, asked: Sequence[str], threads: int) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = FATAL
        # For its own threads. The calling one is left so for good by it, but for what ``exported`` does around it.
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        # Integer products of full range: without it, some x86 processors saturate between two of them.
        options.add_session_config_entry("session.x64quantprecision", "1")
        ort.set_default_logger_severity(FATAL)
        try:
            # A provider that fails is told on stdout, where the decisions go.
            with contextlib.redirect_stdout(io.StringIO()):
                return ort.InferenceSession(self.graph.content, options, providers=list(asked))
        except Exception as error:  # its exceptions have no common base
            raise ArtifactError(f"onnx graph: ONNX Runtime refuses it ({_line(error)}); export it again") from None

    def _zeros(self) -> dict[str, Any]:
        return {
            name: ort.OrtValue.ortvalue_from_numpy(np.zeros(slot.shape, np.float32), self._device, 0)
            for slot in self._slots
            for name in slot.names
        }

    def _binding(self, lane: _Lane, turn: int, samples: Array, outputs: Array) -> Any:
        """A call from the set of ``turn`` to the other one. It knows addresses only: the arrays must outlive it."""
        binding = self._session.io_binding()
        binding.bind_input("input", "cpu", 0, np.float32, samples.shape, samples.ctypes.data)
        binding.bind_output("output", "cpu", 0, np.float32, outputs.shape, outputs.ctypes.data)
        for name, value in lane.sets[turn].items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(f"new.{name}", lane.sets[1 - turn][name])
        return binding

    def _advance(self, lane: int, z: Array, outputs: Array) -> None:
        states = self._lanes[lane]
        if self.graph.spec.chunk == ANY_LENGTH and len(z) > 1:
            samples, made = z.astype(np.float32), np.empty(outputs.shape, np.float32)
            self._call(self._binding(states, states.turn, samples, made))
            states.turn = 1 - states.turn
            outputs[...] = made
            return
        bindings, input_, output = self._bindings[lane], self._input, self._output
        for t in range(len(z)):
            input_[0] = z[t]
            self._call(bindings[states.turn])
            states.turn = 1 - states.turn
            outputs[t] = output[0]

    def _call(self, binding: Any) -> None:
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # its exceptions have no common base
            raise RunFailed(f"engine onnx: ONNX Runtime failed in a step ({_line(error)})") from None

    def _read(self, lane: int) -> list[tuple[Array, Array]]:
        held = self._lanes[lane].sets[self._lanes[lane].turn]
        return [(held[re].numpy().copy(), held[im].numpy().copy()) for re, im in (slot.names for slot in self._slots)]

    def _write(self, lane: int, states: list[tuple[Array, Array]]) -> None:
        held = self._lanes[lane].sets[self._lanes[lane].turn]
        for slot, parts in zip(self._slots, states, strict=True):
            for name, part in zip(slot.names, parts, strict=True):
                held[name].update_inplace(part)


def providers(built: Sequence[str], nodes: Sequence[str] = GPU_NODES) -> tuple[list[str], str]:
    """Which of a build's providers to ask for, in order, and a warning where its GPU ones are left out."""
    wanted = [name for name in (TENSORRT, CUDA) if name in built]
    if not wanted:
        return [CPU], ""
    if not any(os.path.exists(node) for node in nodes):
        # Asking all the same would print a page of errors and then do this.
        return [CPU], f"onnxruntime-gpu finds no GPU here (none of {', '.join(nodes)}); engine onnx runs on the CPU"
    if TENSORRT in wanted and not any(_loads(library) for library in TENSORRT_LIBRARIES):
        wanted.remove(TENSORRT)
    return [*wanted, CPU], ""


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _shapes(tensors: Sequence[Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of float32 tensors; an open number of samples counts as one."""
    return {
        tensor.name: tuple(size if isinstance(size, int) else 1 for size in tensor.shape)
        for tensor in tensors
        if tensor.type == "tensor(float)"
    }


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
