"""Sources: bytes in order, discontinuities where a connection broke, files that grow, sockets of real peers."""

import os
import re
import socket
import threading
import time
from importlib import import_module

import pytest
from support.networks import random_network

from edge_ssm.errors import UsageError
from edge_ssm.io.address import parse_endpoint
from edge_ssm.io.backoff import Backoff
from edge_ssm.io.mailbox import Mailbox
from edge_ssm.io.shutdown import ShutdownSignal
from edge_ssm.io.sources import registry
from edge_ssm.io.sources.base import Batch, Discontinuity
from edge_ssm.io.sources.registry import SCHEMES, open_source
from edge_ssm.io.sources.socket import ConnectSource, ListenSource, UdpSource


def opened(text, **options):
    return open_source(text, random_network().input, **options)


@pytest.fixture
def stop():
    return ShutdownSignal()


def collect(source, stop, until, limit_s=10.0):
    """Return what the source delivers until ``until(items)``."""
    items, end = [], time.monotonic() + limit_s
    while not until(items):
        assert time.monotonic() < end, items
        item = source.read(stop, 0.1)
        if item is not None:
            items.append(item)
    return items


def content(items):
    return b"".join(item.content for item in items if isinstance(item, Batch))


def discontinuities(items):
    return [item.connected for item in items if isinstance(item, Discontinuity)]


def test_a_file_is_read_to_its_end(tmp_path, stop):
    (tmp_path / "f").write_bytes(b"x" * 200_000)
    source = opened(str(tmp_path / "f"))
    items = collect(source, stop, lambda items: source.ended)
    assert content(items) == b"x" * 200_000
    assert not source.live
    source.close()


def test_a_followed_file_is_read_on_as_it_grows_shrinks_or_is_replaced(tmp_path, stop):
    path = tmp_path / "log"
    path.write_bytes(b"one\n")
    source = opened(str(path), follow=True)
    assert content(collect(source, stop, content)) == b"one\n"
    with path.open("ab") as file:
        file.write(b"two\n")
    assert content(collect(source, stop, content)) == b"two\n"
    path.write_bytes(b"3\n")
    items = collect(source, stop, content)
    assert (discontinuities(items), content(items)) == ([True], b"3\n")
    # Rotation: the rest of the old file comes before the new file.
    with path.open("ab") as file:
        file.write(b"last\n")
        path.rename(tmp_path / "log.1")
    path.write_bytes(b"fresh\n")
    items = collect(source, stop, lambda items: content(items).endswith(b"fresh\n"))
    assert (discontinuities(items), content(items)) == ([True], b"last\nfresh\n")
    assert not source.ended
    source.close()


def test_a_position_is_resumed_only_in_the_same_file(tmp_path, stop):
    path = tmp_path / "f"
    path.write_bytes(b"0123456789")
    first = opened(str(path))
    first.read(stop, 0)
    position = {**first.position(), "offset": 4}
    again = opened(str(path))
    again.seek(position)
    assert content([again.read(stop, 0)]) == b"456789"
    other = opened(str(path))
    other.seek({**position, "inode": 1})
    other.seek({**position, "offset": 1 << 40})
    other.seek({**position, "read": 1 << 70})
    other.seek({})
    assert content([other.read(stop, 0)]) == b"0123456789"


def test_another_file_with_the_same_inode_is_recognised(tmp_path, stop):
    path = tmp_path / "f"
    path.write_bytes(b"0123456789")
    first = opened(str(path))
    first.read(stop, 0)
    position = first.position()
    path.write_bytes(b"0123456780, and more")  # in place, as when the system reuses an inode
    other = opened(str(path))
    assert not other.seek(position)
    path.write_bytes(b"0123456789, and more")
    assert other.seek(position)
    assert content([other.read(stop, 0)]) == b", and more"


def test_a_followed_pipe_outlives_its_writers(tmp_path, stop):
    path = str(tmp_path / "pipe")
    os.mkfifo(path)
    source = opened(path, follow=True)
    for text in (b"a\n", b"b\n"):
        with open(path, "wb") as writer:
            writer.write(text)
        assert content(collect(source, stop, content)) == text
    assert not source.ended
    source.close()


