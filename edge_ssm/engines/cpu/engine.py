"""The CPU engine: one call of machine code takes T samples of all lanes through the whole network, in float32.

The machine code is compiled from ``kernel.py`` ahead of time, in another process, and kept in a file (``cache``). The
process that streams loads that file and calls it through ``ctypes``; Numba and LLVM are never imported here.

The engine itself only prepares the call. ``layout.pack`` copies the network into four flat arrays, and the kernel's
single argument is an array of addresses: of those four, of the samples, of the outputs, and the number of samples.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from edge_ssm.engines.base import Engine, sample_error
from edge_ssm.engines.cpu import cache as kernel_cache
from edge_ssm.engines.cpu import layout
from edge_ssm.engines.options import DEFAULT_OPTIONS, EngineOptions
from edge_ssm.model.network import Array, Network


class CpuEngine(Engine):
    """Runs a network on one CPU core, with mixing weights in the type in which they are stored."""

    name: ClassVar[str] = "cpu"
    dtype: ClassVar[npt.DTypeLike] = np.dtype(np.float32)
    widen: ClassVar[bool] = False
    """Whether float16 and int8 mixing weights are converted to float32 when the engine is created."""

    def __init__(self, network: Network, options: EngineOptions = DEFAULT_OPTIONS) -> None:
        super().__init__(network, options)
        kernel = kernel_cache.load()
        self._run_kernel, self._run_kernel_briefly = kernel.run, kernel.run_briefly
        self._layout = layout.pack(network, self._step_parameters, self.lanes, self.widen)
        # The call itself is most of a small network's step. ``step`` therefore copies its sample into an array that
        # is always the same, so that the kernel's argument is built only once.
        self._sample_shape = (network.d_input,) if self.lanes == 1 else (self.lanes, network.d_input)
        self._sample = np.empty(self._sample_shape)
        self._output = np.empty((*self._sample_shape[:-1], network.d_output), dtype=np.float32)
        self._step_arguments = self._kernel_arguments(self._sample, self._output, 1)
        self._step_address = int(self._step_arguments.ctypes.data)

    def _kernel_arguments(self, samples: Array, outputs: Array, steps: int) -> Array:
        """Return the kernel's argument (``layout.ARGUMENTS``). It holds addresses: the arrays must outlive it."""
        packed = self._layout
        arrays = packed.weights, packed.table, packed.scale, packed.memory, samples, outputs
        return np.array([*(array.ctypes.data for array in arrays), steps], dtype=np.int64)

    def step(self, sample: npt.ArrayLike, out: Array | None = None) -> Array:
        """Advance every lane by one sample and return the outputs, written to ``out`` if it is given.

        This is ``Engine.step`` without allocations. Anything unusual, such as a wrong shape, goes to the general
        method of the base class, which reports it.
        """
        x = sample if isinstance(sample, np.ndarray) else np.asarray(sample)
        out_fits = out is None or (out.shape == self._output.shape and out.dtype == self.dtype)
        if x.shape != self._sample_shape or not out_fits:
            return super().step(x, out)
        self._sample[...] = x
        if not self._run_kernel_briefly(self._step_address):
            raise sample_error(self.network, self._sample.reshape(1, self.lanes, -1))
        if out is None:
            outputs: Array = self._output.copy()
            return outputs
        out[...] = self._output
        return out

    def _run(self, samples: Array, outputs: Array) -> None:
        arguments = self._kernel_arguments(samples, outputs, len(samples))
        if not self._run_kernel(int(arguments.ctypes.data)):
            raise sample_error(self.network, samples)

    # The kernel keeps the states in its own order, in ``memory``. ``state_indices`` says, for each block, where the
    # real and the imaginary part of every state lie there.

    def reset(self, lane: int | None = None) -> None:
        """Set the state of one lane, or of all lanes, to zero."""
        lanes = slice(None) if lane is None else lane
        for real, imag in self._layout.state_indices:
            self._layout.memory[real[lanes]] = 0
            self._layout.memory[imag[lanes]] = 0

    def _state(self) -> tuple[Array, ...]:
        memory, indices = self._layout.memory, self._layout.state_indices
        return tuple((memory[real] + 1j * memory[imag]).astype(np.complex64) for real, imag in indices)

    def _set_state(self, state: tuple[Array, ...]) -> None:
        for (real, imag), x in zip(self._layout.state_indices, state, strict=True):
            self._layout.memory[real] = x.real
            self._layout.memory[imag] = x.imag


class WideCpuEngine(CpuEngine):
    """The CPU engine with small mixing weights converted to float32 once instead of at every step.

    A step then reads more bytes but converts nothing. The outputs of float16 weights are the same, bit for bit.
    """

    name: ClassVar[str] = "cpu-float32"
    widen: ClassVar[bool] = True
