"""The persistent CUDA engine: its kernel is launched once and is fed through a ring that host and GPU share.

A step involves neither a launch nor a wait in the driver. In exchange, the GPU never idles: its multiprocessors poll
for the next sample without a pause, and other programs cannot use them. "auto" therefore never selects this engine.
Everything else that touches the state (snapshots, resets, gaps) ends the kernel, and the next sample launches it again.
"""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import Any, ClassVar

import numpy as np

from edge_ssm.engines.base import sample_error
from edge_ssm.engines.cuda.engine import THREADS, CudaEngine, Device, Plan
from edge_ssm.engines.cuda.layout import LAST_NUMBER
from edge_ssm.engines.options import DEFAULT_OPTIONS, EngineOptions
from edge_ssm.errors import EdgeSSMError, EngineUnavailable, RunFailed
from edge_ssm.model.network import Array, Network

SLOTS = 64
"""Number of slots of the ring: so many samples may be in progress."""
POLLS = 1 << 14
"""Number of polls for a reply before the driver is asked whether the kernel still runs."""


class PersistentCudaEngine(CudaEngine):
    """Runs a network on an NVIDIA GPU in a kernel that keeps running between samples."""

    name: ClassVar[str] = "cuda-persistent"

    def __init__(
        self, network: Network, options: EngineOptions = DEFAULT_OPTIONS, device: Device | None = None
    ) -> None:
        super().__init__(network, options, device)
        lanes, blocks = self.lanes, self._plan.grid
        if self._plan.lanes_per_group > 1 or blocks > self._device.processors:
            raise EngineUnavailable(
                f"engine '{self.name}': {lanes} lanes, this GPU has {self._device.processors} multiprocessors and each "
                "lane occupies at least one; use --engine cuda"
            )
        inputs, outputs = network.d_input, network.d_output
        requests, device_requests = self._device.shared_with_host(SLOTS * lanes * inputs, np.int64)
        replies, device_replies = self._device.shared_with_host(SLOTS * lanes * outputs, np.int64)
        self._requests, self._replies = requests.reshape(SLOTS, -1), replies.reshape(SLOTS, -1)
        inbox = self._device.upload(np.zeros(blocks * inputs, dtype=np.float32))
        outbox = self._device.upload(np.zeros(lanes * outputs, dtype=np.float32))
        sizes = [SLOTS, lanes, self._layout.widest, self._plan.blocks]
        rings = [inbox, outbox, device_requests, device_replies]
        self._serve_arguments = self._device.arguments(
            [*self._constant, self._x, *rings, *sizes, self._scratch, self._counters]
        )
        self._number = 0
        self._is_launched = False
        weakref.finalize(self, _stop, self._device, self._requests)

    @staticmethod
    def _kernel_name(plan: Plan) -> str:
        return "serve"

    def _reserve(self, steps: int) -> None:
        """Do nothing: samples pass through the ring."""

    def _launch(self) -> None:
        self._number = 0
        self._requests[...] = 0
        self._replies[...] = 0
        plan, device = self._plan, self._device
        device.start(self._kernel, plan.grid, THREADS, plan.shared_bytes, self._serve_arguments)
        self._is_launched = True

    def end(self) -> None:
        """End the kernel if it runs. The states stay in the GPU's memory; the next sample launches the kernel again."""
        if self._is_launched:
            self._is_launched = False
            self._requests[...] = -1
            self._device.wait()

    def _run(self, samples: Array, outputs: Array) -> None:
        if self._range.bad(samples).any():
            raise sample_error(self.network, samples)
        if not self._is_launched:
            self._launch()
        z = np.ascontiguousarray(self._normalise(samples), dtype=np.float32)
        bits = z.view(np.uint32).reshape(len(samples), -1).astype(np.int64)
        rows = outputs.reshape(len(samples), -1)
        sent = received = 0
        numbers = []
        while received < len(samples):
            # A slot is free again once the reply to the request in it has arrived.
            while sent < len(samples) and sent - received < SLOTS:
                number = self._number = self._number % LAST_NUMBER + 1
                numbers.append(number)
                self._requests[number % SLOTS] = bits[sent] | (number << 32)
                sent += 1
            words = self._wait_for_reply(numbers[received])
            rows[received] = words.astype(np.uint32).view(np.float32)
            received += 1

    def _wait_for_reply(self, number: int) -> Array:
        """Wait for the outputs of step ``number``, and return them as words."""
        slot = self._replies[number % SLOTS]
        while True:
            for _ in range(POLLS):
                words: Array = slot.copy()
                if (words >> 32 == number).all():
                    return words
            if not self._device.is_busy():
                self._is_launched = False
                raise RunFailed(f"engine '{self.name}': the kernel ended by itself")

    def reset(self, lane: int | None = None) -> None:
        """Set the state of one lane, or of all lanes, to zero."""
        self.end()
        super().reset(lane)

    def _read_lanes(self) -> Array:
        self.end()
        return super()._read_lanes()


def _stop(device: Any, requests: Array) -> None:
    """End the kernel of an engine that was garbage-collected. Otherwise it would run as long as the process."""
    requests[...] = -1
    with suppress(EdgeSSMError):
        device.wait()
