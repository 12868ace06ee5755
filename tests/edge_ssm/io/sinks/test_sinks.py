"""Sinks: complete lines, in order, each once or at least once; a slow reader costs only counted decisions."""

import os
import re
import socket
import threading
import time
from importlib import import_module

import pytest
from support.waiting import until

from edge_ssm.errors import UsageError
from edge_ssm.io.sinks.base import Transport
from edge_ssm.io.sinks.file import FileOptions, FileSink, StandardSink
from edge_ssm.io.sinks.queue import QueuedSink
from edge_ssm.io.sinks.registry import MODULES, open_sink


class Gate(Transport):
    """A transport to a list that can be closed and can fail."""

    name = "gate"

    def __init__(self):
        self.open = threading.Event()
        self.got, self.fail, self.connects = [], 0, 0

    def connect(self):
        self.connects += 1

    def send(self, lines):
        self.open.wait()
        if self.fail:
            self.fail -= 1
            raise OSError(5, "it fails")
        self.got += lines

    def close(self):
        pass


@pytest.mark.parametrize("overflow", ["drop-oldest", "drop-newest"])
def test_a_stalled_reader_costs_only_what_the_overflow_policy_allows(overflow):
    gate = Gate()
    sink = QueuedSink(gate, 10, overflow)
    sink.write("first")
    until(lambda: not sink._lines)  # It is being sent, and stays so.
    for i in range(100):
        sink.write(str(i))
    assert sink.dropped["overflow"] == 90
    assert sink.depth == 11
    assert sink.acknowledged == 0
    gate.open.set()
    until(lambda: sink.acknowledged == sink.accepted == 101)
    kept = range(90, 100) if overflow == "drop-oldest" else range(10)
    assert gate.got == ["first", *map(str, kept)]
    sink.close()
    assert sink.dropped == {"overflow": 90}


def test_wait_blocks_the_writer_and_loses_nothing():
    gate = Gate()
    sink = QueuedSink(gate, 4, "wait")
    writer = threading.Thread(target=lambda: [sink.write(str(i)) for i in range(1000)])
    writer.start()
    time.sleep(0.05)
    assert writer.is_alive()
    gate.open.set()
    writer.join(10)
    sink.close()
    assert gate.got == [str(i) for i in range(1000)]
    assert not sink.dropped


def test_failed_lines_are_sent_again_in_order_and_the_problem_is_reported():
    gate = Gate()
    gate.fail = 3
    gate.open.set()
    sink = QueuedSink(gate, 100)
    for i in range(10):
        sink.write(str(i))
    until(lambda: sink.problem == "gate: it fails")
    until(lambda: sink.acknowledged == 10)
    assert gate.got == [str(i) for i in range(10)]
    assert gate.connects == 4
    assert sink.problem == ""
    sink.close()


def test_close_waits_for_queued_lines_and_counts_those_not_sent(monkeypatch):
    monkeypatch.setattr("edge_ssm.io.sinks.queue.CLOSE_S", 0.3)
    gate = Gate()
    sink = QueuedSink(gate, 100)
    for i in range(5):
        sink.write(str(i))
    sink.close()
    assert sink.dropped == {"unsent": 5}
    gate.open.set()


def test_a_file_rotates_and_keeps_the_configured_number(tmp_path):
    path = tmp_path / "out"
    sink = FileSink(str(path), FileOptions(append=True, rotate_bytes=20, keep=2))
    for i in range(20):
        sink.write(f"line {i:02}\n")  # 8 bytes: two per file
    sink.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.1", "out.2"]
    assert path.read_text() == "line 18\nline 19\n"
    assert (tmp_path / "out.2").read_text() == "line 14\nline 15\n"


def test_appending_repairs_an_incomplete_last_line(tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"whole\ntor")
    sink = FileSink(str(path), FileOptions(append=True))
    sink.write("next\n")
    sink.close()
    assert path.read_text() == "whole\nnext\n"
    path.write_bytes(b"somebody's")
    sink = FileSink(str(path), FileOptions(append=True, torn="end"))
    sink.write("next\n")
    sink.close()
    assert path.read_text() == "somebody's\nnext\n"
    FileSink(str(path)).close()
    assert path.read_text() == ""


def test_every_file_of_a_table_has_one_header(tmp_path):
    path = tmp_path / "out"
    for line in ("1\n", "2\n", "3\n"):
        sink = FileSink(str(path), FileOptions(append=True, rotate_bytes=6))
        sink.set_file_header("a\n")
        sink.write(line)
        sink.write(line)
        sink.close()
    assert path.read_text() == "a\n3\n3\n"
    assert (tmp_path / "out.1").read_text() == "a\n2\n2\n"
    queued = open_sink(str(tmp_path / "queued"), overflow="drop-oldest")
    assert queued.has_file_header
    queued.set_file_header("a\n")
    queued.write("1\n")
    queued.close()
    assert (tmp_path / "queued").read_text() == "a\n1\n"


