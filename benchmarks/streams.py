"""Real runs and real senders for load.py and soak.py: the demo's recording, over and over, into ``edge-ssm run``.

As a program it is a sender, in a process of its own:

    python benchmarks/streams.py ADDRESS RATE FRAMES SENDS [--format f32le]

FRAMES samples a send, RATE samples a second (0: as fast as they are taken), SENDS sends to ADDRESS (one of the run's, -
for standard output). Two JSON lines on standard error tell when it began and how it ended; then it waits for the end of
its standard input, since a source sees the end of its sender.
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
"""For a run to be ready, and for what was sent to arrive."""
PR_SET_TIMERSLACK = 29
UNACKNOWLEDGED = 10_000
"""Messages that a sensor's MQTT client may hold: it has numbers for 65,535."""

Deliver = Callable[[bytes], Any]


# The sender


def sends(codec: str, frames: int) -> list[bytes]:
    """What one round through the recording is sent as; after the last comes the first again."""
    lines = RECORDING.read_text().splitlines()[1:]
    if codec == "csv":
        single = [line.rpartition(",")[0].encode() + b"\n" for line in lines]  # without the label
    else:
        values = np.array([[float(field) for field in line.split(",")[:-1]] for line in lines], dtype="<f4")
        single = [row.tobytes() for row in values]
    single *= frames // math.gcd(frames, len(single))
    return [b"".join(single[i : i + frames]) for i in range(0, len(single), frames)]


def connected(kind: socket.AddressFamily, address: Any) -> socket.socket:
    until = time.monotonic() + END_S
    while True:
        made = socket.socket(kind, socket.SOCK_STREAM)
        try:
            made.connect(address)
        except OSError:
            made.close()
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return made


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
    client.socket().setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else the last message waits for 40 ms
    client.loop_start()
    waiting: deque[Any] = deque()

    def publish(content: bytes) -> None:
        waiting.append(client.publish(topic, content, qos=1))
        if len(waiting) > UNACKNOWLEDGED:
            waiting.popleft().wait_for_publish(END_S)

    def finish() -> None:
        waiting[-1].wait_for_publish(END_S)  # its thread goes on: to stop it takes a second

    return publish, finish


def target(address: str) -> tuple[Deliver, Callable[[], None]]:
    """How to deliver to what a run listens on, and to wait until all is delivered."""
    parts = urlsplit(address)
    there = parts.hostname or "", parts.port or 0
    finish: Callable[[], None] = lambda: None  # noqa: E731
    if address == "-":
        return _writer(1), finish
    if parts.scheme == "tcp-listen":
        made = connected(socket.AF_INET, there)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made.sendall, finish
    if parts.scheme == "unix-listen":
        return connected(socket.AF_UNIX, parts.path).sendall, finish
    if parts.scheme == "udp":
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.connect(there)
        return made.send, finish
    if parts.scheme == "mqtt":
        return _broker(*there, parts.path[1:])
    return _writer(os.open(parts.path, os.O_WRONLY | os.O_NOCTTY)), finish


def send(deliver: Deliver, contents: list[bytes], period_s: float, count: int) -> float:
    """Deliver on a schedule that does not wait for who is slow; returns when it began (CLOCK_MONOTONIC).

    A send is due once its last sample was taken.
    """
    began = time.monotonic() + 0.02
    tell({"began": began})
    for i in range(count):
        ahead = began + (i + 1) * period_s - time.monotonic()
        if ahead > 0 and period_s:
            time.sleep(ahead)
        deliver(contents[i % len(contents)])
    return began


def tell(facts: dict[str, Any]) -> None:
    print(json.dumps(facts), file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("rate", type=float)
    parser.add_argument("frames", type=int)
    parser.add_argument("sends", type=int)
    parser.add_argument("--format", default="f32le")
    arguments = parser.parse_args()
    contents = sends(arguments.format, arguments.frames)
    # Sleeps may else end 50 us late, most of a period at 16 kHz.
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1)
    deliver, finish = target(arguments.address)
    period_s = arguments.frames / arguments.rate if arguments.rate else 0.0
    used = time.process_time()
    began = send(deliver, contents, period_s, arguments.sends)
    finish()
    ended = time.monotonic()
    tell(
        {
            "sent": arguments.sends * arguments.frames,
            "lag_s": ended - began - arguments.sends * period_s,
            "cpu_share": (time.process_time() - used) / (ended - began),
        }
    )
    sys.stdin.read()


