"""Measure how many samples per second one run sustains, by source and engine, and how much of a processor it uses.

    python benchmarks/load.py [--seconds 4] [--hold 20] [--share-seconds 20] [--sources tcp-listen,udp]
                              [--output benchmarks/load.json]

Each trial is a real ``edge-ssm run`` of examples/demo.safetensors and a sender in a process of its own, which repeats
examples/demo.csv at fixed times, whether the run keeps up or not. A rate is sustained if

- the run has counted every sample that was sent, without gaps, malformed rows or dropped input;
- its decisions are those of the recording, all of them, in order;
- the sender is at most 20 ms late at the end (one sample period of the model);
- at most 1 % of the decisions, or one, arrive more than 20 ms after their last sample was due to be sent (sender,
  operating system and reader included), and the run itself counts no more deadline misses than that.

The rate is bisected in trials of ``--seconds``. A trial that fails is repeated once, because the machine has other work
too. The rate that is reported was sustained for ``--hold`` seconds. A file waits for its reader: its figure is the
throughput.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import streams
from streams import Run, Sender, SourceMissing

LATE_S = 0.02
LATE_SHARE = 0.01
WARM_UP_S = 1.0
NEAR = 1.08
"""The bisection ends when the lowest rate that fails exceeds the highest that succeeds by this factor at most."""
LOWEST = 50.0
RATES = (100, 1000, 16_000)
SOURCES = ("stdin-csv", "stdin-f32le", "file", "tcp-listen", "unix-listen", "udp", "serial", "mqtt")
GUESS = {"mqtt": 0.1}
"""Where the search begins, as a share of a file's throughput; 0.6 for other sources."""
WAYS = (("cpu", 1), ("cpu", 64), ("reference", 1))
"""Engine, and samples per send."""


@dataclass(frozen=True)
class Trial:
    """One run, and what became of the samples that were sent to it."""

    rate: float
    seconds: float
    sent: int
    samples: int
    decisions: int
    wrong: int
    """Decisions that are missing, out of order, or differ from the recording's."""
    lost: dict[str, int]
    """Gaps, malformed rows and dropped frames, by reason."""
    unaccounted: int
    """Samples that no counter contains. (Those of datagrams that the system dropped are counted as unread.)"""
    misses: int
    """Deadline misses that the run counts itself, from reading a sample to its decision."""
    late: int
    timed: int
    """Decisions after the first second; ``late`` are those of them that took more than 20 ms."""
    latency_p50_ms: float
    latency_p99_ms: float
    """Time from when the last sample was due to be sent until another process had read the decision."""
    sender_lag_ms: float
    sender_cpu_share: float
    cpu_share: float
    """User and system time of the run's process, as a share of one processor."""

    def problem(self) -> str:
        """Return why this rate is not sustained; empty if it is."""
        allowed = max(1, LATE_SHARE * self.decisions)
        if self.lost or self.samples != self.sent:
            return (
                f"{self.sent - self.samples} samples missing, {self.unaccounted} unaccounted for, counted {self.lost}"
            )
        if self.sender_lag_ms > 1e3 * LATE_S:
            held = "the sender is at its own limit" if self.sender_cpu_share > 0.9 else "the sender is held back"
            return f"{held} by {self.sender_lag_ms:.0f} ms"
        if self.late > allowed or self.misses > allowed:
            return f"{self.late} of {self.timed} decisions late, {self.misses} deadlines missed"
        return f"{self.wrong} decisions missing or wrong" if self.wrong else ""