def test_a_tcp_server_that_restarts_is_reconnected(stop):
    server = socket.create_server(("127.0.0.1", 0))
    host, port = server.getsockname()
    source = ConnectSource("sensor", (host, port))

    def serve(text):
        connection, _ = server.accept()
        with connection:
            connection.sendall(text)

    for text in (b"first\n", b"second\n"):
        thread = threading.Thread(target=serve, args=(text,))
        thread.start()
        items = collect(source, stop, lambda items: discontinuities(items)[-1:] == [False])
        assert (discontinuities(items), content(items)) == ([True, False], text)
        thread.join()
    server.close()
    (refused,) = collect(source, stop, lambda items: items)
    assert not refused.connected
    assert "no connection" in refused.reason
    end = time.monotonic() + 1
    while time.monotonic() < end:
        assert source.read(stop, 0.1) is None  # reported once, retried
    source.close()


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_listening_source_accepts_one_client_after_the_other(tmp_path, stop, kind):
    path = str(tmp_path / "s")
    source = ListenSource("here", path if kind == "unix" else ("127.0.0.1", 0))
    address = path if kind == "unix" else ("127.0.0.1", source.port)
    family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
    for text in (b"1\n", b"2\n"):
        with socket.socket(family) as client:
            client.connect(address)
            client.sendall(text)
        items = collect(source, stop, lambda items: discontinuities(items)[-1:] == [False])
        assert (discontinuities(items), content(items)) == ([True, False], text)
    source.close()
    assert not os.path.exists(path)


def test_a_unix_socket_left_by_a_killed_process_is_replaced(tmp_path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    source = ListenSource("here", path)
    with pytest.raises(UsageError, match="cannot listen there"):
        ListenSource("here", path)
    source.close()


def test_udp_datagrams_are_delivered_complete(stop):
    source = UdpSource("here", ("127.0.0.1", 0))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for i in range(5):
            sender.sendto(b"%d" % i, ("127.0.0.1", source.port))
    items = collect(source, stop, lambda items: len(items) == 5)
    assert [item.content for item in items] == [b"0", b"1", b"2", b"3", b"4"]
    assert source.datagrams
    source.close()


def test_udp_counts_datagrams_that_were_not_read_in_time(stop):
    source = UdpSource("here", ("127.0.0.1", 0))
    source._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(1000):
            sender.sendto(b"early", ("127.0.0.1", source.port))
        read = 0
        while source.read(stop, 0.1) is not None:
            read += 1
        sender.sendto(b"last", ("127.0.0.1", source.port))
        assert source.read(stop, 1).content == b"last"
    assert read < 1000
    assert source.unread == 1000 - read


def test_listening_is_on_loopback_by_default():
    assert parse_endpoint("tcp-listen://:9000", SCHEMES).host_and_port() == ("127.0.0.1", 9000)
    assert parse_endpoint("udp://0.0.0.0:9000", SCHEMES).host_and_port() == ("0.0.0.0", 9000)
    assert parse_endpoint("udp://[::1]:9000", SCHEMES).host_and_port() == ("::1", 9000)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("tcp://host", "expected tcp://HOST:PORT"),
        ("tcp://host:99999", "not an address"),
        ("ftp://host:1", "'ftp' is unknown"),
        ("unix://host/path", "expected unix:///PATH"),
        ("unix:///" + "x" * 200, "at most 107 bytes"),
        ("tcp-listen://203.0.113.1:9", "cannot listen there"),
        ("udp://:9?x=1", "option 'x' is unknown"),
        ("tcp://host:1?x", "not an address"),
        ("", "an empty path"),
        ("tcp://a..b:80", "tcp://a..b:80: 'a..b' is not a host; expected 1 to 63 characters between dots"),
        ("tcp-listen://a..b:80", "'a..b' is not a host"),
        ("udp://" + "a" * 64 + ":80", "a' is not a host"),
        ("serial:///dev/tty%00A?baud=9600", "'/dev/tty\\x00A': has a zero byte"),
        ("unix:///a%00b", "has a zero byte"),
        ("mqtt://h/t?username=u&password_file=a%00b", "'a\\x00b': has a zero byte"),
    ],
)
def test_an_invalid_address_is_refused(text, problem):
    with pytest.raises(UsageError, match=re.escape(problem)):
        opened(text)


def test_a_mailbox_keeps_order_blocks_writers_and_wakes_its_reader(stop):
    box = Mailbox(3)
    threading.Thread(target=lambda: [box.put(i) for i in range(1000)], daemon=True).start()
    assert [box.get(stop, 5) for _ in range(1000)] == list(range(1000))
    began = time.monotonic()
    assert box.get(stop, 0.05) is None
    assert time.monotonic() - began > 0.04
    box.close()
    assert box.put(1) is False


def test_backoff_doubles_up_to_its_limit_and_success_resets_it():
    backoff = Backoff(longest_s=1.0)
    waits = [backoff.record_failure() for _ in range(10)]
    assert 0.05 <= waits[0] <= 0.1
    assert 0.5 <= waits[-1] <= 1.0
    backoff.reset()
    assert backoff.remaining_s == 0
    assert backoff.record_failure() <= 0.1


@pytest.mark.parametrize("module", sorted(set(registry.MODULES.values())))
def test_every_registered_module_opens_and_validates_endpoints(module):
    loaded = import_module(f"edge_ssm.io.sources.{module}")
    assert callable(loaded.open_endpoint)
    assert callable(loaded.validate_endpoint)
