"""What happens to one sample, top to bottom: read, check, step, pool, decide, emit, account."""

from __future__ import annotations

import time as clock
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from edge_ssm.engines import Engine
from edge_ssm.errors import RunFailed, UsageError
from edge_ssm.monitor.latency import LatencyHistogram
from edge_ssm.network import Array, input_range
from edge_ssm.stream.decisions import Decision, Event, decide
from edge_ssm.stream.frames import Frame, FrameDecoder, Malformed
from edge_ssm.stream.sinks import SinkClosed
from edge_ssm.stream.source import ByteSource
from edge_ssm.stream.stop import Stop
from edge_ssm.stream.windows import Windows

GapPolicy = Literal["hold", "skip", "reset"]
GAP_POLICIES: tuple[GapPolicy, ...] = ("hold", "skip", "reset")


@dataclass
class Account:
    """Everything that came in, by what became of it. Nothing is lost without standing here."""

    samples: int = 0
    """Frames accepted, each with a sample number; gaps are among them."""
    decisions: int = 0
    gaps: Counter[str] = field(default_factory=Counter)
    """Samples that the engine could not be given as they were, by reason: missing, out_of_range."""
    malformed: int = 0
    """Rows or trailing bytes that are no frame; they get no sample number."""
    resets: int = 0
    discarded: int = 0
    """Accepted samples of windows that a reset gave up, and those between a reset and the next good sample."""
    undecided: int = 0
    """Windows that ended without a decision: all skipped, or outputs not finite."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Frames that got no sample number, by reason: repeated (already taken in), late (overtaken by a newer one)."""
    deadline_misses: int = 0
    """Decisions later than the sample period times the budget after their last sample came."""
    reconnects: int = 0
    reloads: int = 0
    moves: int = 0
    """Of the network: to a new artifact, and between members of a family."""
    labelled: int = 0
    correct: int = 0
    """Decisions with a true label, and those of them that are right."""
    unfinished: int = 0
    """Samples of the window that was open at the end."""
    seconds: float = 0.0
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)
    """Of the engine, one entry a step, or a chunk."""
    ended_by: str = "end of input"


class Decisions(Protocol):
    """What a loop hands its decisions to (``sinks.Sink``)."""

    def decision(self, decision: Decision) -> None: ...
    def event(self, event: Event) -> None: ...


