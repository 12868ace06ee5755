"""Serial lines, on real pseudo-terminal pairs made by socat."""

import os
import shutil
import signal
import subprocess
import threading
import time

import numpy as np
import pytest
from support.waiting import until

from edge_ssm.errors import UsageError
from edge_ssm.io.backoff import Backoff
from edge_ssm.io.codecs.framed import encode
from edge_ssm.io.codecs.registry import decoder
from edge_ssm.io.messages import Frame
from edge_ssm.io.shutdown import ShutdownSignal
from edge_ssm.io.sources.base import Batch, Discontinuity
from edge_ssm.io.sources.serial import SerialSource
from edge_ssm.model.network import InputSpec

pytest.importorskip("serial", reason="pyserial is not installed")
SPEC = InputSpec(("ax", "ay"), np.zeros(2), np.ones(2))


class Line:
    """A pseudo-terminal pair; the test opens the device's end."""

    def __init__(self, folder):
        self.sensor, self.host = folder / "sensor", folder / "host"
        self.plug()

    def plug(self):
        ends = [f"pty,raw,echo=0,link={end}" for end in (self.sensor, self.host)]
        self._socat = subprocess.Popen(["socat", *ends])
        until(lambda: self.sensor.exists() and self.host.exists())
        self._fd = os.open(self.sensor, os.O_RDWR | os.O_NOCTTY)

    def send(self, content):
        os.write(self._fd, content)

    def unplug(self):
        self._socat.send_signal(signal.SIGKILL)
        self._socat.wait()
        os.close(self._fd)
        for end in (self.sensor, self.host):  # A killed socat leaves its links, unlike udev.
            end.unlink(missing_ok=True)


@pytest.fixture
def line(tmp_path):
    if shutil.which("socat") is None:
        pytest.skip("socat is not installed")
    line = Line(tmp_path)
    yield line
    line.unplug()


@pytest.fixture
def stop():
    with ShutdownSignal() as stop:
        yield stop


def open_source(line, stop):
    source = SerialSource(str(line.host), 115200, backoff=Backoff(0.2))
    assert source.read(stop, 5) == Discontinuity("connected", True)
    return source


def receive(source, stop, count):
    """Return that many bytes, from as many reads as necessary."""
    content = b""
    while len(content) < count:
        item = source.read(stop, 5)
        assert isinstance(item, Batch), item
        content += item.content
    return content


def test_bytes_arrive_unchanged(line, stop):
    source = open_source(line, stop)
    content = bytes(range(256)) * 4
    line.send(content)
    assert receive(source, stop, len(content)) == content
    began = time.monotonic()
    assert source.read(stop, 0.1) is None
    assert 0.1 <= time.monotonic() - began < 1
    source.close()


def test_split_frames_and_garbage_are_handled(line, stop):
    source = open_source(line, stop)
    reader = decoder("framed", SPEC)
    content = b"boot v1.2\r\n" + b"".join(encode([[k, -k]], k) + b"\xff\0\x13" * (k % 2) for k in range(20))
    items = []
    for at in range(0, len(content), 7):
        line.send(content[at : at + 7])
        items += reader.feed(receive(source, stop, len(content[at : at + 7])))
    frames = [item for item in items if isinstance(item, Frame)]
    assert [frame.values.tolist() for frame in frames] == [[k, -k] for k in range(20)]
    assert [frame.sequence for frame in frames] == list(range(20))
    source.close()


def test_bytes_buffered_before_opening_are_discarded(line, stop):
    line.send(b"old")
    fd = os.open(line.host, os.O_RDONLY | os.O_NOCTTY)
    assert stop.wait(fd, 5)  # it has crossed the pair
    os.close(fd)
    source = open_source(line, stop)
    line.send(b"new")
    assert receive(source, stop, 3) == b"new"
    source.close()


def test_a_device_that_is_unplugged_and_plugged_in_is_reopened(line, stop):
    source = open_source(line, stop)
    inode = os.stat(line.host).st_ino
    for _ in range(2):
        line.send(b"1")
        assert receive(source, stop, 1) == b"1"
        line.unplug()
        lost = source.read(stop, 5)
        assert isinstance(lost, Discontinuity)
        assert not lost.connected
        assert lost.reason.startswith("lost: ")
        assert source.read(stop, 0.5) == Discontinuity("no such device; is it plugged in?", False)
        assert source.read(stop, 0.5) is None  # the same reason is reported once
        blockers = os.openpty()  # takes the old number, so that the device comes back under another
        line.plug()
        assert source.read(stop, 5) == Discontinuity("connected", True)
        for fd in blockers:
            os.close(fd)
    assert os.stat(line.host).st_ino != inode
    line.send(b"2")
    assert receive(source, stop, 1) == b"2"
    source.close()


def test_a_line_is_opened_exclusively(line, stop):
    source = open_source(line, stop)
    other = SerialSource(str(line.host), 115200)
    assert other.read(stop, 1) == Discontinuity("another program has it open", False)
    source.close()
    other.close()


def test_a_shutdown_ends_the_wait(line):
    with ShutdownSignal() as stop:
        source = open_source(line, stop)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert source.read(stop, None) is None
        assert stop.requested
        source.close()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"baud": 0}, "baud 0: expected a positive whole number"),
        ({"parity": "maybe"}, "parity 'maybe': expected one of none, even"),
        ({"stop_bits": 3}, "stop_bits 3: expected one of 1, 1.5, 2"),
        ({"flow": "x"}, "flow 'x': expected one of none, rtscts"),
    ],
)
def test_invalid_options_are_refused(options, problem):
    with pytest.raises(UsageError, match=problem):
        SerialSource("/dev/ttyUSB0", **{"baud": 9600, **options})


def test_a_file_is_not_a_serial_line(tmp_path):
    path = tmp_path / "log.csv"
    path.touch()
    with pytest.raises(UsageError, match="not a serial device"):
        SerialSource(str(path), 9600)
