"""The CUDA engine: one kernel launch takes T samples of all lanes through the whole network, in float32.

States and weights stay in the memory of the GPU; samples and outputs are in memory that the host and the GPU share. The
kernels (``kernels``) are loaded as PTX (``cache``), so that neither Numba nor a compiler is in the process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from edge_ssm.engines.base import Engine, sample_error
from edge_ssm.engines.cuda import layout as cuda_layout
from edge_ssm.engines.options import DEFAULT_OPTIONS, EngineOptions, Synchronization
from edge_ssm.errors import EngineUnavailable
from edge_ssm.model.input_range import input_range
from edge_ssm.model.network import Array, Network, TokenEncoder

THREADS = 256
"""Number of threads per block. The kernels use up to 255 registers per thread; a multiprocessor has 65,536."""
LANES_PER_GROUP = 8
"""Number of lanes that share the reading of the weights, if there are enough lanes for all multiprocessors."""
SPLIT_BYTES = 256 << 10
"""Number of bytes that a step reads, from which a lane is divided among several multiprocessors. For smaller networks,
the two barriers per layer take longer than the reading."""
MOST_BLOCKS = 8
"""Largest number of multiprocessors that share a lane."""


class Device(Protocol):
    """What the engine needs of a GPU. ``driver.Device`` implements it, and so does the simulator of the tests."""

    name: str
    capability: tuple[int, int]
    processors: int
    shared_bytes: int

    def kernel(self, name: str, shared_bytes: int) -> Any:
        """Load a kernel that may use ``shared_bytes`` of dynamic shared memory."""

    def upload(self, array: Array) -> Any:
        """Copy an array to new memory of the GPU."""

    def write(self, memory: Any, array: Array, start: int = 0) -> None:
        """Copy an array to the GPU's memory, beginning at value number ``start``."""

    def read(self, memory: Any) -> Array:
        """Return a copy of the GPU's memory."""

    def shared_with_host(self, size: int, kind: type[np.generic] = ...) -> tuple[Array, Any]:
        """Allocate zeros that the host and the GPU both access."""

    def arguments(self, values: list[Any]) -> Any:
        """Return the arguments of a launch."""

    def run(self, kernel: Any, grid: int, threads: int, shared_bytes: int, arguments: Any) -> None:
        """Launch a kernel, and wait until it has ended."""

    def start(self, kernel: Any, grid: int, threads: int, shared_bytes: int, arguments: Any) -> None:
        """Launch a kernel, and return at once."""

    def wait(self) -> None:
        """Wait until all launched kernels have ended."""

    def is_busy(self) -> bool:
        """Return whether a launched kernel still runs."""

    def end_setup(self) -> None:
        """Raise RunFailed instead of EngineUnavailable from now on."""


@dataclass(frozen=True)
class Plan:
    """How lanes are divided among thread blocks."""

    lanes_per_group: int
    blocks: int
    """Number of thread blocks of a group."""
    groups: int
    shared_bytes: int
    """Dynamic shared memory of a thread block."""

    @property
    def grid(self) -> int:
        """Number of thread blocks of a launch."""
        return self.groups * self.blocks


