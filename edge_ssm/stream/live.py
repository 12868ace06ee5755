"""What runs tell of themselves while they run: one ``Status``, renewed every second. ``edge-ssm top`` reads it from a
small file, the metrics and the status page from the process itself."""

from __future__ import annotations

import math
import os
import re
import stat
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Annotated

import msgspec

from edge_ssm import atomic
from edge_ssm.monitor import machine
from edge_ssm.monitor.latency import LatencyHistogram
from edge_ssm.network import Network
from edge_ssm.stream.decisions import Decision, Event
from edge_ssm.stream.loop import Account
from edge_ssm.stream.outlets.base import Outlet
from edge_ssm.stream.sinks import Sink

VERSION = 2
INTERVAL_S = 1.0
EVENTS = 32
RECENT = 64
HISTORY = 900
"""Points kept of power and temperature over time, one an interval: 15 minutes."""
FOLDER_VARIABLE = "EDGE_SSM_RUN"
SYSTEM_FOLDER = Path("/run/edge-ssm")
SUFFIX = ".status"
LARGEST = 1 << 16
TEMPORARY_S = 60.0
"""No renewal takes so long."""
RATE_S = 60.0
"""That the rate of decisions is taken over: one may fall due in many seconds only."""

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
Measured = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]
"""Celsius, or watts: a rail may feed back."""


class Status(msgspec.Struct, frozen=True):
    version: int
    pid: Count
    model: str
    model_digest: str
    engine: str
    profile: str | None
    source: str
    source_state: str
    """waiting (nothing came yet), flowing, stale (nothing for too long), lost (no connection)."""
    started: Amount
    """Seconds of the epoch, as ``updated``."""
    updated: Amount
    sample_rate_hz: Amount | None
    samples: Count
    samples_per_s: Amount
    """Over the last interval."""
    decisions: Count
    decisions_per_s: Amount
    """Over the last minute, or since the start."""
    labels: dict[str, Count]
    last: str
    """The last decision, in words."""
    gaps: dict[str, Count]
    """Samples that had to be filled, skipped or given up, by reason."""
    dropped: dict[str, Count]
    """What came in, or was decided, and went nowhere, by reason: malformed, repeated, late, discarded, unfinished
    windows; output_* are decisions."""
    undecided: Count
    resets: Count
    deadline_misses: Count
    reconnects: Count
    reloads: Count
    reload_failures: Count
    moves: Count
    """Between members of a family."""
    engine_losses: Count
    queue: Count
    queue_size: Count
    """Lines that wait for a slow reader of decisions, and how many may; 0 where none can wait."""
    output_problem: str
    snapshot_age_s: Amount | None
    power_w: Measured | None
    temperature_c: Measured | None
    """Of the hottest zone."""
    resident_mb: Amount
    step_p50_us: Amount
    step_p99_us: Amount
    step_max_us: Amount
    loop_age_s: Amount
    """Since the loop last went round: it is stuck where this grows."""
    ready: bool
    events: list[str]
    """The last ones, oldest first."""
    step_p99_recent_us: float = 0.0
    """Over the last interval; 0 if there was no step."""
    process_started: Count = 0
    """When ``pid`` began, in clock ticks since the machine's start: its number is given to another process one day.
    0: not known."""


@dataclass(frozen=True)
class Point:
    """One interval of the past."""

    time: float
    """Seconds of the epoch."""
    samples_per_s: float
    power_w: float | None
    temperature_c: float | None
    step_p99_us: float
    """Of this interval alone: of the whole run it would hardly move after an hour."""


def folders() -> list[Path]:
    """Where runs may tell of themselves, the first that can be written to being taken."""
    if given := os.environ.get(FOLDER_VARIABLE):
        return [Path(given)]
    found = [SYSTEM_FOLDER]
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        found.append(Path(runtime) / "edge-ssm")
    return [*found, Path(gettempdir()) / f"edge-ssm-{os.getuid()}"]


