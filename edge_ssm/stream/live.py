"""What runs tell of themselves while they run: a small file each, renewed every second, that ``edge-ssm top`` reads."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections import Counter, deque
from pathlib import Path
from tempfile import gettempdir

import msgspec

from edge_ssm import atomic
from edge_ssm.stream.decisions import Decision, Event
from edge_ssm.stream.loop import Account
from edge_ssm.stream.sinks import Sink

VERSION = 1
INTERVAL_S = 1.0
EVENTS = 8
FOLDER_VARIABLE = "EDGE_SSM_RUN"
SYSTEM_FOLDER = Path("/run/edge-ssm")
SUFFIX = ".status"
LARGEST = 1 << 16


class Status(msgspec.Struct, frozen=True):
    version: int
    pid: int
    model: str
    engine: str
    started: float
    """Seconds of the epoch, as ``updated``."""
    updated: float
    sample_rate_hz: float | None
    samples: int
    samples_per_s: float
    """Over the last interval."""
    decisions: int
    decisions_per_s: float
    labels: dict[str, int]
    last: str
    """The last decision, in words."""
    gaps: int
    malformed: int
    resets: int
    step_p50_us: float
    step_p99_us: float
    step_max_us: float
    events: list[str]
    """The last ones, oldest first."""


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


class Live:
    """A sink that passes everything on, and tells of it once a second from a thread of its own."""

    def __init__(self, sink: Sink, model: str, engine: str, sample_rate_hz: float | None) -> None:
        self._sink = sink
        self._model, self._engine, self._rate = model, engine, sample_rate_hz
        self._labels: Counter[str] = Counter()
        self._last = ""
        self._events: deque[str] = deque(maxlen=EVENTS)
        self._started = time.time()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._path: Path | None = None

    def decision(self, decision: Decision) -> None:
        self._sink.decision(decision)
        if decision.label is not None:
            self._labels[decision.label] += 1
            self._last = f"{decision.label} ({decision.score:.3f})"
        else:
            self._last = ", ".join(f"{value:.4g}" for value in decision.outputs)

    def event(self, event: Event) -> None:
        self._sink.event(event)
        details = ", ".join(f"{key} {value}" for key, value in event.details.items())
        self._events.append(f"sample {event.sample}: {event.event}" + (f" ({details})" if details else ""))

    def watch(self, account: Account) -> None:
        """Tell of ``account`` from now on, where a folder can be written to."""
        folder = next((folder for folder in folders() if _own(folder)), None)
        if folder is None:
            return
        self._path = folder / f"{os.getpid()}{SUFFIX}"
        self._thread = threading.Thread(target=self._tell, args=(account, self._path), name="status", daemon=True)
        self._thread.start()

    def _tell(self, account: Account, path: Path) -> None:
        before, samples, decisions = time.monotonic(), 0, 0
        while not self._ended.wait(INTERVAL_S):
            now = time.monotonic()
            status = self._status(account, (account.samples - samples) / (now - before), 0.0)
            rate = (account.decisions - decisions) / (now - before)
            before, samples, decisions = now, account.samples, account.decisions
            try:
                atomic.write(path, msgspec.json.encode(msgspec.structs.replace(status, decisions_per_s=rate)))
            except OSError:
                return  # A full disk or a folder that is gone: the run itself matters more.

    def _status(self, account: Account, samples_per_s: float, decisions_per_s: float) -> Status:
        p50, p99, longest = (account.latency.percentile_ns(p) / 1e3 for p in (50, 99, 100))
        return Status(
            version=VERSION,
            pid=os.getpid(),
            model=self._model,
            engine=self._engine,
            started=self._started,
            updated=time.time(),
            sample_rate_hz=self._rate,
            samples=account.samples,
            samples_per_s=samples_per_s,
            decisions=account.decisions,
            decisions_per_s=decisions_per_s,
            labels=dict(self._labels),
            last=self._last,
            gaps=sum(account.gaps.copy().values()),
            malformed=account.malformed,
            resets=account.resets,
            step_p50_us=p50,
            step_p99_us=p99,
            step_max_us=longest,
            events=list(self._events),
        )

    def close(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(5)
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        self._sink.close()


def running() -> list[Status]:
    """Of all runs that can be seen from here, by process number."""
    found = {}
    for folder in folders():
        # A service's instances have a folder each.
        for path in sorted([*folder.glob(f"*{SUFFIX}"), *folder.glob(f"*/*{SUFFIX}")]):
            try:
                with path.open("rb") as file:
                    status = msgspec.json.decode(file.read(LARGEST), type=Status)
            except (OSError, msgspec.MsgspecError, UnicodeError, RecursionError):
                continue
            if status.version == VERSION and Path(f"/proc/{status.pid}").exists():
                found[status.pid] = status
    return [found[pid] for pid in sorted(found)]
