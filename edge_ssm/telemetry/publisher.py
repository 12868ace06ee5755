"""The publisher of a run's status, and the thread that renews it every second.

``edge-ssm top`` reads the status from a small file (``status_files``); the status page and the metrics ask the
publisher itself.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from edge_ssm.hardware import machine
from edge_ssm.histogram import LatencyHistogram
from edge_ssm.io.messages import Decision, Event
from edge_ssm.io.sinks.base import Sink
from edge_ssm.io.sinks.formats import Formatter
from edge_ssm.model.network import Network
from edge_ssm.runtime.counters import Counters
from edge_ssm.telemetry.status import VERSION, Point, Status, describe_decision
from edge_ssm.telemetry.status_files import StatusFile, start_ticks

INTERVAL_S = 1.0
MAX_EVENTS = 32
MAX_DECISIONS = 64
MAX_POINTS = 900
"""Points of the history, one per interval: 15 minutes."""
RATE_S = 60.0
"""Period over which the rate of decisions is taken: there may be one in many seconds only."""


@dataclass
class RunInfo:
    """What is known about a run beside its counters. Written by the pipeline's thread, read by the publisher's."""

    model: str
    """Path of the model."""
    model_digest: str
    engine: str
    sample_rate_hz: float | None
    profile: str | None = None
    """Name of the firmware profile."""
    source: str = ""
    source_state: str = "waiting"
    """See ``Status.source_state``."""
    ready: bool = False
    snapshot_at: float | None = None
    """``time.monotonic()`` of the last snapshot on disk."""
    ticked_at: float = 0.0
    """``time.monotonic()`` of the pipeline's last tick; 0 before the first."""
    power_w: float | None = None
    """Measured by the publisher; adaptation reads it here, so that only one meter is open."""


class StatusPublisher:
    """Passes decisions and events on to the output, and publishes what it sees of them.

    ``read_power`` returns watts; it is called once a second from the publisher's thread.
    """

    def __init__(
        self,
        formatter: Formatter,
        info: RunInfo,
        counters: Counters,
        read_power: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.info = info
        self._formatter = formatter
        self._counters = counters
        self._read_power = read_power
        self._labels: Counter[str] = Counter()
        self._decisions: deque[Decision] = deque(maxlen=MAX_DECISIONS)
        self._events: deque[tuple[float, str]] = deque(maxlen=MAX_EVENTS)
        self._history: deque[Point] = deque(maxlen=MAX_POINTS)
        self._samples_per_s = self._decisions_per_s = 0.0
        self._recent_p99_us = 0.0
        self._started = time.time()
        self._process_started = start_ticks(os.getpid())
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._file: StatusFile | None = None

    @property
    def sink(self) -> Sink | None:
        """The output that decisions go to; None for standard output."""
        return self._formatter.sink

    def adopt(self, network: Network) -> None:
        """Expect the decisions of another network from now on."""
        self._formatter.adopt(network)

    def decision(self, decision: Decision) -> None:
        """Pass a decision on."""
        self._formatter.decision(decision)
        if decision.label is not None:
            self._labels[decision.label] += 1
        self._decisions.append(decision)

    def event(self, event: Event) -> None:
        """Pass an event on."""
        self._formatter.event(event)
        details = ", ".join(f"{key} {value}" for key, value in event.details.items())
        text = f"sample {event.sample}: {event.event}" + (f" ({details})" if details else "")
        self._events.append((time.time(), text))

    def start(self) -> None:
        """Start to renew the status, and to write it to a file if there is a folder for it."""
        self._file = StatusFile()
        self._thread = threading.Thread(target=self._run, args=(self._file,), name="status", daemon=True)
        self._thread.start()

    def _run(self, file: StatusFile) -> None:
        counters = self._counters
        then, samples, latency = time.monotonic(), counters.samples, counters.latency.copy()
        earlier = deque([(then, counters.decisions)], maxlen=math.ceil(RATE_S / INTERVAL_S))
        while not self._closed.wait(INTERVAL_S):
            now = time.monotonic()
            since, decisions = earlier[0]
            self._samples_per_s = (counters.samples - samples) / (now - then)
            self._decisions_per_s = (counters.decisions - decisions) / (now - since)
            self._recent_p99_us = counters.latency.since(latency).percentile_ns(99) / 1e3
            then, samples, latency = now, counters.samples, counters.latency.copy()
            earlier.append((now, counters.decisions))
            self.info.power_w = self._read_power()
            status = self.status()
            self._history.append(
                Point(
                    status.updated,
                    status.samples_per_s,
                    status.power_w,
                    status.temperature_c,
                    status.step_p99_recent_us,
                )
            )
            file.write(status)

    def status(self) -> Status:
        """Return the status as of now. May be called from any thread."""
        info, sink, now = self.info, self.sink, time.monotonic()
        p50, p99, longest = (self._counters.latency.percentile_ns(p) / 1e3 for p in (50, 99, 100))
        counts = self._counters.published()
        if sink is not None:
            counts["dropped"] |= {f"output_{reason}": n for reason, n in sink.dropped.copy().items() if n}
        return Status(
            version=VERSION,
            pid=os.getpid(),
            model=info.model,
            model_digest=info.model_digest,
            engine=info.engine,
            profile=info.profile,
            source=info.source,
            source_state=info.source_state,
            started=self._started,
            updated=time.time(),
            sample_rate_hz=info.sample_rate_hz,
            samples_per_s=self._samples_per_s,
            decisions_per_s=self._decisions_per_s,
            labels=dict(self._labels.copy()),
            last=describe_decision(self._decisions[-1] if self._decisions else None),
            queue=sink.depth if sink else 0,
            queue_size=sink.size if sink else 0,
            output_problem=sink.problem if sink else "",
            snapshot_age_s=None if info.snapshot_at is None else now - info.snapshot_at,
            power_w=info.power_w,
            temperature_c=max(machine.temperatures().values(), default=None),
            resident_mb=machine.resident_mib(),
            step_p50_us=p50,
            step_p99_us=p99,
            step_max_us=longest,
            loop_age_s=now - info.ticked_at if info.ticked_at else 0.0,
            ready=info.ready,
            events=[text for _, text in list(self._events)],
            step_p99_recent_us=self._recent_p99_us,
            process_started=self._process_started,
            **counts,
        )

    def decisions(self) -> list[Decision]:
        """Return the last decisions, oldest first. May be called from any thread."""
        return list(self._decisions)

    def events(self) -> list[tuple[float, str]]:
        """Return the last events as (seconds since the epoch, description), oldest first. From any thread."""
        return list(self._events)

    def history(self) -> list[Point]:
        """Return one point per interval, oldest first. May be called from any thread."""
        return list(self._history)

    def latency(self) -> LatencyHistogram:
        """Return the latency of all engine steps. May be called from any thread."""
        return self._counters.latency

    def close(self) -> None:
        """Stop the thread, remove the status file and close the output."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(5)
        if self._file is not None:
            self._file.remove()
        self._formatter.close()
