"""The CPU engine: one call of machine code (``kernel``) runs T samples of all lanes through the whole network, in
float32. Neither Numba nor LLVM is in the process: ``compiled`` finds or makes the code.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from edge_ssm.engines.base import Engine, refusal
from edge_ssm.engines.cpu import cache as kernel_cache
from edge_ssm.engines.cpu import layout
from edge_ssm.model.network import Array, Network


class CpuEngine(Engine):
    name: ClassVar[str] = "cpu"
    dtype: ClassVar[npt.DTypeLike] = np.dtype(np.float32)
    widen: ClassVar[bool] = False
    """Whether float16 and int8 mixing weights are taken as float32."""

    def __init__(self, network: Network, lanes: int = 1) -> None:
        super().__init__(network, lanes)
        kernel = kernel_cache.load()
        self._layout = layout.pack(network, self._step_parameters, lanes, self.widen)
        # Of a small network's step the call is the most: a single step has its own arrays, whose addresses stand.
        self._step_shape = (network.d_input,) if lanes == 1 else (lanes, network.d_input)
        self._sample = np.empty(self._step_shape)
        self._output = np.empty((*self._step_shape[:-1], network.d_output), dtype=np.float32)
        self._step_call = self._call_of(self._sample, self._output, 1)
        self._step_address = int(self._step_call.ctypes.data)
        self._run_long, self._run_step = kernel.run, kernel.run_briefly

    def _call_of(self, samples: Array, outputs: Array, steps: int) -> Array:
        """The kernel's argument; ``samples`` and ``outputs`` must outlive it."""
        packed = self._layout
        arrays = packed.weights, packed.table, packed.scale, packed.memory, samples, outputs
        return np.array([*(array.ctypes.data for array in arrays), steps], dtype=np.int64)

    def step(self, sample: npt.ArrayLike, out: Array | None = None) -> Array:
        x = sample if isinstance(sample, np.ndarray) else np.asarray(sample)
        fits = out is None or (out.shape == self._output.shape and out.dtype == self.dtype)
        if x.shape != self._step_shape or not fits:
            return super().step(x, out)
        self._sample[...] = x
        if not self._run_step(self._step_address):
            raise refusal(self.network, self._sample.reshape(1, self.lanes, -1))
        if out is None:
            outputs: Array = self._output.copy()
            return outputs
        out[...] = self._output
        return out

    def _run(self, samples: Array, outputs: Array) -> None:
        call = self._call_of(samples, outputs, len(samples))
        if not self._run_long(int(call.ctypes.data)):
            raise refusal(self.network, samples)

    def reset(self, lane: int | None = None) -> None:
        lanes = slice(None) if lane is None else lane
        for real, imag in self._layout.slots:
            self._layout.memory[real[lanes]] = 0
            self._layout.memory[imag[lanes]] = 0

    def _state(self) -> tuple[Array, ...]:
        memory = self._layout.memory
        return tuple((memory[real] + 1j * memory[imag]).astype(np.complex64) for real, imag in self._layout.slots)

    def _set_state(self, state: tuple[Array, ...]) -> None:
        for (real, imag), new in zip(self._layout.slots, state, strict=True):
            self._layout.memory[real] = new.real
            self._layout.memory[imag] = new.imag


class WideCpuEngine(CpuEngine):
    """The same with small mixing weights widened once instead of at each step: more to read, less to do."""

    name: ClassVar[str] = "cpu-float32"
    widen: ClassVar[bool] = True
