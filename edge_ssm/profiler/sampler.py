"""Reads a power meter in a process of its own, beside what is measured.

The meter's work is in nobody's steps, and a service that hangs is killed with the process that waits for it. The child
(``python -m edge_ssm.profiler.sampler NAME FILE``) writes a line of JSON that describes the meter, then one a reading,
and last, if the meter fails, why.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from edge_ssm.errors import MeterLost, MeterUnavailable
from edge_ssm.hardware.meters.base import Rail
from edge_ssm.hardware.meters.registry import METERS
from edge_ssm.model.network import Array

START_S = 15.0
"""A meter that says nothing for so long is given up: jtop's client can wait for ever."""


class Described(msgspec.Struct, frozen=True):
    name: str
    rails: list[Rail]
    total: list[str]
    covers: str
    period_s: float


class _Line(msgspec.Struct, frozen=True):
    meter: Described | None = None
    time_s: float = 0.0
    watts: list[float] = []
    error: str = ""


@dataclass
class Trace:
    """What a meter said: ``time_s`` (n,) float64 of CLOCK_MONOTONIC, ``watts`` (n, rails) float64."""

    meter: Described
    time_s: Array
    watts: Array

    def total(self) -> Array:
        """(n,): the sum of the rails that make up the whole."""
        names = [rail.name for rail in self.meter.rails]
        total: Array = self.watts[:, [names.index(name) for name in self.meter.total]].sum(axis=1)
        return total

    @property
    def resolution_w(self) -> float:
        """Of the whole: quanta of several rails add."""
        return sum(rail.resolution_w for rail in self.meter.rails if rail.name in self.meter.total)


@dataclass
class Sampler:
    """A running child. ``meter`` is what it reads."""

    meter: Described
    _process: subprocess.Popen[bytes]
    _file: Path
    _folder: tempfile.TemporaryDirectory[str] = field(repr=False)

    def failed(self) -> str:
        """Why the meter no longer reads; empty while it does."""
        if self._process.poll() is None:
            return ""
        lines = _lines(self._file)
        return (lines[-1].error if lines else "") or f"{self.meter.name}: its reader ended"

    def trace(self) -> Trace:
        """All readings so far."""
        readings = [line for line in _lines(self._file) if line.watts]
        times = np.array([line.time_s for line in readings])
        watts = np.array([line.watts for line in readings]).reshape(len(readings), len(self.meter.rails))
        return Trace(self.meter, times, watts)

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def _lines(path: Path) -> list[_Line]:
    try:
        whole = path.read_bytes().split(b"\n")[:-1]
    except OSError:
        return []
    return [msgspec.json.decode(line, type=_Line) for line in whole]


def start(name: str, limit_s: float = START_S) -> Sampler:
    """Raises MeterUnavailable, in one line, if the meter can't be read or is silent for ``limit_s``."""
    folder = tempfile.TemporaryDirectory(prefix="edge-ssm-")
    try:
        return _started(name, limit_s, folder)
    except BaseException:  # a Ctrl-C too
        folder.cleanup()
        raise


def _started(name: str, limit_s: float, folder: tempfile.TemporaryDirectory[str]) -> Sampler:
    path = Path(folder.name) / "readings"
    command = [sys.executable, "-m", "edge_ssm.profiler.sampler", name, str(path), str(os.getpid())]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    until = time.monotonic() + limit_s
    try:
        while True:
            ended = process.poll() is not None
            lines = _lines(path)
            described = next((line.meter for line in lines if line.meter), None)
            if described is not None and len(lines) > 1:
                return Sampler(described, process, path, folder)
            why = next((line.error for line in lines if line.error), "")
            if not why and not ended and time.monotonic() > until:
                why = f"{name}: no reading within {limit_s:g} s"
            if why or ended:
                raise MeterUnavailable(why or f"{name}: its reader ended with status {process.returncode}")
            time.sleep(0.02)
    except BaseException:
        process.kill()
        process.wait()
        raise


def _child(name: str, path: str, parent: int) -> None:
    with open(path, "wb", buffering=0) as file:

        def say(line: _Line) -> None:
            file.write(msgspec.json.encode(line) + b"\n")

        try:
            meter = METERS[name]()
        except MeterUnavailable as error:
            say(_Line(error=str(error)))
            return
        say(_Line(Described(meter.name, list(meter.rails), list(meter.total), meter.covers, meter.period_s)))
        try:
            due = time.monotonic()
            while os.getppid() == parent:
                reading = meter.read()
                if reading is not None:
                    say(_Line(time_s=reading.time_s, watts=list(reading.watts)))
                due = max(due + meter.poll_s, time.monotonic() + meter.poll_s / 4)
                time.sleep(max(0.0, due - time.monotonic()))
        except MeterLost as error:
            say(_Line(error=str(error)))
        finally:
            meter.close()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _child(sys.argv[1], sys.argv[2], int(sys.argv[3]))