def test_a_non_blocking_standard_output_receives_every_line_complete():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    sink, got = StandardSink(writer, "utf-8"), []

    def read():
        while piece := os.read(reader, 700):
            got.append(piece)
            time.sleep(0.0005)

    thread = threading.Thread(target=read)
    thread.start()
    lines = [f"{i:05} {'x' * (i % 500)}\n" for i in range(3000)]
    for line in lines:
        sink.write(line)
    os.close(writer)
    thread.join(30)
    os.close(reader)
    assert b"".join(got).decode() == "".join(lines)


def test_an_unread_standard_output_does_not_delay_the_end_for_long(monkeypatch):
    monkeypatch.setattr("edge_ssm.io.sinks.file.CLOSE_S", 0.1)
    reader, writer = os.pipe()
    sink = StandardSink(writer, "utf-8", lambda: False)
    with pytest.raises(BrokenPipeError):
        sink.write("x" * (1 << 20))
    os.close(reader)
    os.close(writer)


def test_a_full_disk_leaves_complete_lines_and_is_waited_for(tmp_path):
    if os.geteuid():
        pytest.skip("needs root, to mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=64k none {disk}"):
        pytest.skip("no file system can be mounted here")
    try:
        ballast = disk / "ballast"
        ballast.write_bytes(b"x" * 40_000)
        sink = open_sink(str(disk / "out"), overflow="drop-oldest")
        lines = [f"{i:05} {'y' * 90}\n" for i in range(400)]
        for line in lines:
            sink.write(line)
        until(lambda: "No space left" in sink.problem)
        assert (disk / "out").read_text().endswith("\n")
        ballast.unlink()
        until(lambda: sink.acknowledged == 400)
        sink.close()
        assert (disk / "out").read_text() == "".join(lines)
    finally:
        os.system(f"umount -l {disk}")


def test_tcp_lines_arrive_and_a_restarted_server_receives_the_next_ones():
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    sink = open_sink(f"tcp://127.0.0.1:{port}")
    sink.write("one\n")
    connection, _ = server.accept()
    assert connection.recv(100) == b"one\n"
    connection.close()
    until(lambda: sink.acknowledged == 1)
    sink.write("two\n")
    connection, _ = server.accept()
    assert connection.recv(100) == b"two\n"
    sink.close()
    connection.close()
    server.close()


def test_a_server_that_never_reads_never_stops_the_writer():
    server = socket.create_server(("127.0.0.1", 0))
    sink = open_sink(f"tcp://127.0.0.1:{server.getsockname()[1]}", queue=8, overflow="drop-oldest")
    longest = 0.0
    for _ in range(3000):
        began = time.perf_counter()
        sink.write("z" * 10_000 + "\n")
        longest = max(longest, time.perf_counter() - began)
    assert sink.dropped["overflow"] > 0
    assert sink.depth <= 8 + 64
    assert longest < 5  # otherwise it would wait for ever
    server.close()


def test_udp_and_unix_lines_arrive(tmp_path):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as reader:
        reader.bind(("127.0.0.1", 0))
        sink = open_sink(f"udp://127.0.0.1:{reader.getsockname()[1]}")
        sink.write("a\n")
        assert reader.recv(100) == b"a\n"
        sink.close()
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        sink = open_sink(f"unix://{path}")
        sink.write("b\n")
        assert server.accept()[0].recv(100) == b"b\n"
        sink.close()


@pytest.mark.parametrize("text", ["tcp://host", "serial:///dev/x", "unix://", "/nowhere/at/all"])
def test_an_invalid_endpoint_is_refused(text):
    with pytest.raises(UsageError):
        open_sink(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("tcp://a..b:80", "tcp://a..b:80: 'a..b' is not a host"),
        ("udp://a..b:80", "'a..b' is not a host"),
        ("http://a..b/", "'a..b' is not a host"),
        ("mqtt://a..b/t", "'a..b' is not a host"),
        ("http://a/#token_file=a%00b", "http://a/: 'a\\x00b': has a zero byte"),
    ],
)
def test_an_invalid_host_is_refused_before_its_thread_starts(text, problem):
    with pytest.raises(UsageError, match=re.escape(problem)):
        open_sink(text)


@pytest.mark.parametrize(
    "text",
    ["mqtt://h/t?username=u&password_file=", "mqtts://h/t?ca_file=", "http://h/#token_file=", "https://h/#ca_file="],
)
def test_a_named_pipe_instead_of_a_secret_file_does_not_block(tmp_path, text):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match=r"_file /.*/fifo: not a regular file; expected one"):
        open_sink(f"{text}{tmp_path}/fifo")


@pytest.mark.parametrize("module", sorted(set(MODULES.values())))
def test_every_registered_module_opens_transports(module):
    assert callable(import_module(f"edge_ssm.io.sinks.{module}").open_transport)
