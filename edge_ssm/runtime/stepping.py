"""The engine's part of the pipeline: samples are collected into chunks, stepped, and their outputs pooled by window."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns

import numpy as np

from edge_ssm.engines.registry import Engine
from edge_ssm.errors import UsageError
from edge_ssm.histogram import LatencyHistogram
from edge_ssm.io.messages import Frame
from edge_ssm.model.network import Array
from edge_ssm.runtime.windows import ClosedWindow, Windows


class Stepper:
    """An engine with windows over its outputs.

    Up to ``chunk`` samples are stepped in one call, but never across the begin or end of a window. ``latency`` gets one
    entry per call. ``on_window`` is called with each window that ends, and the frame that ends it.
    """

    def __init__(
        self,
        engine: Engine,
        windows: Windows,
        chunk: int,
        latency: LatencyHistogram,
        on_window: Callable[[ClosedWindow, Frame], None],
    ) -> None:
        if engine.lanes != windows.lanes:
            raise UsageError(f"engine has {engine.lanes} lanes, the windows need {windows.lanes}")
        self.engine = engine
        self.windows = windows
        self._chunk = chunk
        self._latency = latency
        self._on_window = on_window
        self._pending: list[tuple[Array, Frame, bool]] = []  # values, frame, is_gap

    def add(self, values: Array, frame: Frame, is_gap: bool = False) -> None:
        """Step a sample, at once or when its chunk is full.

        ``values`` (d_input,) is what the engine gets, and differs from the frame's in a gap.
        """
        if self._chunk == 1:
            self._step(values, frame, is_gap)
            return
        self._pending.append((values, frame, is_gap))
        if len(self._pending) >= self._chunk or len(self._pending) >= self.windows.until_boundary():
            self.flush()

    def skip(self, frame: Frame) -> None:
        """Let the state decay by one sample, which has no output."""
        self.flush()
        self._begin()
        self.engine.skip(1)
        self._end(None, frame, True)

    def flush(self) -> None:
        """Step the samples of an incomplete chunk."""
        pending, self._pending = self._pending, []
        if len(pending) > 1:
            self._step_chunk(pending)
        elif pending:
            self._step(*pending[0])

    def _step(self, values: Array, frame: Frame, is_gap: bool) -> None:
        self._begin()
        engine = self.engine
        sample = values if engine.lanes == 1 else np.broadcast_to(values, (engine.lanes, len(values)))
        began = perf_counter_ns()
        outputs = engine.step(sample)
        self._latency.record(perf_counter_ns() - began)
        self._end(outputs, frame, is_gap)

    def _step_chunk(self, pending: list[tuple[Array, Frame, bool]]) -> None:
        self._begin()
        engine = self.engine
        samples = np.array([values for values, _, _ in pending])
        if engine.lanes > 1:
            samples = np.repeat(samples[:, None], engine.lanes, axis=1)
        began = perf_counter_ns()
        outputs = engine.chunk(samples)
        self._latency.record(perf_counter_ns() - began)
        for i, ((_, frame, is_gap), output) in enumerate(zip(pending, outputs, strict=True)):
            if i:
                self._begin()
            self._end(output, frame, is_gap)

    def _begin(self) -> None:
        """Reset the lane of the window that begins with the next sample, if one does."""
        lane = self.windows.begin()
        if lane is not None:
            self.engine.reset(lane)

    def _end(self, outputs: Array | None, frame: Frame, is_gap: bool) -> None:
        """Pool the outputs of one sample, and report the window that ends with it, if one does."""
        window = self.windows.end(outputs, is_gap, frame.label)
        if window is not None:
            self._on_window(window, frame)

    def reset(self) -> int:
        """Zero the state and give all open windows up; return how many samples that discards."""
        discarded = self.windows.restart()
        self.engine.reset()
        return discarded

    def replace(self, engine: Engine, windows: Windows | None) -> int:
        """Continue with another engine, and with other windows unless None; return how many samples that discards.

        The engine's state is the caller's concern. Raises UsageError if the engine does not fit.
        """
        self.flush()
        if engine.lanes != (windows or self.windows).lanes or engine.network.d_input != self.engine.network.d_input:
            raise UsageError("the new network does not fit this stream: other input channels or windows")
        discarded = 0
        if windows is not None:
            discarded = self.windows.restart()
            windows.skip(self.windows.sample)
            self.windows = windows
        self.engine = engine
        return discarded
