"""Real runs and senders for load.py and soak.py, which stream the demo's recording repeatedly into ``edge-ssm run``.

As a program, this module is a sender in a process of its own:

    python benchmarks/streams.py ADDRESS RATE FRAMES SENDS [--format f32le]

It makes SENDS transmissions of FRAMES samples to ADDRESS (an address of the run, - for standard output), at RATE
samples per second (0: as fast as they are accepted). Two JSON lines on standard error report when it began and how it
ended. Then it waits for the end of its standard input, since a source notices when its sender ends.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np

ROOT = Path(__file__).parent.parent
MODEL, RECORDING = ROOT / "examples" / "demo.safetensors", ROOT / "examples" / "demo.csv"
WINDOW = 200
EDGE_SSM = [sys.executable, "-c", "from edge_ssm.cli.app import main; main()"]
START_S, END_S = 60.0, 15.0
"""Seconds that a run may take to become ready, and that sent samples may take to arrive."""
PR_SET_TIMERSLACK = 29
MAX_UNACKNOWLEDGED = 10_000
"""Messages that the sender's MQTT client may hold; it has identifiers for 65,535."""

Deliver = Callable[[bytes], Any]


# The sender


def payloads(codec: str, frames: int) -> list[bytes]:
    """Return the contents of the transmissions of one pass through the recording, which then repeats."""
    lines = RECORDING.read_text().splitlines()[1:]
    if codec == "csv":
        single = [line.rpartition(",")[0].encode() + b"\n" for line in lines]  # without the label
    else:
        values = np.array([[float(field) for field in line.split(",")[:-1]] for line in lines], dtype="<f4")
        single = [row.tobytes() for row in values]
    single *= frames // math.gcd(frames, len(single))
    return [b"".join(single[i : i + frames]) for i in range(0, len(single), frames)]


def connect(family: socket.AddressFamily, address: Any) -> socket.socket:
    """Return a connection to a run, retrying for END_S."""
    until = time.monotonic() + END_S
    while True:
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.connect(address)
        except OSError:
            connection.close()
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return connection


def _writer(descriptor: int) -> Deliver:
    def write(content: bytes) -> None:
        while content:
            content = content[os.write(descriptor, content) :]

    return write


def _broker(host: str, port: int, topic: str) -> tuple[Deliver, Callable[[], None]]:
    import paho.mqtt.client as paho
    from paho.mqtt.enums import CallbackAPIVersion

    client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    client.max_inflight_messages_set(1000)
    client.connect(host, port)
    client.socket().setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # otherwise the last message waits for 40 ms
    client.loop_start()
    waiting: deque[Any] = deque()

    def publish(content: bytes) -> None:
        waiting.append(client.publish(topic, content, qos=1))
        if len(waiting) > MAX_UNACKNOWLEDGED:
            waiting.popleft().wait_for_publish(END_S)

    def finish() -> None:
        waiting[-1].wait_for_publish(END_S)  # Its thread continues, since stopping it takes a second.

    return publish, finish


def target(address: str) -> tuple[Deliver, Callable[[], None]]:
    """Return a function that delivers to the address of a run, and one that waits until all is delivered."""
    parts = urlsplit(address)
    host_and_port = parts.hostname or "", parts.port or 0
    finish: Callable[[], None] = lambda: None  # noqa: E731
    if address == "-":
        return _writer(1), finish
    if parts.scheme == "tcp-listen":
        connection = connect(socket.AF_INET, host_and_port)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection.sendall, finish
    if parts.scheme == "unix-listen":
        return connect(socket.AF_UNIX, parts.path).sendall, finish
    if parts.scheme == "udp":
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        datagrams.connect(host_and_port)
        return datagrams.send, finish
    if parts.scheme == "mqtt":
        return _broker(*host_and_port, parts.path[1:])
    return _writer(os.open(parts.path, os.O_WRONLY | os.O_NOCTTY)), finish


def send(deliver: Deliver, contents: list[bytes], period_s: float, count: int) -> float:
    """Deliver on a schedule that does not wait for a slow receiver. Return when it began (CLOCK_MONOTONIC).

    A transmission is due when its last sample has been measured.
    """
    began = time.monotonic() + 0.02
    report({"began": began})
    for i in range(count):
        ahead = began + (i + 1) * period_s - time.monotonic()
        if ahead > 0 and period_s:
            time.sleep(ahead)
        deliver(contents[i % len(contents)])
    return began


def report(figures: dict[str, Any]) -> None:
    """Write one JSON line to standard error."""
    print(json.dumps(figures), file=sys.stderr, flush=True)


def main() -> None:
    """Send as the arguments say, and wait for the end of standard input."""
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("rate", type=float)
    parser.add_argument("frames", type=int)
    parser.add_argument("sends", type=int)
    parser.add_argument("--format", default="f32le")
    arguments = parser.parse_args()
    contents = payloads(arguments.format, arguments.frames)
    # Without this, sleeps may end 50 us late, which is most of a period at 16 kHz.
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1)
    deliver, finish = target(arguments.address)
    period_s = arguments.frames / arguments.rate if arguments.rate else 0.0
    cpu_s = time.process_time()
    began = send(deliver, contents, period_s, arguments.sends)
    finish()
    ended = time.monotonic()
    report(
        {
            "sent": arguments.sends * arguments.frames,
            "lag_s": ended - began - arguments.sends * period_s,
            "cpu_share": (time.process_time() - cpu_s) / (ended - began),
        }
    )
    sys.stdin.read()


