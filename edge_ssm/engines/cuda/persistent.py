"""The CUDA engine whose kernel is launched once and stays, fed through a ring that the host and the GPU share.

No launch and no wait of the driver is in a step. The price: the GPU never rests, its multiprocessors ask for the next
sample without a pause, at whatever power its clock takes; and a process that asks for it holds the GPU for itself. So
it is never chosen by ``auto``. Whatever else touches the state (snapshots, resets, gaps) ends the kernel first, and
the next sample launches it again.
"""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import Any, ClassVar

import numpy as np

from edge_ssm.engines.base import refusal
from edge_ssm.engines.cuda.engine import THREADS, CudaEngine, Device, Plan
from edge_ssm.errors import EdgeSSMError, EngineUnavailable, RunFailed
from edge_ssm.model.network import Array, Network

SLOTS = 64
"""Samples that may be under way. The numbers of steps start again at a multiple of it."""
LAST_NUMBER = 1 << 30
"""As in ``cuda_kernel``, which this process need not import."""
ASKED = 1 << 14
"""Looks at an outcome that is not there, before the driver is asked whether the kernel still runs."""


class PersistentCudaEngine(CudaEngine):
    name: ClassVar[str] = "cuda-persistent"

    def __init__(self, network: Network, lanes: int = 1, device: Device | None = None, waits: str = "spin") -> None:
        super().__init__(network, lanes, device, waits)
        blocks = self._plan.groups * self._plan.blocks
        if self._plan.together > 1 or blocks > self._device.processors:
            raise EngineUnavailable(
                f"engine '{self.name}': {lanes} lanes, this GPU has {self._device.processors} multiprocessors and each "
                "lane keeps one; use --engine cuda"
            )
        inputs, outputs = network.d_input, network.d_output
        self._given, given = self._device.shared_with_host(SLOTS * lanes * inputs, np.int64)
        self._found, found = self._device.shared_with_host(SLOTS * lanes * outputs, np.int64)
        self._given, self._found = self._given.reshape(SLOTS, -1), self._found.reshape(SLOTS, -1)
        inbox = self._device.upload(np.zeros(blocks * inputs, dtype=np.float32))
        outbox = self._device.upload(np.zeros(lanes * outputs, dtype=np.float32))
        sizes = [SLOTS, lanes, self._layout.widest, self._plan.blocks]
        self._serving = self._device.arguments(
            [*self._constant, self._x, inbox, outbox, given, found, *sizes, self._scratch, self._counters]
        )
        self._number = 0
        self._launched = False
        weakref.finalize(self, _left_behind, self._device, self._given)

    @staticmethod
    def _kernel_name(made: Plan) -> str:
        return "serve"

    def _make_room(self, steps: int) -> None:
        """The ring is all it has."""

    def _begin(self) -> None:
        self._number = 0
        self._given[...] = 0
        self._found[...] = 0
        made, device = self._plan, self._device
        device.start(self._kernel, made.groups * made.blocks, THREADS, made.shared_bytes, self._serving)
        self._launched = True

    def _end(self) -> None:
        """The kernel ends; its states lie in the GPU's memory."""
        if self._launched:
            self._launched = False
            self._given[...] = -1
            self._device.wait()

    def _run(self, samples: Array, outputs: Array) -> None:
        if self._range.bad(samples).any():
            raise refusal(self.network, samples)
        if not self._launched:
            self._begin()
        given = samples if self._tokens else (samples - self.network.input.mean) / self.network.input.std
        bits = np.ascontiguousarray(given, dtype=np.float32).view(np.uint32).reshape(len(samples), -1).astype(np.int64)
        found = outputs.reshape(len(samples), -1)
        sent = taken = 0
        numbers = []
        while taken < len(samples):
            # The next slot is free once what lay in it has come back.
            while sent < len(samples) and sent - taken < SLOTS:
                number = self._number = self._number % LAST_NUMBER + 1
                numbers.append(number)
                self._given[number % SLOTS] = bits[sent] | (number << 32)
                sent += 1
            words = self._awaited(numbers[taken])
            found[taken] = words.astype(np.uint32).view(np.float32)
            taken += 1

    def _awaited(self, number: int) -> Array:
        """The outputs of a step, as words."""
        slot = self._found[number % SLOTS]
        while True:
            for _ in range(ASKED):
                words: Array = slot.copy()
                if (words >> 32 == number).all():
                    return words
            if not self._device.running_still():
                self._launched = False
                raise RunFailed(f"engine '{self.name}': the kernel ended by itself")

    def reset(self, lane: int | None = None) -> None:
        self._end()
        super().reset(lane)

    def _lanes(self) -> Array:
        self._end()
        return super()._lanes()


def _left_behind(device: Any, given: Array) -> None:
    """Of an engine that is gone: without this its kernel would run as long as the process."""
    given[...] = -1
    with suppress(EdgeSSMError):
        device.wait()
