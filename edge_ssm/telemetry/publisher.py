"""What runs tell of themselves while they run: one ``Status``, renewed every second. ``edge-ssm top`` reads it from a
small file, the metrics and the status page from the process itself."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge_ssm import files
from edge_ssm.hardware import machine
from edge_ssm.histogram import LatencyHistogram
from edge_ssm.io.messages import Decision, Event
from edge_ssm.io.sinks.base import Sink
from edge_ssm.io.sinks.formats import Formatter
from edge_ssm.model.network import Network
from edge_ssm.runtime.counters import Counters
from edge_ssm.telemetry.status import VERSION, Point, Status, in_words
from edge_ssm.telemetry.status_files import SUFFIX, _clear, _own, _ticks, folders

INTERVAL_S = 1.0
EVENTS = 32
RECENT = 64
HISTORY = 900
"""Points kept of power and temperature over time, one an interval: 15 minutes."""
RATE_S = 60.0
"""That the rate of decisions is taken over: one may fall due in many seconds only."""


@dataclass
class RunInfo:
    """What a run is, beside its account. The loop's thread changes it, ``StatusPublisher``'s thread reads it."""

    model: str
    model_digest: str
    engine: str
    sample_rate_hz: float | None
    profile: str | None = None
    source: str = ""
    source_state: str = "waiting"
    ready: bool = False
    snapshot_at: float | None = None
    """time.monotonic() of the last one."""
    loop_at: float = 0.0
    """time.monotonic() of the loop's last round."""
    power_w: float | None = None
    """Measured by whoever watches budgets, so that a meter is opened once."""


class StatusPublisher:
    """A sink that passes everything on, and a thread of its own that tells of it once a second."""

    def __init__(self, formatter: Formatter, facts: RunInfo) -> None:
        self._formatter = formatter
        self.facts = facts
        self._account = Counters()
        self._labels: Counter[str] = Counter()
        self._last: Decision | None = None
        self._recent: deque[Decision] = deque(maxlen=RECENT)
        self._events: deque[tuple[float, str]] = deque(maxlen=EVENTS)
        self._history: deque[Point] = deque(maxlen=HISTORY)
        self._rates = (0.0, 0.0)
        self._recent_p99_us = 0.0
        self._started = time.time()
        self._process_started = _ticks(os.getpid())
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._path: Path | None = None
        self.power: Callable[[], float | None] = lambda: None
        """Watts now; called once a second from this object's thread."""

    @property
    def sink(self) -> Sink | None:
        return self._formatter.sink

    def adopt(self, network: Network) -> None:
        """Decisions are another network's from now on."""
        self._formatter.adopt(network)

    def decision(self, decision: Decision) -> None:
        self._formatter.decision(decision)
        if decision.label is not None:
            self._labels[decision.label] += 1
        self._last = decision
        self._recent.append(decision)

    def event(self, event: Event) -> None:
        self._formatter.event(event)
        details = ", ".join(f"{key} {value}" for key, value in event.details.items())
        self._events.append(
            (time.time(), f"sample {event.sample}: {event.event}" + (f" ({details})" if details else ""))
        )

    def watch(self, account: Counters) -> None:
        """Tell of ``account`` from now on; in a file too, where a folder can be written to."""
        self._account = account
        folder = next((folder for folder in folders() if _own(folder)), None)
        if folder is not None:
            _clear(folder)
        self._path = folder / f"{os.getpid()}{SUFFIX}" if folder else None
        self._thread = threading.Thread(target=self._tell, name="status", daemon=True)
        self._thread.start()

    def _tell(self) -> None:
        account = self._account
        before, samples, latency = time.monotonic(), account.samples, account.latency.copy()
        decided = deque([(before, account.decisions)], maxlen=math.ceil(RATE_S / INTERVAL_S))
        while not self._ended.wait(INTERVAL_S):
            now = time.monotonic()
            since, decisions = decided[0]
            self._rates = (
                (account.samples - samples) / (now - before),
                (account.decisions - decisions) / (now - since),
            )
            self._recent_p99_us = account.latency.since(latency).percentile_ns(99) / 1e3
            before, samples, latency = now, account.samples, account.latency.copy()
            decided.append((now, account.decisions))
            self.facts.power_w = self.power()
            status = self.status()
            self._history.append(
                Point(status.updated, self._rates[0], status.power_w, status.temperature_c, status.step_p99_recent_us)
            )
            if self._path is not None:
                try:
                    files.write(self._path, msgspec.json.encode(status), durable=False)
                except (OSError, UnicodeError):  # a full disk, a folder that is gone, a name that is no text
                    self._path = None  # The run itself matters more.

    def status(self) -> Status:
        """As of now. From any thread."""
        account, facts, sink, now = self._account, self.facts, self.sink, time.monotonic()
        p50, p99, longest = (account.latency.percentile_ns(p) / 1e3 for p in (50, 99, 100))
        dropped = account.dropped.copy()
        dropped.update({"malformed": account.malformed, "discarded": account.discarded})
        if sink is not None:
            dropped.update({f"output_{reason}": n for reason, n in sink.dropped.copy().items()})
        return Status(
            version=VERSION,
            pid=os.getpid(),
            model=facts.model,
            model_digest=facts.model_digest,
            engine=facts.engine,
            profile=facts.profile,
            source=facts.source,
            source_state=facts.source_state,
            started=self._started,
            updated=time.time(),
            sample_rate_hz=facts.sample_rate_hz,
            samples=account.samples,
            samples_per_s=self._rates[0],
            decisions=account.decisions,
            decisions_per_s=self._rates[1],
            labels=dict(self._labels.copy()),
            last=in_words(self._last),
            gaps=dict(account.gaps.copy()),
            dropped={reason: n for reason, n in dropped.items() if n},
            undecided=account.undecided,
            resets=account.resets,
            deadline_misses=account.deadline_misses,
            reconnects=account.reconnects,
            reloads=account.reloads,
            reload_failures=account.reload_failures,
            moves=account.moves,
            engine_losses=account.engine_losses,
            queue=sink.depth if sink else 0,
            queue_size=sink.size if sink else 0,
            output_problem=sink.problem if sink else "",
            snapshot_age_s=None if facts.snapshot_at is None else now - facts.snapshot_at,
            power_w=facts.power_w,
            temperature_c=max(machine.temperatures().values(), default=None),
            resident_mb=machine.resident_mib(),
            step_p50_us=p50,
            step_p99_us=p99,
            step_max_us=longest,
            loop_age_s=now - facts.loop_at if facts.loop_at else 0.0,
            ready=facts.ready,
            events=[text for _, text in list(self._events)],
            step_p99_recent_us=self._recent_p99_us,
            process_started=self._process_started,
        )

    def recent(self) -> list[Decision]:
        """The last decisions, oldest first. From any thread."""
        return list(self._recent)

    def events(self) -> list[tuple[float, str]]:
        """(seconds of the epoch, what happened), oldest first. From any thread."""
        return list(self._events)

    def history(self) -> list[Point]:
        """One point an interval, oldest first. From any thread."""
        return list(self._history)

    def latency(self) -> LatencyHistogram:
        """Of the engine's steps so far. From any thread."""
        return self._account.latency

    def close(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(5)
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        self._formatter.close()