class Sender:
    """A process that runs this module. ``end`` closes its connection."""

    def __init__(self, address: str, rate: float, frames: int, count: int, codec: str, output: Any = None) -> None:
        command = [sys.executable, __file__, address, str(rate), str(frames), str(count), "--format", codec]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.PIPE)
        self.began = float(self._next_report()["began"])

    def _next_report(self) -> dict[str, Any]:
        assert self._process.stderr is not None
        line = self._process.stderr.readline()
        if not line.startswith(b"{"):
            rest = (line + self._process.stderr.read()).decode().strip().splitlines()
            raise RuntimeError(f"the sender failed: {rest[-1] if rest else 'without a message'}")
        return dict(json.loads(line))

    def result(self) -> dict[str, Any]:
        """Wait until all is sent and return the sender's figures."""
        return self._next_report()

    def end(self) -> None:
        """End the process."""
        self._process.stdin.close()  # type: ignore[union-attr]
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:  # It waits for a run that has ended.
            self._process.kill()
            self._process.wait()


# The run


class SourceMissing(Exception):
    """This checkout or this machine lacks a source."""


class Run:
    """A process of ``edge-ssm run``: its decisions and when each arrived, its status, and its resource usage."""

    def __init__(self, *options: str, stdin: Any = subprocess.DEVNULL) -> None:
        self._folder = tempfile.TemporaryDirectory()
        environment = {**os.environ, "EDGE_SSM_RUN": self._folder.name}
        self._process = subprocess.Popen(
            [*EDGE_SSM, "run", str(MODEL), "--stream", *options],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=ROOT,  # -c looks there first
        )
        self.pid = self._process.pid
        self.decisions: list[tuple[float, int, str]] = []
        """(CLOCK_MONOTONIC of its arrival, end, label)"""
        self.events: list[str] = []
        self.log: list[str] = []
        self._threads = [threading.Thread(target=self._read_output), threading.Thread(target=self._read_log)]
        for thread in self._threads:
            thread.start()

    def _read_output(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            now, document = time.monotonic(), json.loads(line)
            if "event" in document:
                self.events.append(document["event"])
            else:
                self.decisions.append((now, document["end"], document["label"]))

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        self.log.extend(line.decode().rstrip() for line in self._process.stderr)

    def ready(self, event: str | None = None) -> Run:
        """Wait until it is ready, and has reported ``event``. Raises SourceMissing with its last line if it ended."""
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            if self._process.poll() is not None:
                self._threads[1].join()
                raise SourceMissing(self.log[-1].removeprefix("edge-ssm: ") if self.log else "the run ended")
            if self.status().get("ready") and (event is None or event in self.events):
                return self
            time.sleep(0.02)
        raise SourceMissing(f"not ready after {START_S:g} s: {'; '.join(self.log)}")

    def status(self) -> dict[str, Any]:
        """Return its status of the last second; empty before the first and after the end."""
        try:
            return dict(msgspec.json.decode((Path(self._folder.name) / f"{self.pid}.status").read_bytes()))
        except OSError:
            return {}

    def wait_for_samples(self, samples: int) -> dict[str, Any]:
        """Return the status when that many samples have arrived, or nothing arrives any more."""
        status, since = self.status(), time.monotonic()
        while status.get("samples", 0) < samples and time.monotonic() - since < 3:
            time.sleep(0.05)
            newer = self.status()
            if newer.get("samples") != status.get("samples"):
                since = time.monotonic()
            status = newer or status
        return status

    def cpu_s(self) -> float:
        """Return user and system seconds of all its threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_kb(self) -> dict[str, int]:
        """Return its resident, proportional and private memory in KiB."""
        text = Path(f"/proc/{self.pid}/status").read_text() + Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        names = {"VmRSS": "rss", "Pss": "pss", "Private_Clean": "private_clean", "Private_Dirty": "private_dirty"}
        return {names[name]: int(n) for name, n in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M) if name in names}

    def end(self, signalled: bool = True) -> dict[str, Any]:
        """Stop it, or wait for its end, and return the counts of its summary."""
        if signalled and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(START_S)
        finally:
            self._process.kill()
            self._folder.cleanup()
        for thread in self._threads:
            thread.join()
        summary = "\n".join(self.log)
        counts = re.search(r"samples +(\d+), gaps (.*), malformed rows (\d+)\ndecisions (\d+)", summary)
        speed = re.search(r"; (\d+) samples/s", summary)
        if status or counts is None:
            raise RuntimeError(f"the run failed ({status}): {summary}")
        return {
            "samples": int(counts[1]),
            "gaps": counts[2],
            "malformed": int(counts[3]),
            "decisions": int(counts[4]),
            "samples_per_s": int(speed[1]) if speed else 0,
        }


def labels() -> list[str]:
    """Return the labels of the recording's windows, as the reference engine decides them."""
    run = Run("--engine", "reference", "--input", str(RECORDING))
    run.end(signalled=False)
    return [label for _, _, label in run.decisions]


def out_of_order(run: Run, expected: list[str]) -> int:
    """Count the decisions that differ from those of the recording, repeated from its beginning."""
    return sum(
        (end, label) != ((i + 1) * WINDOW, expected[i % len(expected)])
        for i, (_, end, label) in enumerate(run.decisions)
    )


if __name__ == "__main__":
    main()
