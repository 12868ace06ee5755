"""The measurement protocol of ``edge-ssm profile``.

A warm-up lasts until the temperature is level. Then follow rounds; each has one idle block and one block of every
workload in random order, so that whatever drifts (temperature, other processes) affects all of them alike. A workload
steps one engine, either back to back or paced at the model's sample rate, and every call is timed. The power meter is
read by a separate process.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil

from edge_ssm.engines.registry import Engine
from edge_ssm.hardware import machine
from edge_ssm.histogram import LatencyHistogram
from edge_ssm.model.network import Array
from edge_ssm.profiler.energy import Block
from edge_ssm.profiler.sampler import Sampler, Trace

ROUNDS, BLOCK_S = 5, 10.0
QUICK_ROUNDS, QUICK_BLOCK_S = 3, 1.0
LEVEL_C, LEVEL_READINGS = 1.0, 3
"""The temperature is level if so many consecutive readings lie within this many degrees Celsius."""
MAX_WARM_UP_BLOCKS = 12
MAX_METER_FAILURES = 3
"""Number of meter failures after which a run continues without a meter."""
MAX_PASS, PASS_S = 1024, 5e-3
"""Most calls between two checks of whether a block is over, and the time in seconds that they may take."""
SPIN_S = 200e-6
"""A paced call is awaited by sleeping until this long before it is due, then by polling the clock: a sleep ends late
by tens of microseconds."""

Call = Callable[[], object]


@dataclass
class Workload:
    """One way of stepping an engine, and what was measured of it."""

    name: str
    engine: Engine
    samples: Array
    """Shape (n, d_input) or (n, lanes, d_input): samples in the sensor's units, used again and again."""
    chunk: int = 1
    """Samples per call."""
    rate_hz: float | None = None
    """Sample rate at which the workload is paced; None for back to back."""
    deadline_s: float | None = None
    """Time from when a sample is due to its output beyond which the call counts as a deadline miss."""
    model: str = ""
    """Path of the model, for the report."""
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)
    """Latency of the calls, including the time that timing them takes (``Measurement.timer_ns``)."""
    late: LatencyHistogram = field(default_factory=LatencyHistogram)
    """Time from when a paced call is due to its end."""
    block_p50_us: list[float] = field(default_factory=list)
    """Median latency in each block, in microseconds."""
    misses: int = 0
    steps: int = 0
    seconds: float = 0.0
    """Duration of all blocks."""
    cpu_s: float = 0.0
    """Processor time of this process in all blocks, in seconds."""

    def calls(self) -> list[Call]:
        """Return one pass of calls, each of which advances the engine by ``chunk`` samples."""
        calls: list[Call] = []
        if self.chunk == 1:
            out = np.empty((*self.samples.shape[1:-1], self.engine.network.d_output), dtype=self.engine.dtype)
            for sample in np.ascontiguousarray(self.samples):
                calls.append(lambda x=sample: self.engine.step(x, out))  # type: ignore[misc]
        else:
            for start in range(0, len(self.samples) - self.chunk + 1, self.chunk):
                part = np.ascontiguousarray(self.samples[start : start + self.chunk])
                calls.append(lambda x=part: self.engine.chunk(x))  # type: ignore[misc]
        begin = time.perf_counter()
        for call in calls[:8]:
            call()
        call_s = (time.perf_counter() - begin) / len(calls[:8])
        count = max(8, min(MAX_PASS, round(PASS_S / call_s)))
        return [calls[i % len(calls)] for i in range(count)]


@dataclass
class Measurement:
    """The raw result of a run."""

    blocks: list[Block]
    trace: Trace | None
    """The meter's readings; None without a meter."""
    states: list[tuple[float, machine.State]]
    """States of the machine, each with its time in seconds of CLOCK_MONOTONIC."""
    notes: list[str]
    """What could not be measured, and why."""
    invalid: list[str]
    """Changes of the machine that make the measurement invalid."""
    timer_ns: float
    """Nanoseconds that timing adds to a call, measured on a call that does nothing."""


def timer_ns() -> float:
    """Return the nanoseconds that timing adds to a call: the median over calls that do nothing."""
    histogram = LatencyHistogram()
    run_back_to_back([_do_nothing] * MAX_PASS, time.perf_counter_ns() + 20_000_000, histogram)
    return float(histogram.percentile_ns(50))


def _do_nothing() -> None:
    return None


def run_back_to_back(calls: Sequence[Call], until_ns: int, latency: LatencyHistogram) -> int:
    """Call ``calls`` again and again until ``until_ns`` (perf_counter_ns), and time each call.

    The end of a call is the beginning of the next one, so that a call costs one look at the clock. The bookkeeping
    happens between two passes over ``calls`` and is part of no call.

    Returns the number of calls.
    """
    clock, count = time.perf_counter_ns, 0
    while True:
        times = [clock()]
        append = times.append
        for call in calls:
            call()
            append(clock())
        latency.record_many(np.diff(np.array(times)))
        count += len(calls)
        if times[-1] >= until_ns:
            return count