def _own(folder: Path) -> bool:
    """Made, and nobody else's: others could put links there."""
    try:
        folder.mkdir(mode=0o755, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


@dataclass
class Facts:
    """What a run is, beside its account. The loop's thread changes it, ``Live``'s thread reads it."""

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


class Live:
    """A sink that passes everything on, and a thread of its own that tells of it once a second."""

    def __init__(self, sink: Sink, facts: Facts) -> None:
        self._sink = sink
        self.facts = facts
        self._account = Account()
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
    def outlet(self) -> Outlet | None:
        return self._sink.outlet

    def adopt(self, network: Network) -> None:
        """Decisions are another network's from now on."""
        self._sink.adopt(network)

    def decision(self, decision: Decision) -> None:
        self._sink.decision(decision)
        if decision.label is not None:
            self._labels[decision.label] += 1
        self._last = decision
        self._recent.append(decision)

    def event(self, event: Event) -> None:
        self._sink.event(event)
        details = ", ".join(f"{key} {value}" for key, value in event.details.items())
        self._events.append(
            (time.time(), f"sample {event.sample}: {event.event}" + (f" ({details})" if details else ""))
        )

    def watch(self, account: Account) -> None:
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
                    atomic.write(self._path, msgspec.json.encode(status), durable=False)
                except (OSError, UnicodeError):  # a full disk, a folder that is gone, a name that is no text
                    self._path = None  # The run itself matters more.

    def status(self) -> Status:
        """As of now. From any thread."""
        account, facts, outlet, now = self._account, self.facts, self.outlet, time.monotonic()
        p50, p99, longest = (account.latency.percentile_ns(p) / 1e3 for p in (50, 99, 100))
        dropped = account.dropped.copy()
        dropped.update({"malformed": account.malformed, "discarded": account.discarded})
        if outlet is not None:
            dropped.update({f"output_{reason}": n for reason, n in outlet.dropped.copy().items()})
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
            queue=outlet.depth if outlet else 0,
            queue_size=outlet.size if outlet else 0,
            output_problem=outlet.problem if outlet else "",
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
        self._sink.close()


def in_words(decision: Decision | None) -> str:
    if decision is None:
        return ""
    if decision.label is not None:
        return f"{decision.label} ({decision.score:.3f})"
    return ", ".join(f"{value:.4g}" for value in decision.outputs)


def running() -> list[Status]:
    """Of all runs that can be seen from here, by process number. What can be no status of the process that it names is
    passed over: others may write into some of the folders."""
    found = {}
    for folder in folders():
        # A service's instances have a folder each.
        for path in sorted([*folder.glob(f"*{SUFFIX}"), *folder.glob(f"*/*{SUFFIX}")]):
            if (status := _read(path)) is not None:
                found[status.pid] = status
    return [found[pid] for pid in sorted(found)]


def _read(path: Path) -> Status | None:
    try:
        # Not blocking: a pipe of that name would keep its reader waiting for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                return None
            status = msgspec.json.decode(file.read(LARGEST), type=Status)
        if status.version != VERSION or path.name != f"{status.pid}{SUFFIX}":
            return None
        if os.stat(f"/proc/{status.pid}").st_uid != about.st_uid:  # Nobody speaks for another's process.
            return None
        if status.process_started not in (0, _ticks(status.pid)):
            return None
    except (OSError, msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    return status


def _ticks(pid: int) -> int:
    """When a process began: field 22 of proc_pid_stat(5); 0 where that can't be known."""
    try:
        told = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    return int(told.rpartition(b")")[2].split()[19])  # the second field, a name, may hold spaces and brackets


def _clear(folder: Path) -> None:
    """Away with what killed runs left in a folder of our own. What is taken from a run that lives, one of another
    version or in another container, is there again with its next renewal."""
    with suppress(OSError):
        for path in list(folder.iterdir()):
            if re.fullmatch(r"\d+" + re.escape(SUFFIX), path.name):
                left = _read(path) is None
            else:  # A kill in the midst of a renewal leaves its temporary file (edge_ssm.atomic).
                half_written = re.fullmatch(r"\.\d+" + re.escape(SUFFIX) + r"\..+", path.name)
                left = half_written is not None and path.stat().st_mtime < time.time() - TEMPORARY_S
            if left:
                path.unlink(missing_ok=True)
