"""What happens to one sample, from top to bottom: order, gaps, range, step, window, decision.

``Pipeline.process`` takes what a decoder yields. Read from there downwards; each stage is an object of its own:

    SequenceTracker   puts numbered frames in order, and finds lost, repeated and late ones    runtime/sequence.py
    TimeStamps        finds samples that the frames' own time stamps skip                      runtime/gaps.py
    GapFiller         decides what stands in for a sample that is missing or out of range      runtime/gaps.py
    Stepper           steps the engine, and pools its outputs over windows                     runtime/stepping.py

``runtime/driver.py`` reads a source and feeds a pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from logging import WARNING
from time import monotonic
from typing import Any, Protocol

import msgspec
import numpy as np

from edge_ssm.engines.registry import Engine, Snapshot
from edge_ssm.errors import RunFailed, SnapshotError
from edge_ssm.io.messages import Decision, Event, Frame, Malformed
from edge_ssm.io.sources.base import Discontinuity, Source
from edge_ssm.log import NOTICE
from edge_ssm.model.input_range import input_range
from edge_ssm.model.network import Array
from edge_ssm.runtime.counters import Counters
from edge_ssm.runtime.decisions import decide
from edge_ssm.runtime.gaps import GapFiller, GapPolicy, TimeStamps
from edge_ssm.runtime.input_log import InputLog
from edge_ssm.runtime.sequence import NEXT, SequenceTracker
from edge_ssm.runtime.state import EarlyFrame, PipelineState, to_array, to_json
from edge_ssm.runtime.stepping import Stepper
from edge_ssm.runtime.windows import ClosedWindow, Windows

TICK_S = 0.1
"""Longest time between two ticks of the observer, whether samples arrive or not."""


class DecisionSink(Protocol):
    """What a pipeline sends its results to, in order (``StatusPublisher`` and every formatter)."""

    def decision(self, decision: Decision) -> None:
        """Take a decision. Raises SinkClosed if nobody reads any more."""

    def event(self, event: Event) -> None:
        """Take an event: something that a reader of decisions must know."""


class PipelineObserver:
    """Housekeeping while a pipeline runs, on its own thread. This one does nothing; see ``service.supervisor``."""

    keeps_state: bool = False
    """Whether a later run will resume from the state at the end, frames that are held back included."""

    def on_tick(self) -> None:
        """React to the passing of time: at least every TICK_S, between two samples of a batch or two batches."""

    def on_batch_end(self, token: Any) -> None:
        """React when everything that was read is processed; ``token`` is the last one that the source gave."""

    def on_connection_change(self, connected: bool) -> None:
        """React when the source has lost its connection, or has one."""


class PipelineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a pipeline treats its input."""

    gap_policy: GapPolicy = "hold"
    max_gap: int | None = None
    """Samples after which a gap resets the stream; None for ``Windows.longest_gap``."""
    strict: bool = False
    """Whether malformed input ends the run."""
    chunk: int = 1
    """Samples to step in one call of the engine, at most."""
    deadline_s: float | None = None
    """Time from a sample's arrival after which its decision counts as late; None counts none."""
    stale_after_s: float | None = None
    """Silence after which the source is reported as stale; None never reports it."""
    time_stamp_hz: float | None = None
    """Sample rate by which time stamps show missing samples; None ignores them."""
    source: str = "input"
    """Name of the source, for log lines."""
    reorder: int = Source.reorder
    reorder_wait_s: float = Source.reorder_wait_s
    """See ``Source``."""