@contextmanager
def broker() -> Iterator[int]:
    """Run a mosquitto that drops nothing; yield its port."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        configuration = Path(folder) / "mosquitto.conf"
        configuration.write_text(
            f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\n"
            "max_queued_messages 0\nmax_inflight_messages 0\nset_tcp_nodelay true\n"
        )
        program = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin")
        if program is None:
            raise SourceMissing("mosquitto is not installed")
        with ended(subprocess.Popen([program, "-c", str(configuration)], stderr=subprocess.DEVNULL)):
            streams.connect(socket.AF_INET, ("127.0.0.1", port)).close()
            yield port


@contextmanager
def line() -> Iterator[tuple[str, str]]:
    """Make the two ends of a serial line without a speed limit."""
    if shutil.which("socat") is None:
        raise SourceMissing("socat is not installed")
    with tempfile.TemporaryDirectory() as folder:
        ends = f"{folder}/sensor", f"{folder}/device"
        with ended(subprocess.Popen(["socat", *(f"pty,raw,echo=0,link={end}" for end in ends)])):
            while not all(map(os.path.exists, ends)):
                time.sleep(0.01)
            yield ends


@contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def place(source: str) -> Iterator[tuple[str, str, str | None]]:
    """(the run's input, where the sender sends, the event to wait for)"""
    if source.startswith("stdin"):
        yield "-", "-", None
    elif source == "serial":
        with line() as (sensor, device):
            yield f"serial://{device}?baud=4000000", f"serial://{sensor}", "connected"
    elif source == "mqtt":
        with broker() as port:
            yield f"mqtt://127.0.0.1:{port}/load", f"mqtt://127.0.0.1:{port}/load", "connected"
    elif source == "unix-listen":
        with tempfile.TemporaryDirectory() as folder:
            yield f"unix-listen://{folder}/samples", f"unix-listen://{folder}/samples", None
    else:
        address = f"{source}://127.0.0.1:{free_port()}"
        yield address, address, None


def trial(source: str, engine: str, frames: int, rate: float, seconds: float, expected: list[str]) -> Trial:
    """Raises SourceMissing."""
    codec = "csv" if source.endswith("csv") else "f32le"
    count = max(1, round(rate * seconds / frames))
    reader, writer = os.pipe()
    with place(source) as (given, to, event), open(reader, "rb") as piped, open(writer, "wb") as pipe:
        run = Run("--engine", engine, "--input", given, "--format", codec, stdin=piped)
        try:
            run.ready(event)
            sender = Sender(to, rate, frames, count, codec, pipe)
            cpu_share = share(run, sender.began + min(WARM_UP_S, seconds / 4), sender.began + seconds)
            sent = sender.result()
            status = run.wait_for_samples(sent["sent"])
            time.sleep(0.1)  # for the last decision
        finally:
            pipe.close()
            account = run.end()
        sender.end()
    lost = dict(status.get("gaps", {})) | dict(status.get("dropped", {}))
    if account["malformed"]:
        lost["malformed"] = account["malformed"]
    due = account["samples"] // streams.WINDOW
    wrong = abs(due - len(run.decisions)) + streams.out_of_order(run, expected)
    latencies = sorted(delays(run, sender.began, rate, frames))
    return Trial(
        rate=round(rate, 1),
        seconds=seconds,
        sent=sent["sent"],
        samples=account["samples"],
        decisions=account["decisions"],
        wrong=wrong,
        lost=lost,
        unaccounted=sent["sent"] - account["samples"] - frames * lost.get("unread", 0),
        misses=status.get("deadline_misses", 0),
        late=sum(delay > LATE_S for delay in latencies),
        timed=len(latencies),
        latency_p50_ms=_percentile_ms(latencies, 0.5),
        latency_p99_ms=_percentile_ms(latencies, 0.99),
        sender_lag_ms=round(1e3 * sent["lag_s"], 2),
        sender_cpu_share=round(sent["cpu_share"], 3),
        cpu_share=round(cpu_share, 4),
    )


def share(run: Run, begin: float, end: float) -> float:
    """Return the share of one processor that the run uses between two times."""
    time.sleep(max(0.0, begin - time.monotonic()))
    used, began = run.cpu_s(), time.monotonic()
    time.sleep(max(0.0, end - time.monotonic()))
    return (run.cpu_s() - used) / (time.monotonic() - began)


def delays(run: Run, began: float, rate: float, frames: int) -> list[float]:
    """Return, for each decision after the warm-up, the seconds since the send of its last sample was due."""
    due = (began + -(-end // frames) * frames / rate for _, end, _ in run.decisions)
    return [came - when for (came, _, _), when in zip(run.decisions, due, strict=True) if when - began > WARM_UP_S]


def _percentile_ms(ascending: list[float], share: float) -> float:
    return round(1e3 * ascending[int(share * (len(ascending) - 1))], 2) if ascending else 0.0


def throughput(engine: str, codec: str, seconds: float) -> dict[str, int]:
    """Return the counters of a run over a file that takes about ``seconds``, read as fast as possible."""
    content, rounds, account = b"".join(streams.payloads(codec, 1)), 1, {"samples_per_s": 0}
    samples = len(streams.payloads(codec, 1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recording"
        for _ in range(2):
            with path.open("wb") as file:
                for _ in range(rounds):
                    file.write(content)
            run = Run("--engine", engine, "--input", str(path), "--format", codec)
            account = run.end(signalled=False)
            assert account["samples"] == rounds * samples, account
            rounds = max(1, round(seconds * account["samples_per_s"] / samples))
    return account


class Search:
    """Search for the highest rate that one source with one engine sustains."""

    def __init__(self, source: str, engine: str, frames: int, seconds: float, expected: list[str]) -> None:
        self._case = source, engine, frames
        self._seconds, self._expected = seconds, expected
        self.limit = ""
        """What failed at the lowest rate that was too high."""

    def sustained(self, rate: float, seconds: float) -> Trial | None:
        for _ in range(2):
            result = trial(*self._case, rate, seconds, self._expected)
            problem = result.problem()
            print(f"    {rate:9.0f}/s for {seconds:g} s: {problem or 'sustained'}", flush=True)
            if not problem:
                return result
            self.limit = f"{problem} at {rate:.0f}/s"
        return None

    def highest(self, guess: float, hold_s: float) -> Trial | None:
        low, high, rate = 0.0, 0.0, guess
        while (not low or not high or high / low > NEAR) and rate >= LOWEST:
            if self.sustained(rate, self._seconds):
                low = rate
            else:
                high = rate
            rate = low * 1.4 if not high else high / 2 if not low else (low * high) ** 0.5
        while low >= LOWEST:
            held = self.sustained(low, hold_s)
            if held is not None:
                return held
            low *= 0.9
        return None


def loads(sources: list[str], seconds: float, hold_s: float, expected: list[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    speed = {
        (engine, codec): throughput(engine, codec, seconds)
        for engine in ("cpu", "reference")
        for codec in ("csv", "f32le")
    }
    for source in sources:
        for engine, frames in WAYS:
            row: dict[str, Any] = {"source": source, "engine": engine, "samples_a_send": frames}
            codec = "csv" if source.endswith("csv") else "f32le"
            if source == "file":
                if frames > 1:
                    continue
                row = {"source": "file", "engine": engine, "samples_per_s": speed[engine, codec]["samples_per_s"]}
                rows.append(row | {"account": speed[engine, codec]})
                print(f"file {engine}: {row['samples_per_s']}/s")
                continue
            print(f"{source}, engine {engine}, {frames} a send", flush=True)
            search = Search(source, engine, frames, seconds, expected)
            try:
                found = search.highest(GUESS.get(source, 0.6) * speed[engine, codec]["samples_per_s"], hold_s)
            except SourceMissing as error:
                rows.append(row | {"skipped": str(error)})
                print(f"    skipped: {error}")
                break
            except RuntimeError as error:  # one failure must not cost the other results
                rows.append(row | {"failed": str(error)})
                print(f"    failed: {error}")
                continue
            row["samples_per_s"] = found.rate if found else 0
            rows.append(row | {"limit": search.limit, "trial": asdict(found) if found else None})
    return rows


def shares(seconds: float, expected: list[str]) -> list[dict[str, Any]]:
    rows = []
    for engine in ("cpu", "reference"):
        for frames in (1, 64):
            for rate in RATES:
                result = trial("tcp-listen", engine, frames, rate, seconds, expected)
                row = {"engine": engine, "samples_a_send": frames, "rate": rate, "cpu_share": result.cpu_share}
                problem = result.problem()
                print(f"{engine}, {frames} a send, {rate} Hz: {100 * result.cpu_share:.1f} %; {problem or 'sustained'}")
                rows.append(row | {"against": problem, "trial": asdict(result)})
    return rows


def table(report: dict[str, Any]) -> str:
    lines = [f"{'source':<12} {'engine':<10} {'a send':>6} {'samples/s':>10} {'p50 ms':>7} {'p99 ms':>7}  processor"]
    for row in report["loads"]:
        held = row.get("trial") or {}
        start = f"{row['source']:<12} {row['engine']:<10} {row.get('samples_a_send', ''):>6} "
        if "skipped" in row or "failed" in row:
            lines.append(f"{start}{row.get('skipped') or row['failed']}")
        elif held:
            times = f"{held['latency_p50_ms']:>7.2f} {held['latency_p99_ms']:>7.2f}  {100 * held['cpu_share']:.0f} %"
            lines.append(f"{start}{row['samples_per_s']:>10.0f} {times}")
        else:
            lines.append(f"{start}{row['samples_per_s']:>10.0f}")
    lines.append("\nshare of a processor, tcp-listen:" + "".join(f"{rate:>10} Hz" for rate in RATES))
    for i in range(0, len(report["shares"]), len(RATES)):
        rows = report["shares"][i : i + len(RATES)]
        cells = "".join("  not held   " if row["against"] else f"{100 * row['cpu_share']:>11.1f} %" for row in rows)
        lines.append(f"{rows[0]['engine']:<12} {rows[0]['samples_a_send']:>4} a send{'':<11}{cells}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--hold", type=float, default=20.0)
    parser.add_argument("--share-seconds", type=float, default=20.0)
    parser.add_argument("--sources", default=",".join(SOURCES))
    parser.add_argument("--output", type=Path, default=streams.ROOT / "benchmarks" / "load.json")
    arguments = parser.parse_args()
    expected = streams.labels()
    sources = [source for source in arguments.sources.split(",") if source]
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "loads": loads(sources, arguments.seconds, arguments.hold, expected),
        "shares": shares(arguments.share_seconds, expected),
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