class Loop:
    """Joins an engine, windows and a sink. ``engine.lanes`` must be ``windows.lanes``."""

    def __init__(
        self,
        engine: Engine,
        windows: Windows,
        sink: Decisions,
        gap: GapPolicy = "hold",
        max_gap: int | None = None,
        strict: bool = False,
        report: Callable[[str], None] = lambda line: None,
        chunk: int = 1,
    ) -> None:
        if engine.lanes != windows.lanes:
            raise UsageError(f"engine has {engine.lanes} lanes, the windows need {windows.lanes}")
        self._engine = engine
        self._range = input_range(engine.network)
        self._windows = windows
        self._sink = sink
        self._gap_policy = gap
        self._max_gap = windows.longest_gap if max_gap is None else max_gap
        self._strict = strict
        self._report = report
        self._chunk = chunk
        self._pending: list[tuple[Array, Frame, bool]] = []  # accepted and not yet stepped: values, frame, gap
        self.account = Account()
        self._held = np.full(engine.network.d_input, np.nan)
        self._in_gap = 0
        self._waiting = False  # after a reset within a gap, until the next good sample

    def run(self, source: ByteSource, decoder: FrameDecoder, stop: Stop, pace_hz: float | None = None) -> Account:
        """Until the source ends, a signal comes, or the reader of the output goes away.

        ``pace_hz`` holds a recording back to that many samples a second. Raises RunFailed for a malformed row
        when ``strict``.
        """
        account = self.account
        began = clock.perf_counter()
        try:
            for data in source.blocks(stop):
                for item in decoder.feed(data):
                    if pace_hz is not None:
                        ahead = began + account.samples / pace_hz - clock.perf_counter()
                        if ahead > 0:
                            stop.wait(seconds=ahead)
                        if stop.requested:
                            break
                    # Without pacing a stop ends after the block at hand: what was read is decided.
                    self._item(item)
            if stop.requested:
                account.ended_by = "signal"
            else:
                for item in decoder.finish():
                    self._item(item)
            self._flush()
        except SinkClosed:
            account.ended_by = "closed output"
        finally:
            account.unfinished = self._windows.unfinished
            account.seconds = clock.perf_counter() - began
        return account

    def _item(self, item: Frame | Malformed) -> None:
        if isinstance(item, Frame):
            self._frame(item)
            return
        self.account.malformed += 1
        if self._strict:
            self._flush()
            raise RunFailed(f"{item.where}: {item.problem} (--strict)")
        self._report(f"{item.where}: {item.problem}; left out")

    def _frame(self, frame: Frame) -> None:
        self.account.samples += 1
        bad = self._range.bad(frame.values)
        if bad.any():
            self._gap(frame, bad)
            return
        self._held = frame.values
        self._in_gap = 0
        self._waiting = False
        self._advance(frame.values, frame)

    def _gap(self, frame: Frame, bad: Array) -> None:
        """A sample that must not reach the state: fill it, skip it, or give the window up."""
        account = self.account
        account.gaps["missing" if np.isnan(frame.values[bad]).all() else "out_of_range"] += 1
        self._in_gap += 1
        if not self._waiting and (self._gap_policy == "reset" or self._in_gap > self._max_gap):
            self._flush()
            self._restart("reset", reason="gap", gap_samples=self._in_gap)
            self._waiting = True
        if self._waiting:
            self._windows.pass_over()
            account.discarded += 1
            return
        # Only the bad channels are filled; before the first good value there is nothing to hold.
        self._held = np.where(bad, self._held, frame.values)
        hold = self._gap_policy == "hold" and not np.isnan(self._held).any()
        self._advance(self._held if hold else None, frame, gap=True)

    def _advance(self, values: Array | None, frame: Frame, gap: bool = False) -> None:
        """Take one sample in (None: let the state decay); what is pending is stepped once the chunk is full, or a
        window begins or ends."""
        if values is None:
            self._flush()
            self._begin()
            self._engine.skip(1)
            self._end(None, frame, gap)
            return
        self._pending.append((values, frame, gap))
        if len(self._pending) >= min(self._chunk, self._windows.together()):
            self._flush()

    def _flush(self) -> None:
        """Step, pool and decide what is pending."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        engine = self._engine
        self._begin()
        if len(pending) == 1:
            values = pending[0][0]
            sample = values if engine.lanes == 1 else np.broadcast_to(values, (engine.lanes, len(values)))
            began = clock.perf_counter_ns()
            outputs = [engine.step(sample)]
        else:
            samples = np.array([values for values, _, _ in pending])
            if engine.lanes > 1:
                samples = np.repeat(samples[:, None], engine.lanes, axis=1)
            began = clock.perf_counter_ns()
            outputs = list(engine.chunk(samples))
        self.account.latency.record(clock.perf_counter_ns() - began)
        for i, ((_, frame, gap), output) in enumerate(zip(pending, outputs, strict=True)):
            if i:
                self._begin()
            self._end(output, frame, gap)

    def _begin(self) -> None:
        lane = self._windows.begin()
        if lane is not None:
            self._engine.reset(lane)

    def _end(self, outputs: Array | None, frame: Frame, gap: bool) -> None:
        """Pool one sample's outputs, and decide if a window ends with it."""
        engine, windows, account = self._engine, self._windows, self.account
        closed = windows.end(outputs, gap, frame.label)
        if closed is None:
            return
        if closed.outputs is None:
            account.undecided += 1
            self._sink.event(Event("no_decision", closed.end, {"start": closed.start, "reason": "all samples missing"}))
            return
        if not np.isfinite(closed.outputs).all():
            account.undecided += 1
            self._restart("reset", reason="outputs are not finite")
            return
        decision = decide(engine.network, account.decisions, closed, closed.outputs, frame.time)
        account.decisions += 1
        if decision.truth is not None and decision.label is not None:
            account.labelled += 1
            account.correct += decision.label == decision.truth
        self._sink.decision(decision)

    def _restart(self, event: str, **details: Any) -> None:
        """Zero state, and the next window starts with the next sample; said in the output and counted."""
        self.account.resets += 1
        lost = self._windows.restart()
        self.account.discarded += lost
        self._engine.reset()
        self._sink.event(Event(event, self._windows.sample, {**details, "discarded": lost}))