class Pipeline:
    """Turns frames into decisions and events. ``engine.lanes`` must equal ``windows.lanes``; otherwise UsageError."""

    def __init__(
        self,
        engine: Engine,
        windows: Windows,
        sink: DecisionSink,
        options: PipelineOptions | None = None,
        counters: Counters | None = None,
    ) -> None:
        options = options or PipelineOptions()
        self.counters = counters or Counters()
        self.is_stale = False
        """Whether the source has been silent for longer than ``stale_after_s``."""
        self.next_tick_at = 0.0
        """``time.monotonic()`` at which the observer's next tick is due."""
        self._options = options
        self._sink = sink
        self._input_log = InputLog(options.source)
        self._sequence = SequenceTracker(options.reorder, options.reorder_wait_s)
        self._time_stamps = None if options.time_stamp_hz is None else TimeStamps(options.time_stamp_hz)
        self._range = input_range(engine.network)
        self._gap = GapFiller(options.gap_policy, engine.network.d_input)
        self._stepper = Stepper(engine, windows, options.chunk, self.counters.latency, self._close_window)
        self._observer = PipelineObserver()
        self._arrived_at = 0.0
        self._when_idle: Callable[[], None] | None = None

    # A sample's way through the pipeline.

    def process(self, item: Frame | Malformed) -> None:
        """Process what a decoder yields. Raises RunFailed for malformed input if ``strict``."""
        if not isinstance(item, Frame):
            self._reject(item)
        elif item.sequence is None:
            self._process_frame(item)
        else:
            for frame in self._sequence.in_order(item):
                self._process_frame(frame)

    def _reject(self, malformed: Malformed) -> None:
        self.counters.malformed += 1
        if self._options.strict:
            self.flush()
            raise RunFailed(f"{malformed.where}: {malformed.problem} (--strict)")
        self._input_log.log(f"{malformed.where}: {malformed.problem}; left out")

    def _process_frame(self, frame: Frame) -> None:
        """Process one frame, after the samples that are missing before it."""
        if frame.sequence is not None:
            if not self._take_number(frame.sequence):
                return
        elif self._time_stamps is not None:
            self._take_time_stamp(self._time_stamps, frame.time)
        self.counters.samples += 1
        if self._range.takes(frame.values):
            self._gap.close(frame.values)
            self._stepper.add(frame.values, frame)
        else:
            bad = self._range.bad(frame.values)
            self._process_bad(frame, bad, "missing" if np.isnan(frame.values[bad]).all() else "out_of_range")

    def _take_number(self, number: int) -> bool:
        """Act on a sequence number; return whether its sample is to be processed."""
        arrival = self._sequence.advance(number)
        if arrival is NEXT:
            return True
        if arrival.kind == "gap":
            self.fill_gap(arrival.missing, "lost")
        elif arrival.kind == "restarted":
            self.emit_event("sender_restarted", sequence=number, before=arrival.previous)
            if self._gap.policy == "reset":
                self._reset("sender restarted")
        else:
            self.counters.dropped[arrival.kind] += 1
            return False
        return True

    def _take_time_stamp(self, time_stamps: TimeStamps, time: float | str | None) -> None:
        """Fill what a frame's time stamp skips, if it is a number."""
        missing = time_stamps.advance(time) if isinstance(time, (int, float)) else 0
        if missing:
            self.fill_gap(missing, "lost")

    def fill_gap(self, samples: int, reason: str) -> None:
        """Process samples that were taken and never arrived."""
        counters, d_input = self.counters, self.engine.network.d_input
        blank, bad = Frame(np.full(d_input, np.nan)), np.ones(d_input, dtype=bool)
        for i in range(samples):
            if self._gap.has_reset:  # The rest of the gap belongs to no window.
                rest = samples - i
                counters.samples += rest
                counters.gaps[reason] += rest
                counters.discarded += rest
                self._gap.extend_after_reset(rest)
                self.windows.skip(rest)
                return
            counters.samples += 1
            self._process_bad(blank, bad, reason)
            if i % 64 == 63:  # A gap of millions of samples takes longer than a watchdog waits.
                self.tick_if_due()

    def _process_bad(self, frame: Frame, bad: Array, reason: str) -> None:
        """Fill a sample whose ``bad`` channels must not reach the engine, skip it, or give its windows up."""
        self.counters.gaps[reason] += 1
        longest = self._options.max_gap
        if self._gap.extend(self.windows.longest_gap if longest is None else longest):
            self.flush()
            self._reset("gap", gap_samples=self._gap.length)
        if self._gap.has_reset:
            self.windows.skip()
            self.counters.discarded += 1
            return
        values = self._gap.fill(frame.values, bad)
        if values is None:
            self._stepper.skip(frame)
        else:
            self._stepper.add(values, frame, is_gap=True)

    def _close_window(self, window: ClosedWindow, frame: Frame) -> None:
        """Decide a window that ends with ``frame``."""
        counters = self.counters
        if window.outputs is None:
            counters.undecided += 1
            self._emit("no_decision", start=window.start, reason="all samples missing")
            return
        if not np.isfinite(window.outputs).all():
            counters.undecided += 1
            self._reset("outputs are not finite")
            return
        decision = decide(self.engine.network, counters.decisions, window, window.outputs, frame.time)
        self._sink.decision(decision)
        counters.decisions += 1  # after the sink: a decision that could not be handed over does not count
        if decision.truth is not None and decision.label is not None:
            counters.labelled += 1
            counters.correct += decision.label == decision.truth
        deadline_s = self._options.deadline_s
        if deadline_s is not None and monotonic() - self._arrived_at > deadline_s:
            counters.deadline_misses += 1
        if self._when_idle is not None and self.windows.is_idle:
            act, self._when_idle = self._when_idle, None
            act()

    def _reset(self, reason: str, **details: Any) -> None:
        """Zero the state. The next window begins with the next sample."""
        self.counters.resets += 1
        discarded = self._stepper.reset()
        self.counters.discarded += discarded
        self._emit("reset", reason=reason, **details, discarded=discarded)

    def _emit(self, event: str, **details: Any) -> None:
        self._sink.event(Event(event, self.windows.sample, details))

    def flush(self) -> None:
        """Step the samples that wait for their chunk to fill."""
        self._stepper.flush()

    # What the driver reports beside the samples.

    def start(self, observer: PipelineObserver) -> None:
        """Begin a run: report to ``observer``, and measure silence and waiting from now on."""
        self._observer = observer
        self._arrived_at = monotonic()
        self._sequence.restart_wait()

    def tick_if_due(self) -> None:
        """Call the observer if its next tick is due."""
        now = monotonic()
        if now >= self.next_tick_at:
            self.next_tick_at = now + TICK_S
            self._observer.on_tick()

    def mark_arrival(self) -> None:
        """Note that input has arrived now."""
        self._arrived_at = monotonic()
        if self.is_stale:
            self.is_stale = False
            self._emit("flowing")

    def postpone_arrival(self, time: float) -> None:
        """Treat the current input as having arrived at ``time`` (``time.monotonic()``) at the earliest."""
        self._arrived_at = max(time, self._arrived_at)

    def check_silence(self) -> None:
        """Report the source as stale if nothing has arrived for too long."""
        limit, silent_s = self._options.stale_after_s, monotonic() - self._arrived_at
        if limit is not None and silent_s > limit and not self.is_stale:
            self.flush()
            self.is_stale = True
            self._emit("stale", seconds=round(silent_s, 3))

    def mark_discontinuity(self, discontinuity: Discontinuity) -> None:
        """Report a connection that was lost or made."""
        if discontinuity.connected:
            self.counters.reconnects += 1
        self._observer.on_connection_change(discontinuity.connected)
        self._input_log.log(discontinuity.reason, NOTICE if discontinuity.connected else WARNING)
        self._emit("connected" if discontinuity.connected else "disconnected", reason=discontinuity.reason)

    def release_overdue(self) -> None:
        """Process the frames that have waited long enough for those before them."""
        for frame in self._sequence.overdue():
            self._process_frame(frame)

    def release_all(self) -> None:
        """Process all frames that wait for those before them."""
        for frame in self._sequence.release():
            self._process_frame(frame)

    # What a supervisor may do between two samples.

    @property
    def engine(self) -> Engine:
        """The engine that steps."""
        return self._stepper.engine

    @property
    def windows(self) -> Windows:
        """The windows that are decided."""
        return self._stepper.windows

    @property
    def is_numbered(self) -> bool:
        """Whether the sender numbers its samples, so that the next number shows what is missing."""
        return self._sequence.last is not None

    def emit_event(self, event: str, **details: Any) -> None:
        """Emit an event at the next sample."""
        self.flush()
        self._emit(event, **details)

    def call_when_idle(self, act: Callable[[], None]) -> None:
        """Call ``act`` between two samples, as soon as no window is open. A later call replaces a waiting one."""
        self.flush()
        if self.windows.is_idle:
            act()
        else:
            self._when_idle = act

    def replace_engine(self, engine: Engine, windows: Windows | None = None) -> None:
        """Continue with another engine, whose state the caller has set (``engines.state_transfer``).

        ``windows`` replaces the windows, if the new network's differ; the open ones are given up. Raises UsageError if
        the engine does not fit.
        """
        self.counters.discarded += self._stepper.replace(engine, windows)
        self._range = input_range(engine.network)

    def state(self) -> tuple[PipelineState, Snapshot]:
        """Return what ``restore`` needs, once all samples that arrived are stepped."""
        self.flush()
        last = self._sequence.last
        state = PipelineState(
            windows=self.windows.state(),
            held=to_json(self._gap.values),
            in_gap=self._gap.length,
            waiting=self._gap.has_reset,
            sequence=None if last is None else str(last),
            stamp=None if self._time_stamps is None else self._time_stamps.last,
            early=[EarlyFrame.from_frame(frame) for frame in self._sequence.buffered],
            counts=self.counters.kept(),
        )
        return state, self.engine.snapshot()

    def restore(self, state: PipelineState, snapshot: Snapshot) -> None:
        """Continue where ``state`` was taken.

        Raises SnapshotError, and changes nothing, if the state belongs to another network or other windows.
        """
        d_input = len(self._gap.values)
        if any(len(values) != d_input for values in (state.held, *(early.values for early in state.early))):
            raise SnapshotError(f"snapshot: {len(state.held)} channels, expected {d_input}; start without it")
        before = self.engine.snapshot()
        self.engine.restore(snapshot)
        try:
            self.windows.restore(state.windows)
        except SnapshotError:
            self.engine.restore(before)
            raise
        self._gap.restore(to_array(state.held), state.in_gap, state.waiting)
        if self._time_stamps is not None:
            self._time_stamps.restore(state.stamp)
        last = None if state.sequence is None else int(state.sequence)
        self._sequence.restore(last, [early.to_frame() for early in state.early])
        self.counters.restore(state.counts)
