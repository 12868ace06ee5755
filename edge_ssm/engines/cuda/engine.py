"""The CUDA engine: one launch (``cuda_kernel``) takes T samples of all lanes through the whole network, in float32.

States and weights stay on the GPU; samples and outputs lie in memory that the host and the GPU share. The kernels are
PTX out of ``cuda_store``: no compiler is in the process, and none need be on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from edge_ssm.engines.base import Engine, refusal
from edge_ssm.engines.cuda import layout as cuda_layout
from edge_ssm.errors import EngineUnavailable
from edge_ssm.model.input_range import input_range
from edge_ssm.model.network import Array, Network, TokenEncoder

THREADS = 256
"""Of a block: the kernel takes up to 255 registers a thread, and a multiprocessor has 65,536."""
TOGETHER = 8
"""Lanes that share the reading of the weights, where there are so many that every multiprocessor has some."""
SPLIT_BYTES = 256 << 10
"""Of a network with as many bytes a step, one lane is shared out among several multiprocessors: below it, two waits for
each other a layer cost more than reading does."""
MOST_BLOCKS = 8
ADDERS = 32
"""As in ``cuda_kernel``, which this process need not import."""


class Device(Protocol):
    """What the engine needs of a GPU (``cuda_driver.Device``)."""

    name: str
    capability: tuple[int, int]
    processors: int
    shared_bytes: int

    def kernel(self, name: str, shared_bytes: int) -> Any: ...
    def upload(self, array: Array) -> Any: ...
    def write(self, memory: Any, array: Array, start: int = 0) -> None: ...
    def read(self, memory: Any) -> Array: ...
    def shared_with_host(self, size: int, kind: type[np.generic] = ...) -> tuple[Array, Any]: ...
    def arguments(self, values: list[Any]) -> Any: ...
    def run(self, kernel: Any, grid: int, threads: int, shared_bytes: int, arguments: Any) -> None: ...
    def start(self, kernel: Any, grid: int, threads: int, shared_bytes: int, arguments: Any) -> None: ...
    def wait(self) -> None: ...
    def running_still(self) -> bool: ...
    def running(self) -> None: ...


@dataclass(frozen=True)
class Plan:
    """How lanes are shared out."""

    together: int
    """Lanes of a group."""
    blocks: int
    """Of threads that a group has."""
    groups: int
    shared_bytes: int


def plan(lanes: int, layout: cuda_layout.Layout, processors: int, limit: int) -> Plan:
    """Raises EngineUnavailable if a block's vectors do not fit into its shared memory."""
    together = TOGETHER if lanes >= TOGETHER * processors else 1
    while True:
        needed = 4 * (3 * together * layout.widest + max(together * THREADS, 2 * together * ADDERS))
        if needed <= limit or together == 1:
            break
        together = 1
    if needed > limit:
        raise EngineUnavailable(
            f"engine 'cuda': a layer has {layout.widest} values, which needs {needed} bytes of shared memory; a block "
            f"here has {limit}; use --engine cpu"
        )
    groups = -(-lanes // together)
    bytes_a_step = layout.weights.nbytes + layout.half.nbytes + layout.whole.nbytes + 4 * layout.lane
    # Blocks that wait for each other must all be running.
    split = bytes_a_step >= SPLIT_BYTES and groups * 2 <= processors
    blocks = min(MOST_BLOCKS, processors // groups) if split else 1
    return Plan(together, blocks, groups, needed)


class CudaEngine(Engine):
    name: ClassVar[str] = "cuda"
    dtype: ClassVar[npt.DTypeLike] = np.dtype(np.float32)

    def __init__(self, network: Network, lanes: int = 1, device: Device | None = None, waits: str = "spin") -> None:
        super().__init__(network, lanes)
        self._device = device if device is not None else _first_device(waits)
        packed = self._layout = cuda_layout.pack(network, self._step_parameters)
        made = self._plan = plan(lanes, packed, self._device.processors, self._device.shared_bytes)
        self._kernel = self._device.kernel(self._kernel_name(made), made.shared_bytes)
        self._range, self._tokens = input_range(network), isinstance(network.encoder, TokenEncoder)
        self._constant = [self._device.upload(a) for a in (packed.weights, packed.half, packed.whole, packed.table)]
        # A group's last lanes may not be there; their states are never touched.
        self._x = self._device.upload(np.zeros(max(1, lanes * packed.lane), dtype=np.float32))
        self._scratch = self._device.upload(np.zeros(made.groups * made.together * packed.widest, dtype=np.float32))
        self._counters = self._device.upload(np.zeros(made.groups, dtype=np.int64))
        self._room = 0
        self._make_room(1)
        self._device.running()

    @staticmethod
    def _kernel_name(made: Plan) -> str:
        return f"run-{made.together}"

    def _make_room(self, steps: int) -> None:
        """Buffers for chunks of up to ``steps``; those of a single step have their arguments ready."""
        if steps <= self._room:
            return
        # What was there before stays with the context: by doubling it is never more than what is there now.
        self._room = max(steps, 2 * self._room)
        steps = self._room
        self._samples, samples = self._device.shared_with_host(steps * self.lanes * self.network.d_input)
        self._outputs, outputs = self._device.shared_with_host(steps * self.lanes * self.network.d_output)
        self._buffers = samples, outputs
        self._single = self._arguments(1)

    def _arguments(self, steps: int) -> Any:
        made, packed = self._plan, self._layout
        sizes = [steps, self.lanes, packed.widest, made.blocks]
        return self._device.arguments([*self._constant, self._x, *self._buffers, *sizes, self._scratch, self._counters])

    def _run(self, samples: Array, outputs: Array) -> None:
        if self._range.bad(samples).any():
            raise refusal(self.network, samples)
        steps, made = len(samples), self._plan
        self._make_room(steps)
        given = samples if self._tokens else (samples - self.network.input.mean) / self.network.input.std
        self._samples[: samples.size] = given.ravel()
        arguments = self._single if steps == 1 else self._arguments(steps)
        self._device.run(self._kernel, made.groups * made.blocks, THREADS, made.shared_bytes, arguments)
        outputs[...] = self._outputs[: outputs.size].reshape(outputs.shape)

    def _lanes(self) -> Array:
        """(lanes, LANE) float32, a copy."""
        return self._device.read(self._x)[: self.lanes * self._layout.lane].reshape(self.lanes, -1)

    def _put(self, lanes: Array) -> None:
        if lanes.size:
            self._device.write(self._x, lanes)

    def reset(self, lane: int | None = None) -> None:
        size = self._layout.lane
        if size:
            zeros = np.zeros(size * (self.lanes if lane is None else 1), dtype=np.float32)
            self._device.write(self._x, zeros, 0 if lane is None else lane * size)

    def _state(self) -> tuple[Array, ...]:
        x = self._lanes()
        return tuple((x[:, real] + 1j * x[:, imag]).astype(np.complex64) for real, imag in self._layout.slots)

    def _set_state(self, state: tuple[Array, ...]) -> None:
        x = self._lanes()
        for (real, imag), new in zip(self._layout.slots, state, strict=True):
            x[:, real] = new.real
            x[:, imag] = new.imag
        self._put(x)


def _first_device(waits: str) -> Device:
    from edge_ssm.engines.cuda.driver import Device as Driver

    found: Device = Driver(waits=waits)
    return found