def _run_paced(workload: Workload, calls: Sequence[Call], until_ns: int, latency: LatencyHistogram) -> int:
    """Do the same as ``run_back_to_back``, but start each call when its last sample is due.

    A call that is late starts at the next opportunity; none is left out.
    """
    assert workload.rate_hz is not None
    clock, count = time.perf_counter_ns, 0
    period_ns = 1e9 * workload.chunk / workload.rate_hz
    deadline_ns = None if workload.deadline_s is None else workload.deadline_s * 1e9
    first = clock() + period_ns
    due = first
    while due < until_ns:
        ahead_s = (due - clock()) * 1e-9
        if ahead_s > SPIN_S:
            time.sleep(ahead_s - SPIN_S)
        while clock() < due:
            pass
        call = calls[count % len(calls)]
        begin = clock()
        call()
        end = clock()
        latency.record(end - begin)
        workload.late.record(int(end - due))
        if deadline_ns is not None and end - due > deadline_ns:
            workload.misses += 1
        count += 1
        due = first + count * period_ns
    rest_s = (until_ns - clock()) * 1e-9
    if rest_s > 0:
        time.sleep(rest_s)
    return count


class _Rounds:
    """Executes rounds of blocks, and observes the machine after each block."""

    def __init__(
        self, workloads: Sequence[Workload], block_s: float, seed: int, on_block: Callable[[str, str], None]
    ) -> None:
        self._workloads, self._block_s, self._on_block = workloads, block_s, on_block
        self._order = random.Random(seed)
        self._calls = {workload.name: workload.calls() for workload in workloads}
        self.blocks: list[Block] = []
        self.states: list[tuple[float, machine.State]] = []
        self.invalid: list[str] = []
        self._observe()
        self._warm_up()
        self._expected_state = machine.state()

    def _observe(self) -> machine.State:
        state = machine.state()
        self.states.append((time.monotonic(), state))
        return state

    def _warm_up(self) -> None:
        """Step the workloads until the hottest zone's temperature is level; once if there is no thermometer."""
        hottest_c: list[float] = []
        for i in range(MAX_WARM_UP_BLOCKS):
            for workload in self._workloads:
                until_ns = time.perf_counter_ns() + int(self._block_s / len(self._workloads) * 1e9)
                run_back_to_back(self._calls[workload.name], until_ns, LatencyHistogram())
            celsius = self._observe().temperature_c
            hottest_c.append(max(celsius.values(), default=0.0))
            if not celsius or (i + 1 >= LEVEL_READINGS and machine.is_level(hottest_c[-LEVEL_READINGS:], LEVEL_C)):
                return

    def run(self, number: int) -> None:
        """Execute one round."""
        order: list[Workload | None] = [None, *self._workloads]
        self._order.shuffle(order)
        for workload in order:
            kind = "idle" if workload is None else workload.name
            self._on_block(kind, "begin")
            begin = time.monotonic()
            steps = self._block(workload)
            end = time.monotonic()
            self._on_block(kind, "end")
            self.blocks.append(Block(number, kind, begin, end, steps))
            state = self._observe()
            if changes := machine.changes(self._expected_state, state):
                self.invalid += [f"in round {number + 1} {change}" for change in changes]
            if self.invalid:
                self._expected_state = state  # report each change once

    def _block(self, workload: Workload | None) -> int:
        """Execute one block, idle without a workload, and return the number of steps."""
        if workload is None:
            time.sleep(self._block_s)
            return 0
        calls, latency = self._calls[workload.name], LatencyHistogram()
        begin, cpu_begin = time.monotonic(), time.process_time()
        until_ns = time.perf_counter_ns() + int(self._block_s * 1e9)
        if workload.rate_hz is None:
            count = run_back_to_back(calls, until_ns, latency)
        else:
            count = _run_paced(workload, calls, until_ns, latency)
        workload.latency.add(latency)
        workload.block_p50_us.append(latency.percentile_ns(50) / 1e3)
        workload.steps += count * workload.chunk
        workload.seconds += time.monotonic() - begin
        workload.cpu_s += time.process_time() - cpu_begin
        return count * workload.chunk


def run(
    workloads: Sequence[Workload],
    sampler: Sampler | None,
    rounds: int = ROUNDS,
    block_s: float = BLOCK_S,
    seed: int = 0,
    next_sampler: Callable[[], Sampler | None] = lambda: None,
    on_block: Callable[[str, str], None] = lambda kind, stage: None,
) -> Measurement:
    """Execute the protocol.

    Parameters
    ----------
    workloads
        What to measure; the results are added to their attributes.
    sampler
        The meter's sampler, which is stopped at the end; None for no meter.
    rounds, block_s
        Number of rounds, and the duration of a block in seconds.
    seed
        Seed of the order of the blocks.
    next_sampler
        Opens another meter after one has failed. The readings of the failed one are dropped, and the rounds start
        again, so that the new meter covers all of them.
    on_block
        Called with the kind of each block ("idle" or a workload's name) and "begin" or "end".
    """
    notes: list[str] = []
    trace: Trace | None = None
    try:
        timer = timer_ns()
        executed = _Rounds(workloads, block_s, seed, on_block)
        number, covered, failures = 0, 0, 0
        while covered < rounds:
            executed.run(number)
            number += 1
            covered += 1
            if sampler is not None and (failure := sampler.failure()):
                notes.append(f"the meter failed during the run ({failure})")
                sampler.stop()
                failures += 1
                sampler = next_sampler() if failures < MAX_METER_FAILURES else None
                if sampler is not None:
                    notes[-1] += f"; continued with {sampler.meter.name}"
                    covered = 0
        trace = sampler.trace() if sampler is not None else None
    finally:
        if sampler is not None:
            sampler.stop()
    return Measurement(executed.blocks, trace, executed.states, notes, executed.invalid, timer)


def load_percent() -> float:
    """Return the current load of all processors in percent, measured over a tenth of a second."""
    return float(psutil.cpu_percent(0.1))
