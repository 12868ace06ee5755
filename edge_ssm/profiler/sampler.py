"""Reading a power meter in a separate process while a measurement runs.

This way the meter's work is part of no step, and a service that hangs is killed together with the process that waits
for it. The child process (``python -m edge_ssm.profiler.sampler NAME FILE PARENT``) writes lines of JSON to FILE: first
one that describes the meter, then one for each reading, and at the end the reason if the meter fails.
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

from edge_ssm.errors import MeterLost, MeterUnavailable, UsageError
from edge_ssm.hardware.meters.base import Rail
from edge_ssm.hardware.meters.registry import METERS, open_meter
from edge_ssm.model.network import Array

START_S = 15.0
"""Time in seconds after which a meter without a reading is given up: jtop's client can wait for ever."""


class MeterDescription(msgspec.Struct, frozen=True):
    """The properties of a meter, see ``edge_ssm.hardware.meters.base.Meter``."""

    name: str
    rails: list[Rail]
    total: list[str]
    covers: str
    period_s: float


class _Line(msgspec.Struct, frozen=True):
    """A line of the child process: a description, a reading or an error."""

    meter: MeterDescription | None = None
    time_s: float = 0.0
    watts: list[float] = []
    error: str = ""


@dataclass
class Trace:
    """The readings of a meter over time."""

    meter: MeterDescription
    time_s: Array
    """Shape (n,), float64: time of each reading in seconds of CLOCK_MONOTONIC."""
    watts: Array
    """Shape (n, rails), float64: power of each rail in watts."""

    def total(self) -> Array:
        """Return the power of the whole board in watts, shape (n,)."""
        names = [rail.name for rail in self.meter.rails]
        total: Array = self.watts[:, [names.index(name) for name in self.meter.total]].sum(axis=1)
        return total

    @property
    def resolution_w(self) -> float:
        """Resolution of the total in watts: the resolutions of its rails add up."""
        return sum(rail.resolution_w for rail in self.meter.rails if rail.name in self.meter.total)


@dataclass
class Sampler:
    """A child process that reads a meter."""

    meter: MeterDescription
    _process: subprocess.Popen[bytes]
    _file: Path
    _folder: tempfile.TemporaryDirectory[str] = field(repr=False)

    def failure(self) -> str:
        """Return why the meter no longer reads; empty while it does."""
        if self._process.poll() is None:
            return ""
        lines = _lines(self._file)
        return (lines[-1].error if lines else "") or f"{self.meter.name}: its reader ended"

    def trace(self) -> Trace:
        """Return all readings up to now."""
        readings = [line for line in _lines(self._file) if line.watts]
        times = np.array([line.time_s for line in readings])
        watts = np.array([line.watts for line in readings]).reshape(len(readings), len(self.meter.rails))
        return Trace(self.meter, times, watts)

    def stop(self) -> None:
        """End the child process and remove its file."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def _lines(path: Path) -> list[_Line]:
    """Return the complete lines of the child process; the last one may be half written."""
    try:
        complete = path.read_bytes().split(b"\n")[:-1]
    except OSError:
        return []
    return [msgspec.json.decode(line, type=_Line) for line in complete]


def start(name: str, limit_s: float = START_S) -> Sampler:
    """Start to read the meter ``name`` of the registry.

    Raises MeterUnavailable if the meter cannot be read or gives no reading within ``limit_s`` seconds.
    """
    folder = tempfile.TemporaryDirectory(prefix="edge-ssm-")
    try:
        return _start(name, limit_s, folder)
    except BaseException:  # Ctrl-C as well
        folder.cleanup()
        raise


def start_selected(meter: str) -> tuple[Sampler | None, list[str]]:
    """Start to read the meter that the option ``--meter`` names.

    Parameters
    ----------
    meter
        A name of the registry; "auto" for the first meter that can be read; "none" for no meter.

    Returns
    -------
    The sampler, None without one, and for "auto" the reasons why the meters before it cannot be read.

    Raises UsageError for an unknown name, and MeterUnavailable if a named meter cannot be read.
    """
    if meter == "none":
        return None, []
    if meter != "auto":
        if meter not in METERS:
            raise UsageError(f"--meter {meter!r}: unknown, expected auto, none, {', '.join(METERS)}")
        return start(meter), []
    problems: list[str] = []
    for name in METERS:
        try:
            return start(name), problems
        except MeterUnavailable as error:
            problems.append(str(error))
    return None, problems


def _start(name: str, limit_s: float, folder: tempfile.TemporaryDirectory[str]) -> Sampler:
    path = Path(folder.name) / "readings"
    command = [sys.executable, "-m", "edge_ssm.profiler.sampler", name, str(path), str(os.getpid())]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    deadline = time.monotonic() + limit_s
    try:
        while True:
            has_ended = process.poll() is not None
            lines = _lines(path)
            description = next((line.meter for line in lines if line.meter), None)
            if description is not None and len(lines) > 1:
                return Sampler(description, process, path, folder)
            problem = next((line.error for line in lines if line.error), "")
            if not problem and not has_ended and time.monotonic() > deadline:
                problem = f"{name}: no reading within {limit_s:g} s"
            if problem or has_ended:
                raise MeterUnavailable(problem or f"{name}: its reader ended with status {process.returncode}")
            time.sleep(0.02)
    except BaseException:
        process.kill()
        process.wait()
        raise


def _read_meter(name: str, path: str, parent: int) -> None:
    """Read a meter until the parent process is gone; this is what the child process does."""
    with open(path, "wb", buffering=0) as file:

        def write(line: _Line) -> None:
            file.write(msgspec.json.encode(line) + b"\n")

        try:
            meter = open_meter(name)
        except MeterUnavailable as error:
            write(_Line(error=str(error)))
            return
        write(_Line(MeterDescription(meter.name, list(meter.rails), list(meter.total), meter.covers, meter.period_s)))
        try:
            due = time.monotonic()
            while os.getppid() == parent:
                reading = meter.read()
                if reading is not None:
                    write(_Line(time_s=reading.time_s, watts=list(reading.watts)))
                due = max(due + meter.poll_s, time.monotonic() + meter.poll_s / 4)
                time.sleep(max(0.0, due - time.monotonic()))
        except MeterLost as error:
            write(_Line(error=str(error)))
        finally:
            meter.close()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _read_meter(sys.argv[1], sys.argv[2], int(sys.argv[3]))
