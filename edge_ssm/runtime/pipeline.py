"""What happens to one sample, top to bottom: read, check, step, pool, decide, emit, account."""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, Protocol

import msgspec
import numpy as np

from edge_ssm.engines.registry import Engine, Snapshot
from edge_ssm.errors import RunFailed, SinkClosed, SnapshotError, UsageError
from edge_ssm.io.codecs.base import FrameDecoder
from edge_ssm.io.messages import Decision, Event, Frame, Malformed
from edge_ssm.io.shutdown import ShutdownSignal
from edge_ssm.io.sources.base import Batch, Discontinuity, Source
from edge_ssm.model.input_range import input_range
from edge_ssm.model.network import Array
from edge_ssm.runtime.counters import _COUNTS, Counters
from edge_ssm.runtime.decisions import decide
from edge_ssm.runtime.reorder import LONGEST_LOSS, Ordering
from edge_ssm.runtime.windows import Number, Windows, WindowsState

GapPolicy = Literal["hold", "skip", "reset"]
GAP_POLICIES: tuple[GapPolicy, ...] = ("hold", "skip", "reset")
Sequence = Annotated[str, msgspec.Meta(pattern=r"^-?[0-9]{1,40}\Z")]
"""A whole number, which may pass 64 bits."""
KNOWN_LOST = 4096
ROUND_S = 0.1
"""At most so long between two rounds of the observer, data or not."""


