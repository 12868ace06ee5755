"""The ONNX Runtime engine: the whole step as one graph, on TensorRT, CUDA or the CPU, whichever starts first.

States stay on the device that runs the graph. Each lane has two sets of state tensors: a step reads one set and writes
the other, and the next step swaps them, so that no state is copied.
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

from edge_ssm.engines.entries import GPU_NODES
from edge_ssm.engines.graph.engine import ExportedEngine, error_line
from edge_ssm.errors import ArtifactError, RunFailed
from edge_ssm.formats.containers import GraphKind
from edge_ssm.formats.exported import ANY_LENGTH
from edge_ssm.model.network import Array

TENSORRT, CUDA, CPU = "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"
TENSORRT_LIBRARIES = ("libnvinfer.so.10", "libnvinfer.so.8")
FATAL = 4
"""ONNX Runtime's log level for fatal errors only: this module reports what does not start, in one line."""


@dataclass
class _Lane:
    """The states of one lane."""

    sets: tuple[dict[str, Any], dict[str, Any]]
    """Two sets of state tensors: name -> OrtValue."""
    current: int = 0
    """Index of the set that holds the state."""


class OnnxEngine(ExportedEngine):
    """Runs a network as an ONNX graph in ONNX Runtime."""

    name: ClassVar[str] = "onnx"
    kind: ClassVar[GraphKind] = "onnx"

    def _open(self, threads: int) -> None:
        preferred, self.warning = select_providers(ort.get_available_providers())
        self._session = self._create_session(preferred, threads)
        active = self._session.get_providers()
        if preferred[0] != CPU and active[0] == CPU:
            self.warning = f"onnxruntime cannot start its {preferred[0]}; engine onnx runs on the CPU"
        self.where = f"{active[0]}, {threads} thread{'s' if threads > 1 else ''}"
        self._device = "cpu" if active[0] == CPU else "cuda"
        self._check(_shapes(self._session.get_inputs()), _shapes(self._session.get_outputs()))
        self._lanes = [_Lane((self._zeros(), self._zeros())) for _ in range(self.lanes)]
        d_input, d_output = self.network.d_input, self.network.d_output
        self._input, self._output = np.zeros((1, d_input), np.float32), np.zeros((1, d_output), np.float32)
        self._bindings = [
            [self._binding(lane, index, self._input, self._output) for index in (0, 1)] for lane in self._lanes
        ]

    def _create_session(self, preferred: Sequence[str], threads: int) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = FATAL
        # This sets flush-to-zero in the runtime's own threads, and for good in the calling thread, whose environment
        # ``ExportedEngine`` restores.
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        # Without this, sums of two int8 products saturate on some x86 processors.
        options.add_session_config_entry("session.x64quantprecision", "1")
        ort.set_default_logger_severity(FATAL)
        try:
            # The runtime prints the failure of a provider to stdout, which may carry the decisions.
            with contextlib.redirect_stdout(io.StringIO()):
                return ort.InferenceSession(self.graph.content, options, providers=list(preferred))
        except Exception as error:  # its exceptions have no common base
            raise ArtifactError(f"onnx graph: ONNX Runtime refuses it ({error_line(error)}); export it again") from None

    def _zeros(self) -> dict[str, Any]:
        return {
            name: ort.OrtValue.ortvalue_from_numpy(np.zeros(tensor.shape, np.float32), self._device, 0)
            for tensor in self._tensors
            for name in tensor.names
        }

    def _binding(self, lane: _Lane, current: int, samples: Array, outputs: Array) -> Any:
        """Return a call that reads the states of set ``current`` and writes the other set.

        It holds the addresses of ``samples`` and ``outputs``: the arrays must outlive it.
        """
        binding = self._session.io_binding()
        binding.bind_input("input", "cpu", 0, np.float32, samples.shape, samples.ctypes.data)
        binding.bind_output("output", "cpu", 0, np.float32, outputs.shape, outputs.ctypes.data)
        for name, value in lane.sets[current].items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(f"new.{name}", lane.sets[1 - current][name])
        return binding

    def _advance(self, lane: int, z: Array, outputs: Array) -> None:
        states = self._lanes[lane]
        if self.graph.spec.chunk == ANY_LENGTH and len(z) > 1:
            samples, results = z.astype(np.float32), np.empty(outputs.shape, np.float32)
            self._call(self._binding(states, states.current, samples, results))
            states.current = 1 - states.current
            outputs[...] = results
            return
        bindings, input_, output = self._bindings[lane], self._input, self._output
        for t in range(len(z)):
            input_[0] = z[t]
            self._call(bindings[states.current])
            states.current = 1 - states.current
            outputs[t] = output[0]

    def _call(self, binding: Any) -> None:
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # its exceptions have no common base
            raise RunFailed(f"engine onnx: ONNX Runtime failed in a step ({error_line(error)})") from None

    def _read(self, lane: int) -> list[tuple[Array, Array]]:
        state = self._lanes[lane].sets[self._lanes[lane].current]
        return [(state[re].numpy().copy(), state[im].numpy().copy()) for re, im in (t.names for t in self._tensors)]

    def _write(self, lane: int, states: list[tuple[Array, Array]]) -> None:
        state = self._lanes[lane].sets[self._lanes[lane].current]
        for tensor, parts in zip(self._tensors, states, strict=True):
            for name, part in zip(tensor.names, parts, strict=True):
                state[name].update_inplace(part)


def select_providers(built: Sequence[str], nodes: Sequence[str] = GPU_NODES) -> tuple[list[str], str]:
    """Return the execution providers to try, in order, and a warning if GPU providers are left out.

    ``built`` are the providers that the runtime was built with, ``nodes`` the device files of a GPU's driver.
    """
    preferred = [name for name in (TENSORRT, CUDA) if name in built]
    if not preferred:
        return [CPU], ""
    if not any(os.path.exists(node) for node in nodes):
        # Trying them would print a page of errors before the runtime falls back to the CPU.
        return [CPU], f"onnxruntime-gpu finds no GPU here (none of {', '.join(nodes)}); engine onnx runs on the CPU"
    if TENSORRT in preferred and not any(_loads(library) for library in TENSORRT_LIBRARIES):
        preferred.remove(TENSORRT)
    return [*preferred, CPU], ""


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _shapes(tensors: Sequence[Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the float32 tensors by name. A variable number of samples counts as one."""
    return {
        tensor.name: tuple(size if isinstance(size, int) else 1 for size in tensor.shape)
        for tensor in tensors
        if tensor.type == "tensor(float)"
    }
