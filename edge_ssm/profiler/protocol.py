"""The protocol of ``edge-ssm profile``: what is run, in which order, and what is kept of it.

After a warm-up until the temperature is level come rounds, each of which has one idle block and one block of every
activity in random order, so that what drifts (temperature, other work) falls on all alike. An activity steps one engine
back to back, or paced at the model's sample rate; every step is timed. The meter runs beside in a process of its own.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil

from edge_ssm.engines.registry import Engine
from edge_ssm.errors import MeterUnavailable, UsageError
from edge_ssm.hardware import machine
from edge_ssm.hardware.meters.registry import METERS
from edge_ssm.histogram import LatencyHistogram
from edge_ssm.model.network import Array
from edge_ssm.profiler import sampler
from edge_ssm.profiler.energy import Block
from edge_ssm.profiler.sampler import Sampler, Trace

ROUNDS, BLOCK_S = 5, 10.0
QUICK_ROUNDS, QUICK_BLOCK_S = 3, 1.0
LEVEL_C, LEVEL_READINGS = 1.0, 3
LONGEST_WARM_UP_BLOCKS = 12
MOST_FAILURES = 3
"""Of meters in a run; then it goes on without."""
PASS, PASS_S = 1024, 5e-3
"""Most calls between two looks at whether a block is over, and how long they may take."""
SPIN_S = 200e-6
"""A pace is kept by sleeping until shortly before, and asking for the rest: sleeps end late by tens of microseconds."""


@dataclass
class Activity:
    """One way of stepping, and what was measured of it."""

    name: str
    engine: Engine
    samples: Array
    """(n, d_input) or (n, lanes, d_input); a chunk has so many at once."""
    chunk: int = 1
    rate_hz: float | None = None
    """None: back to back."""
    deadline_s: float | None = None
    """From when a sample is due to its output; later is a miss."""
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)
    """Of a call; what timing it takes is in it (``Run.timer_ns``)."""
    late: LatencyHistogram = field(default_factory=LatencyHistogram)
    """Of a paced call, from when it was due to its end."""
    block_p50_us: list[float] = field(default_factory=list)
    """Median of each block: what rounds differ in."""
    misses: int = 0
    steps: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0
    """Processor time of this process in its blocks."""

    def calls(self) -> list[Callable[[], object]]:
        """A call advances ``chunk`` samples."""
        made: list[Callable[[], object]] = []
        if self.chunk == 1:
            out = np.empty((*self.samples.shape[1:-1], self.engine.network.d_output), dtype=self.engine.dtype)
            for sample in np.ascontiguousarray(self.samples):
                made.append(lambda x=sample: self.engine.step(x, out))  # type: ignore[misc]
            return self._pass(made)
        for start in range(0, len(self.samples) - self.chunk + 1, self.chunk):
            part = np.ascontiguousarray(self.samples[start : start + self.chunk])
            made.append(lambda x=part: self.engine.chunk(x))  # type: ignore[misc]
        return self._pass(made)

    @staticmethod
    def _pass(calls: list[Callable[[], object]]) -> list[Callable[[], object]]:
        begin = time.perf_counter()
        for call in calls[:8]:
            call()
        each = (time.perf_counter() - begin) / len(calls[:8])
        count = max(8, min(PASS, round(PASS_S / each)))
        return [calls[i % len(calls)] for i in range(count)]


@dataclass
class Run:
    """What was done and seen."""

    blocks: list[Block]
    trace: Trace | None
    states: list[tuple[float, machine.State]]
    """With CLOCK_MONOTONIC seconds."""
    notes: list[str]
    """Of what could not be measured."""
    invalid: list[str]
    """What changed that should not have."""
    idle_s: float
    timer_ns: float
    """That timing a call adds to it, measured on an empty one."""


def open_meter(name: str) -> tuple[Sampler | None, list[str]]:
    """The meter of that name, or for "auto" the first that reads; and in words why others do not.

    Raises UsageError for an unknown name, MeterUnavailable if one that was named does not read.
    """
    if name == "none":
        return None, []
    if name != "auto":
        if name not in METERS:
            raise UsageError(f"--meter {name!r}: unknown, expected auto, none, {', '.join(METERS)}")
        return sampler.start(name), []
    refused: list[str] = []
    for each in METERS:
        try:
            return sampler.start(each), refused
        except MeterUnavailable as error:
            refused.append(str(error))
    return None, refused


def timer_ns() -> float:
    """Nanoseconds that a call takes besides its work: the median over calls that do nothing."""
    found = LatencyHistogram()
    _back_to_back([_nothing] * PASS, time.perf_counter_ns() + 20_000_000, found)
    return float(found.percentile_ns(50))


def _nothing() -> None:
    return None


def _back_to_back(calls: Sequence[Callable[[], object]], until_ns: int, latency: LatencyHistogram) -> int:
    """Calls until the time is over, each one timed; returns how many.

    The end of one is the beginning of the next, so that timing is one look at the clock. Passes over ``calls`` are
    short against a block, and what is counted between them is in no call.
    """
    clock, done = time.perf_counter_ns, 0
    while True:
        times = [clock()]
        append = times.append
        for call in calls:
            call()
            append(clock())
        latency.record_many(np.diff(np.array(times)))
        done += len(calls)
        if times[-1] >= until_ns:
            return done


def _paced(activity: Activity, calls: Sequence[Callable[[], object]], until_ns: int, latency: LatencyHistogram) -> int:
    """The same, a call when its last sample is due; one that is late takes the next free moment, none is left out."""
    assert activity.rate_hz is not None
    clock, done = time.perf_counter_ns, 0
    period_ns = 1e9 * activity.chunk / activity.rate_hz
    deadline_ns = None if activity.deadline_s is None else activity.deadline_s * 1e9
    first = clock() + period_ns
    due = first
    while due < until_ns:
        ahead = (due - clock()) * 1e-9
        if ahead > SPIN_S:
            time.sleep(ahead - SPIN_S)
        while clock() < due:
            pass
        call = calls[done % len(calls)]
        begin = clock()
        call()
        end = clock()
        latency.record(end - begin)
        activity.late.record(int(end - due))
        if deadline_ns is not None and end - due > deadline_ns:
            activity.misses += 1
        done += 1
        due = first + done * period_ns
    rest = (until_ns - clock()) * 1e-9
    if rest > 0:
        time.sleep(rest)
    return done


def run(
    activities: Sequence[Activity],
    meter: Sampler | None,
    rounds: int = ROUNDS,
    block_s: float = BLOCK_S,
    seed: int = 0,
    open_next: Callable[[str], Sampler | None] = lambda why: None,
    on_block: Callable[[str, str], None] = lambda kind, stage: None,
) -> Run:
    """``open_next`` gives another meter where one fails (it is told why); what that one read is given up, and rounds
    are added so that the new one sees all. ``on_block`` hears of each block: its kind, and "begin" or "end"."""
    order = random.Random(seed)
    notes: list[str] = []
    trace: Trace | None = None
    try:
        overhead = timer_ns()
        made = {activity.name: activity.calls() for activity in activities}
        states = [(time.monotonic(), machine.state())]
        for _, state in _warm_up(activities, made, block_s):
            states.append((time.monotonic(), state))
        first = machine.state()
        invalid: list[str] = []
        blocks: list[Block] = []
        idle_s, number, whole, failures = 0.0, 0, 0, 0
        while whole < rounds:
            kinds: list[Activity | None] = [None, *activities]
            order.shuffle(kinds)
            for activity in kinds:
                kind = "idle" if activity is None else activity.name
                on_block(kind, "begin")
                begin = time.monotonic()
                done = _block(activity, made, block_s)
                end = time.monotonic()
                on_block(kind, "end")
                blocks.append(Block(number, kind, begin, end, done))
                idle_s += end - begin if activity is None else 0
                state = machine.state()
                states.append((end, state))
                invalid += [f"in round {number + 1} {what}" for what in machine.changes(first, state)]
                if invalid:
                    first = state  # Said once.
            number += 1
            whole += 1
            if meter is not None and (why := meter.failed()):
                notes.append(f"the meter failed in mid-run ({why})")
                meter.stop()
                failures += 1
                meter = open_next(why) if failures < MOST_FAILURES else None
                if meter is not None:
                    notes[-1] += f"; {meter.meter.name} went on"
                    whole = 0
        trace = meter.trace() if meter is not None else None
    finally:
        if meter is not None:
            meter.stop()
    return Run(blocks, trace, states, notes, invalid, idle_s, overhead)


def _block(activity: Activity | None, made: dict[str, list[Callable[[], object]]], block_s: float) -> int:
    until_ns = time.perf_counter_ns() + int(block_s * 1e9)
    if activity is None:
        time.sleep(block_s)
        return 0
    cpu = time.process_time()
    begin = time.monotonic()
    calls, of_block = made[activity.name], LatencyHistogram()
    if activity.rate_hz is None:
        done = _back_to_back(calls, until_ns, of_block)
    else:
        done = _paced(activity, calls, until_ns, of_block)
    activity.latency.add(of_block)
    activity.block_p50_us.append(of_block.percentile_ns(50) / 1e3)
    activity.steps += done * activity.chunk
    activity.seconds += time.monotonic() - begin
    activity.cpu_s += time.process_time() - cpu
    return done * activity.chunk


def _warm_up(
    activities: Sequence[Activity], made: dict[str, list[Callable[[], object]]], block_s: float
) -> Iterator[tuple[float, machine.State]]:
    """Blocks of work until the hottest zone stays within LEVEL_C; without a thermometer one block of each."""
    hottest: list[float] = []
    for i in range(LONGEST_WARM_UP_BLOCKS):
        for activity in activities:
            until_ns = time.perf_counter_ns() + int(block_s / len(activities) * 1e9)
            _back_to_back(made[activity.name], until_ns, LatencyHistogram())
        state = machine.state()
        yield time.monotonic(), state
        hottest.append(max(state.temperature_c.values(), default=0.0))
        if not state.temperature_c or (i + 1 >= LEVEL_READINGS and machine.level(hottest[-LEVEL_READINGS:], LEVEL_C)):
            return


def load_percent() -> float:
    """Of all processors now, in a tenth of a second."""
    return float(psutil.cpu_percent(0.1))