class EarlyFrame(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A frame that was held back for those before it."""

    sequence: Sequence
    values: list[float | None]
    time: float | str | None
    label: str | None


class PipelineState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a loop must know to go on after a restart, beside its engine's state."""

    windows: WindowsState
    held: list[float | None]
    in_gap: Number
    waiting: bool
    sequence: Sequence | None
    stamp: float | None
    early: list[EarlyFrame]
    counts: dict[str, Number]
    """Of ``Counters``, the whole numbers; and gap.* and dropped.*."""


class Decisions(Protocol):
    """What a loop hands its decisions to (``sinks.Sink``)."""

    def decision(self, decision: Decision) -> None: ...
    def event(self, event: Event) -> None: ...


class PipelineObserver:
    """Who looks after a loop while it runs, from the loop's own thread (``service.attendant``); this one does not."""

    keeps_state: bool = False
    """Whether what is held back now will be gone on with by another run."""

    def on_tick(self) -> None:
        """At least every ROUND_S; nothing is half done, but a block of input may be."""

    def on_batch_end(self, source: Source, token: Any) -> None:
        """All that was read is stepped; ``token`` is the last one that ``source`` gave."""

    def on_connection_change(self, connected: bool) -> None:
        """The source lost its connection, or has one."""


class Pipeline:
    """Joins an engine, windows and a sink. ``engine.lanes`` must be ``windows.lanes``.

    ``deadline_s``: how long after a sample came its decision is on time; None: not counted. ``stamps_hz``: fill what
    the frames' own time stamps skip, at this sample rate.
    """

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
        deadline_s: float | None = None,
        stale_after_s: float | None = None,
        stamps_hz: float | None = None,
    ) -> None:
        if engine.lanes != windows.lanes:
            raise UsageError(f"engine has {engine.lanes} lanes, the windows need {windows.lanes}")
        self._engine = engine
        self._range = input_range(engine.network)
        self._windows = windows
        self._sink = sink
        self._gap_policy = gap
        self._given_max_gap = max_gap
        self._strict = strict
        self._report = report
        self._chunk = chunk
        self._deadline_s = deadline_s
        self._stale_after_s = stale_after_s
        self._stamps_hz = stamps_hz
        self._pending: list[tuple[Array, Frame, bool]] = []  # accepted and not yet stepped: values, frame, gap
        self.account = Counters()
        self._held = np.full(engine.network.d_input, np.nan)
        self._in_gap = 0
        self._waiting = False  # after a reset within a gap, until the next good sample
        self._sequence: int | None = None
        self._stamp: float | None = None
        self._stamp_back = False
        self._reorder = Source.reorder
        self._lost: set[int] = set()  # sequence numbers that were taken for lost, the newest ones
        self._ordering = Ordering()
        self._came_at = 0.0
        self._next_round = 0.0
        self._observer = PipelineObserver()
        self.stale = False
        self.is_consistent = True
        """All that was read was taken in, and all that was decided went out: what may be kept as a snapshot."""
        self._when_idle: Callable[[], None] | None = None

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def windows(self) -> Windows:
        return self._windows

    @property
    def _max_gap(self) -> int:
        return self._windows.longest_gap if self._given_max_gap is None else self._given_max_gap

    def run(
        self,
        source: Source,
        decoder: FrameDecoder,
        stop: ShutdownSignal,
        pace_hz: float | None = None,
        observer: PipelineObserver | None = None,
    ) -> Counters:
        """Until the source ends, a signal comes, or the reader of the output goes away.

        ``pace_hz`` holds a recording back to that many samples a second, until a stop is asked for: what was read is
        decided. Raises RunFailed for a malformed row when ``strict``.
        """
        account = self.account
        self._observer = observer = observer or PipelineObserver()
        self._reorder = source.reorder
        early, self._ordering = self._ordering.held, Ordering(source.reorder, source.reorder_wait_s)
        self._ordering.go_on(self._sequence, early)
        began, paced = clock.monotonic(), 0
        self._came_at = began
        token: Any = None
        unread = account.dropped["unread"]
        try:
            while not stop.requested and not source.ended:
                self.is_consistent = True
                received = source.read(stop, ROUND_S)
                self.is_consistent = False
                if isinstance(received, Batch):
                    self._came()
                    if source.unread:
                        account.dropped["unread"] = unread + source.unread
                    items: Iterator[Frame | Malformed] = decoder.feed(received.content)
                    token = received.token if received.token is not None else token
                elif isinstance(received, Discontinuity):
                    self._discontinuity(received, observer)
                    items = decoder.restart()
                else:
                    self._watch_silence()
                    self._overdue()
                    observer.on_tick()
                    observer.on_batch_end(source, token)
                    continue
                for item in items:
                    if pace_hz is not None and not stop.requested:
                        paced += 1
                        self._wait_until(began + paced / pace_hz, stop, observer)
                    self._item(item)
                    if clock.monotonic() >= self._next_round:
                        self._overdue()
                        self._round()
                if source.datagrams and isinstance(received, Batch):
                    for item in decoder.finish():
                        self._item(item)
                observer.on_batch_end(source, token)
            if stop.requested:
                account.ended_by = "signal"
            else:
                for item in decoder.finish():
                    self._item(item)
            if not (stop.requested and observer.keeps_state):
                for frame in self._ordering.release():
                    self._frame(frame)
            self._flush()
            observer.on_batch_end(source, token)
            self.is_consistent = True
        except SinkClosed:
            account.ended_by = "closed output"
        finally:
            account.unfinished = self._windows.unfinished
            account.seconds = clock.monotonic() - began
        return account

    def _round(self) -> None:
        """Of the observer, where it is time for one."""
        if clock.monotonic() >= self._next_round:
            self._next_round = clock.monotonic() + ROUND_S
            self._observer.on_tick()

    def _wait_until(self, due: float, stop: ShutdownSignal, observer: PipelineObserver) -> None:
        while (ahead := due - clock.monotonic()) > 0 and not stop.requested:
            stop.wait(seconds=min(ahead, ROUND_S))
            observer.on_tick()
        self._came_at = max(due, self._came_at)

    def _came(self) -> None:
        self._came_at = clock.monotonic()
        if self.stale:
            self.stale = False
            self._sink.event(Event("flowing", self._windows.sample))

    def _watch_silence(self) -> None:
        silent = clock.monotonic() - self._came_at
        if self._stale_after_s is not None and silent > self._stale_after_s and not self.stale:
            self._flush()
            self.stale = True
            self._sink.event(Event("stale", self._windows.sample, {"seconds": round(silent, 3)}))

    def _discontinuity(self, discontinuity: Discontinuity, observer: PipelineObserver) -> None:
        if discontinuity.connected:
            self.account.reconnects += 1
        observer.on_connection_change(discontinuity.connected)
        self._report(discontinuity.reason)
        self._sink.event(
            Event(
                "connected" if discontinuity.connected else "disconnected",
                self._windows.sample,
                {"reason": discontinuity.reason},
            )
        )

    def _item(self, item: Frame | Malformed) -> None:
        if isinstance(item, Frame):
            if item.sequence is None:
                self._frame(item)
                return
            for frame in self._ordering.take(item):
                self._frame(frame)
            return
        self.account.malformed += 1
        if self._strict:
            self._flush()
            raise RunFailed(f"{item.where}: {item.problem} (--strict)")
        self._report(f"{item.where}: {item.problem}; left out")

    def _overdue(self) -> None:
        """Frames that waited long enough for those before them."""
        for frame in self._ordering.overdue():
            self._frame(frame)

    def _frame(self, frame: Frame) -> None:
        if frame.sequence is not None:
            if not self._in_sequence(frame.sequence):
                return
        elif self._stamps_hz is not None and isinstance(frame.time, (int, float)):
            self._in_time(frame.time, self._stamps_hz)
        self.account.samples += 1
        if not self._range.takes(frame.values):
            bad = self._range.bad(frame.values)
            self._gap(frame, bad, "missing" if np.isnan(frame.values[bad]).all() else "out_of_range")
            return
        self._held = frame.values
        self._in_gap = 0
        self._waiting = False
        self._advance(frame.values, frame)

    def _in_sequence(self, number: int) -> bool:
        """Fill what the sender's numbers skip. False: this sample was already there, or comes too late."""
        last, self._sequence = self._sequence, number
        if last is None or number == last + 1:
            return True
        # A sender that begins anew begins with 0 or 1; only what is sent again on purpose may go so far back.
        anew = number in (0, 1) and number < last - 1 and self._reorder <= Source.reorder
        if last - self._reorder < number <= last and not anew:
            self._sequence = last
            self.account.dropped["late" if number in self._lost else "repeated"] += 1
            self._lost.discard(number)
            return False
        if number <= last or number - last > LONGEST_LOSS:
            self._flush()
            self._sink.event(Event("sender_restarted", self._windows.sample, {"sequence": number, "before": last}))
            if self._gap_policy == "reset":
                self._restart("reset", reason="sender restarted")
            return True
        self._lost = set(range(max(last + 1, number - KNOWN_LOST), number)) | (
            self._lost if len(self._lost) < KNOWN_LOST else set()
        )
        self.fill_gap(number - last - 1, "lost")
        return True

    def _in_time(self, stamp: float, hz: float) -> None:
        last = self._stamp
        if last is not None and stamp < last and not self._stamp_back:
            self._stamp_back = True  # one stray stamp; a second one is a clock that was set back
            return
        self._stamp, self._stamp_back = stamp, False
        if last is not None and (skipped := round((stamp - last) * hz) - 1) > 0 and skipped < LONGEST_LOSS:
            self.fill_gap(skipped, "lost")

    def fill_gap(self, samples: int, reason: str) -> None:
        """Samples that were taken and never came: they get numbers, and are filled by the gap policy."""
        account, blank = self.account, Frame(np.full(self._engine.network.d_input, np.nan))
        bad = np.ones(self._engine.network.d_input, dtype=bool)
        for i in range(samples):
            if self._waiting:
                rest = samples - i
                account.samples += rest
                account.gaps[reason] += rest
                account.discarded += rest
                self._in_gap += rest
                self._windows.pass_over(rest)
                return
            account.samples += 1
            self._gap(blank, bad, reason)
            if i % 64 == 63:  # Millions of them take longer than a watchdog waits.
                self._round()

    def _gap(self, frame: Frame, bad: Array, reason: str) -> None:
        """A sample that must not reach the state: fill it, skip it, or give the window up."""
        account = self.account
        account.gaps[reason] += 1
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
        if len(self._pending) >= self._chunk or len(self._pending) >= self._windows.together():
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
            outputs = engine.step(sample)
            self.account.latency.record(clock.perf_counter_ns() - began)
            self._end(outputs, *pending[0][1:])
            return
        samples = np.array([values for values, _, _ in pending])
        if engine.lanes > 1:
            samples = np.repeat(samples[:, None], engine.lanes, axis=1)
        began = clock.perf_counter_ns()
        outputs = engine.chunk(samples)
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
        self._sink.decision(decision)  # One that could not go out does not count.
        account.decisions += 1
        if decision.truth is not None and decision.label is not None:
            account.labelled += 1
            account.correct += decision.label == decision.truth
        if self._deadline_s is not None and clock.monotonic() - self._came_at > self._deadline_s:
            account.deadline_misses += 1
        if self._when_idle is not None and windows.resting:
            act, self._when_idle = self._when_idle, None
            act()

    def _restart(self, event: str, **details: Any) -> None:
        """Zero state, and the next window starts with the next sample; said in the output and counted."""
        self.account.resets += 1
        lost = self._windows.restart()
        self.account.discarded += lost
        self._engine.reset()
        self._sink.event(Event(event, self._windows.sample, {**details, "discarded": lost}))

    def emit_event(self, event: str, **details: Any) -> None:
        """An event of whoever attends to this loop, at the next sample."""
        self._flush()
        self._sink.event(Event(event, self._windows.sample, details))

    def call_when_idle(self, act: Callable[[], None]) -> None:
        """Call ``act`` once no window is open, between two samples; now, if none is. One that waits is replaced."""
        self._flush()
        if self._windows.resting:
            act()
        else:
            self._when_idle = act

    def replace_engine(self, engine: Engine, windows: Windows | None = None) -> None:
        """Go on with another engine, between two samples. Its state is the caller's to hand over (``handover``).

        ``windows``: where the new network's differ; those that are open are given up. Raises UsageError if the engine
        does not fit.
        """
        self._flush()
        if engine.lanes != (windows or self._windows).lanes or engine.network.d_input != self._engine.network.d_input:
            raise UsageError("the new network does not fit this stream: other input channels or windows")
        if windows is not None:
            self.account.discarded += self._windows.restart()
            windows.pass_over(self._windows.sample)
            self._windows = windows
        self._engine = engine
        self._range = input_range(engine.network)

    def state(self) -> tuple[PipelineState, Snapshot]:
        """What a restart needs, with all that came in stepped."""
        self._flush()
        counts = {name: getattr(self.account, name) for name in _COUNTS}
        counts |= {f"gap.{reason}": n for reason, n in self.account.gaps.items()}
        counts |= {f"dropped.{reason}": n for reason, n in self.account.dropped.items()}
        held = _plain(self._held)
        state = PipelineState(
            self._windows.state(),
            held,
            self._in_gap,
            self._waiting,
            None if self._sequence is None else str(self._sequence),
            self._stamp,
            [
                EarlyFrame(str(frame.sequence), _plain(frame.values), frame.time, frame.label)
                for frame in self._ordering.held
            ],
            counts,
        )
        return state, self._engine.snapshot()

    def restore(self, state: PipelineState, snapshot: Snapshot) -> None:
        """Go on where ``state`` was taken. Raises SnapshotError if it belongs to another network or other windows."""
        if any(len(values) != len(self._held) for values in (state.held, *(early.values for early in state.early))):
            raise SnapshotError(f"snapshot: {len(state.held)} channels, expected {len(self._held)}; start without it")
        before = self._engine.snapshot()
        self._engine.restore(snapshot)
        try:
            self._windows.restore(state.windows)
        except SnapshotError:
            self._engine.restore(before)
            raise
        self._held = _values(state.held)
        self._in_gap, self._waiting = state.in_gap, state.waiting
        self._sequence, self._stamp = None if state.sequence is None else int(state.sequence), state.stamp
        early = [Frame(_values(e.values), e.time, e.label, int(e.sequence)) for e in state.early]
        self._ordering.go_on(self._sequence, early)
        for name in _COUNTS:
            setattr(self.account, name, state.counts.get(name, 0))
        self.account.earlier = self.account.samples
        for kind, counter in (("gap.", self.account.gaps), ("dropped.", self.account.dropped)):
            counter.update({name[len(kind) :]: n for name, n in state.counts.items() if name.startswith(kind)})

    @property
    def numbered(self) -> bool:
        """Whether the sender numbers its samples, so that what is missing will show."""
        return self._sequence is not None


def _plain(values: Array) -> list[float | None]:
    """(d_input,) for JSON, which knows no NaN and no infinity; both are gaps all the same."""
    return [float(value) if np.isfinite(value) else None for value in values]


def _values(plain: list[float | None]) -> Array:
    return np.array([np.nan if value is None else value for value in plain])