def make_plan(lanes: int, layout: cuda_layout.Layout, processors: int, limit: int) -> Plan:
    """Divide ``lanes`` among the multiprocessors (``processors``) of a GPU.

    ``limit`` is the largest shared memory of a block, in bytes.

    Raises EngineUnavailable if a block's vectors do not fit into its shared memory.
    """
    lanes_per_group = LANES_PER_GROUP if lanes >= LANES_PER_GROUP * processors else 1
    shared_bytes = 4 * cuda_layout.shared_floats(lanes_per_group, layout.widest, THREADS)
    if shared_bytes > limit and lanes_per_group > 1:
        lanes_per_group = 1
        shared_bytes = 4 * cuda_layout.shared_floats(1, layout.widest, THREADS)
    if shared_bytes > limit:
        raise EngineUnavailable(
            f"engine 'cuda': a layer has {layout.widest} values, which needs {shared_bytes} bytes of shared memory; "
            f"this GPU has {limit} per block; use --engine cpu"
        )
    groups = -(-lanes // lanes_per_group)
    step_bytes = layout.weights.nbytes + layout.half.nbytes + layout.whole.nbytes + 4 * layout.lane_size
    # The blocks of a group wait for each other: all of them must run at the same time.
    split = step_bytes >= SPLIT_BYTES and groups * 2 <= processors
    blocks = min(MOST_BLOCKS, processors // groups) if split else 1
    return Plan(lanes_per_group, blocks, groups, shared_bytes)


class CudaEngine(Engine):
    """Runs a network on an NVIDIA GPU, with one kernel launch per step or chunk."""

    name: ClassVar[str] = "cuda"
    dtype: ClassVar[npt.DTypeLike] = np.dtype(np.float32)

    def __init__(
        self, network: Network, options: EngineOptions = DEFAULT_OPTIONS, device: Device | None = None
    ) -> None:
        super().__init__(network, options)
        self._device = device if device is not None else _first_device(options.synchronization)
        packed = self._layout = cuda_layout.pack(network, self._step_parameters)
        plan = self._plan = make_plan(self.lanes, packed, self._device.processors, self._device.shared_bytes)
        self._kernel = self._device.kernel(self._kernel_name(plan), plan.shared_bytes)
        self._range, self._tokens = input_range(network), isinstance(network.encoder, TokenEncoder)
        self._constant = [self._device.upload(a) for a in (packed.weights, packed.half, packed.whole, packed.table)]
        # The last group may have fewer lanes than the others; the kernels do not touch the states of missing lanes.
        self._x = self._device.upload(np.zeros(max(1, self.lanes * packed.lane_size), dtype=np.float32))
        scratch_size = plan.groups * plan.lanes_per_group * packed.widest
        self._scratch = self._device.upload(np.zeros(scratch_size, dtype=np.float32))
        self._counters = self._device.upload(np.zeros(plan.groups, dtype=np.int64))
        self._capacity = 0
        self._reserve(1)
        self._device.end_setup()

    @staticmethod
    def _kernel_name(plan: Plan) -> str:
        return f"run-{plan.lanes_per_group}"

    def _reserve(self, steps: int) -> None:
        """Allocate buffers for chunks of up to ``steps`` samples, and prepare the arguments of a single step."""
        if steps <= self._capacity:
            return
        # Old buffers are freed with the context only. Doubling keeps their total below the size of the current ones.
        self._capacity = max(steps, 2 * self._capacity)
        steps = self._capacity
        self._samples, samples = self._device.shared_with_host(steps * self.lanes * self.network.d_input)
        self._outputs, outputs = self._device.shared_with_host(steps * self.lanes * self.network.d_output)
        self._buffers = samples, outputs
        self._step_arguments = self._arguments(1)

    def _arguments(self, steps: int) -> Any:
        sizes = [steps, self.lanes, self._layout.widest, self._plan.blocks]
        return self._device.arguments([*self._constant, self._x, *self._buffers, *sizes, self._scratch, self._counters])

    def _run(self, samples: Array, outputs: Array) -> None:
        if self._range.bad(samples).any():
            raise sample_error(self.network, samples)
        steps, plan = len(samples), self._plan
        self._reserve(steps)
        self._samples[: samples.size] = self._normalise(samples).ravel()
        arguments = self._step_arguments if steps == 1 else self._arguments(steps)
        self._device.run(self._kernel, plan.grid, THREADS, plan.shared_bytes, arguments)
        outputs[...] = self._outputs[: outputs.size].reshape(outputs.shape)

    def _normalise(self, samples: Array) -> Array:
        z: Array = samples if self._tokens else (samples - self.network.input.mean) / self.network.input.std
        return z

    def _read_lanes(self) -> Array:
        """Return a copy of the states as they lie in the GPU's memory, shape (L, lane_size), float32."""
        return self._device.read(self._x)[: self.lanes * self._layout.lane_size].reshape(self.lanes, -1)

    def reset(self, lane: int | None = None) -> None:
        """Set the state of one lane, or of all lanes, to zero."""
        size = self._layout.lane_size
        if size:
            zeros = np.zeros(size * (self.lanes if lane is None else 1), dtype=np.float32)
            self._device.write(self._x, zeros, 0 if lane is None else lane * size)

    def _state(self) -> tuple[Array, ...]:
        x = self._read_lanes()
        return tuple((x[:, real] + 1j * x[:, imag]).astype(np.complex64) for real, imag in self._layout.state_indices)

    def _set_state(self, state: tuple[Array, ...]) -> None:
        x = self._read_lanes()
        for (real, imag), new in zip(self._layout.state_indices, state, strict=True):
            x[:, real] = new.real
            x[:, imag] = new.imag
        if x.size:
            self._device.write(self._x, x)


def _first_device(synchronization: Synchronization) -> Device:
    # The simulator of the tests takes the driver's place, which is therefore imported only when it is needed.
    from edge_ssm.engines.cuda import driver

    device: Device = driver.Device(synchronization=synchronization)
    return device