class Sender:
    """This module as a process. ``end`` lets go of the connection."""

    def __init__(self, address: str, rate: float, frames: int, count: int, codec: str, output: Any = None) -> None:
        command = [sys.executable, __file__, address, str(rate), str(frames), str(count), "--format", codec]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.PIPE)
        self.began = float(self._told()["began"])

    def _told(self) -> dict[str, Any]:
        assert self._process.stderr is not None
        line = self._process.stderr.readline()
        if not line.startswith(b"{"):
            rest = (line + self._process.stderr.read()).decode().strip().splitlines()
            raise RuntimeError(f"the sender failed: {rest[-1] if rest else 'it said nothing'}")
        return dict(json.loads(line))

    def result(self) -> dict[str, Any]:
        """Waits until all is sent."""
        return self._told()

    def end(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:  # it waits for a run that is gone
            self._process.kill()
            self._process.wait()


# The run


class NotThere(Exception):
    """This checkout or this machine lacks a source."""


class Run:
    """``edge-ssm run`` as a process: its decisions with the time at which each came, its status, what it uses."""

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
        """(CLOCK_MONOTONIC when it came, end, label)"""
        self.events: list[str] = []
        self.said: list[str] = []
        self._threads = [threading.Thread(target=self._hear), threading.Thread(target=self._listen)]
        for thread in self._threads:
            thread.start()

    def _hear(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            now, document = time.monotonic(), json.loads(line)
            if "event" in document:
                self.events.append(document["event"])
            else:
                self.decisions.append((now, document["end"], document["label"]))

    def _listen(self) -> None:
        assert self._process.stderr is not None
        self.said.extend(line.decode().rstrip() for line in self._process.stderr)

    def ready(self, event: str | None = None) -> Run:
        """Wait until it is, and told of ``event``. Raises NotThere with its last words if it ended instead."""
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            if self._process.poll() is not None:
                self._threads[1].join()
                raise NotThere(self.said[-1].removeprefix("edge-ssm: ") if self.said else "the run ended")
            if self.status().get("ready") and (event is None or event in self.events):
                return self
            time.sleep(0.02)
        raise NotThere(f"not ready after {START_S:g} s: {'; '.join(self.said)}")

    def status(self) -> dict[str, Any]:
        """As of the last second; empty before the first and after the end."""
        try:
            return dict(msgspec.json.decode((Path(self._folder.name) / f"{self.pid}.status").read_bytes()))
        except OSError:
            return {}

    def acknowledged(self, samples: int) -> dict[str, Any]:
        """The status once that many samples came in, or nothing comes any more."""
        status, since = self.status(), time.monotonic()
        while status.get("samples", 0) < samples and time.monotonic() - since < 3:
            time.sleep(0.05)
            newer = self.status()
            if newer.get("samples") != status.get("samples"):
                since = time.monotonic()
            status = newer or status
        return status

    def cpu_s(self) -> float:
        """User and system time of all its threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_kb(self) -> dict[str, int]:
        text = Path(f"/proc/{self.pid}/status").read_text() + Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        names = {"VmRSS": "rss", "Pss": "pss", "Private_Clean": "private_clean", "Private_Dirty": "private_dirty"}
        return {names[name]: int(n) for name, n in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M) if name in names}

    def end(self, signalled: bool = True) -> dict[str, Any]:
        """Stop it, or wait for it; the numbers of its account, as it tells them at the end."""
        if signalled and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(START_S)
        finally:
            self._process.kill()
            self._folder.cleanup()
        for thread in self._threads:
            thread.join()
        told = "\n".join(self.said)
        found = re.search(r"samples +(\d+), gaps (.*), malformed rows (\d+)\ndecisions (\d+)", told)
        speed = re.search(r"; (\d+) samples/s", told)
        if status or found is None:
            raise RuntimeError(f"the run failed ({status}): {told}")
        return {
            "samples": int(found[1]),
            "gaps": found[2],
            "malformed": int(found[3]),
            "decisions": int(found[4]),
            "samples_per_s": int(speed[1]) if speed else 0,
        }


def labels() -> list[str]:
    """Of the recording's windows, as the reference engine decides them."""
    run = Run("--engine", "reference", "--input", str(RECORDING))
    run.end(signalled=False)
    return [label for _, _, label in run.decisions]


def out_of_order(run: Run, expected: list[str]) -> int:
    """Decisions that are not those of the recording, over and over from its beginning."""
    return sum(
        (end, label) != ((i + 1) * WINDOW, expected[i % len(expected)])
        for i, (_, end, label) in enumerate(run.decisions)
    )


if __name__ == "__main__":
    main()
