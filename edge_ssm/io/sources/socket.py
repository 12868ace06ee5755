"""Samples from the network: a TCP or Unix connection made or accepted here, or UDP datagrams."""

from __future__ import annotations

import os
import socket
import stat
import sys
from abc import abstractmethod
from contextlib import suppress

from edge_ssm.errors import RunFailed, UsageError
from edge_ssm.io.backoff import Backoff
from edge_ssm.io.shutdown import ShutdownSignal
from edge_ssm.io.socket_activation import inherited
from edge_ssm.io.sources.base import BLOCK, Batch, Discontinuity, Source

CONNECT_S = 5.0
BUFFER = 1 << 20
"""Asked for; the system gives what net.core.rmem_max allows. A small datagram takes 768 bytes of it."""
SO_RXQ_OVFL = 40
"""socket(7): each datagram comes with the count of those that the full buffer did not take before it."""
Address = tuple[str, int] | str
"""Host and port, or the path of a Unix socket."""


def address_text(address: Address) -> str:
    return address if isinstance(address, str) else f"{address[0]}:{address[1]}"


def _family(address: Address) -> socket.AddressFamily:
    if isinstance(address, str):
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET


def keep_alive(connection: socket.socket) -> None:
    """Notice within a minute or so that a peer is gone that could not say so."""
    if connection.family == socket.AF_UNIX:
        return
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    ):
        connection.setsockopt(level, option, value)


def connected(address: Address) -> socket.socket:
    """A connection to a server, made within CONNECT_S. Raises OSError."""
    if not isinstance(address, str):
        return socket.create_connection(address, CONNECT_S)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.settimeout(CONNECT_S)
        made.connect(address)
    except OSError:
        made.close()
        raise
    return made


def bound(address: Address, kind: socket.SocketKind) -> tuple[socket.socket, bool]:
    """A socket at ``address``: systemd's, where it handed one over for it, else a new one; and whether it is new.

    Raises UsageError.
    """
    given = inherited()
    found = next((handed for handed in given if handed.type == kind and _same(handed, address)), None)
    for handed in given:
        if handed is not found:
            handed.close()
    if found is not None:
        return found, False
    made = socket.socket(_family(address), kind)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if isinstance(address, str):
            _remove_stale(address)
        made.bind(address)
    except (OSError, OverflowError) as error:
        made.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{address_text(address)}: can't be listened on ({reason})") from None
    return made, True


def _same(handed: socket.socket, address: Address) -> bool:
    name = handed.getsockname()
    return name == address if isinstance(address, str) else tuple(name[:2]) == address


def _remove_stale(path: str) -> None:
    """A Unix socket file that nobody listens on any more keeps its name taken."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except OSError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            pass


class _ConnectionSource(Source):
    """One connection at a time; a lost one is a seam, and the next is waited for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._connection: socket.socket | None = None

    @abstractmethod
    def _next(self, stop: ShutdownSignal, seconds: float | None) -> socket.socket | Discontinuity | None:
        """Wait for a connection."""

    def read(self, stop: ShutdownSignal, seconds: float | None) -> Batch | Discontinuity | None:
        if self._connection is None:
            made = self._next(stop, seconds)
            if not isinstance(made, socket.socket):
                return made
            keep_alive(made)
            made.setblocking(False)
            self._connection = made
            return Discontinuity("connected", True)
        if not stop.wait(self._connection.fileno(), seconds):
            return None
        try:
            content = self._connection.recv(BLOCK)
        except BlockingIOError:
            return None
        except OSError as error:
            return self._lost(error.strerror or "connection lost")
        return Batch(content) if content else self._lost("the other side closed the connection")

    def _lost(self, reason: str) -> Discontinuity:
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        return Discontinuity(reason, False)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


class ConnectSource(_ConnectionSource):
    """Connects to a server that sends samples, again and again."""

    def __init__(self, name: str, address: Address) -> None:
        super().__init__(name)
        self._address = address
        self._back_off = Backoff()
        self._said = ""

    def _next(self, stop: ShutdownSignal, seconds: float | None) -> socket.socket | Discontinuity | None:
        wait = self._back_off.left_s
        if wait:
            stop.wait(seconds=wait if seconds is None else min(wait, seconds))
            return None
        try:
            made = connected(self._address)
        except OSError as error:
            self._back_off.failed()
            reason = f"no connection ({error.strerror or error}); tried again and again"
            if reason == self._said:
                return None
            self._said = reason
            return Discontinuity(reason, False)
        self._back_off.succeeded()
        self._said = ""
        return made


class ListenSource(_ConnectionSource):
    """Takes connections of a TCP or Unix socket, one after the other. Raises UsageError."""

    def __init__(self, name: str, address: Address) -> None:
        super().__init__(name)
        self._address = address
        self._listener, new = bound(address, socket.SOCK_STREAM)
        self._own_path = address if isinstance(address, str) and new else None
        self._listener.listen(1)
        self._listener.setblocking(False)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def _next(self, stop: ShutdownSignal, seconds: float | None) -> socket.socket | Discontinuity | None:
        if not stop.wait(self._listener.fileno(), seconds):
            return None
        try:
            return self._listener.accept()[0]
        except OSError as error:
            if isinstance(error, (BlockingIOError, ConnectionAbortedError)):
                return None
            stop.wait(seconds=Backoff.SHORTEST_S)  # Out of descriptors, say: do not spin.
            return Discontinuity(f"a connection could not be taken ({error.strerror})", False)

    def close(self) -> None:
        super().close()
        self._listener.close()
        if self._own_path is not None:
            with suppress(OSError):
                os.unlink(self._own_path)


class UdpSource(Source):
    """Datagrams, each of whole frames. Raises UsageError."""

    datagrams = True
    reorder = 1024
    reorder_wait_s = 0.1

    def __init__(self, name: str, address: tuple[str, int]) -> None:
        self.name = name
        self._socket, _ = bound(address, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RXQ_OVFL, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    def read(self, stop: ShutdownSignal, seconds: float | None) -> Batch | Discontinuity | None:
        if not stop.wait(self._socket.fileno(), seconds):
            return None
        try:
            content, told, _, _ = self._socket.recvmsg(BLOCK, 64)
        except BlockingIOError:
            return None
        except OSError as error:
            raise RunFailed(f"{self.name}: reading failed ({error.strerror})") from None
        for _, _, value in told:
            self.unread = int.from_bytes(value, sys.byteorder)
        return Batch(content)

    def close(self) -> None:
        self._socket.close()
