"""Samples from the network: TCP or Unix connections, made or accepted here, or UDP datagrams."""

from __future__ import annotations

import os
import socket
import sys
from abc import abstractmethod
from contextlib import suppress

from edge_ssm.errors import RunFailed
from edge_ssm.io.address import Endpoint
from edge_ssm.io.backoff import Backoff
from edge_ssm.io.connections import Address, bind, connect, keep_alive
from edge_ssm.io.shutdown import ShutdownSignal
from edge_ssm.io.sources.base import MAX_BATCH, Batch, Discontinuity, Source, SourceOptions

BUFFER = 1 << 20
"""Bytes requested for a receive buffer; net.core.rmem_max limits it. A small datagram occupies 768 of them."""
SO_RXQ_OVFL = 40
"""socket(7): each datagram carries the number of datagrams that the full buffer did not take before it."""


class _ConnectionSource(Source):
    """Reads one connection at a time. A lost connection is a discontinuity, after which the next is awaited."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._connection: socket.socket | None = None

    @abstractmethod
    def _await_connection(self, stop: ShutdownSignal, seconds: float | None) -> socket.socket | Discontinuity | None:
        """Wait for a connection, at most ``seconds``."""

    def read(self, stop: ShutdownSignal, seconds: float | None) -> Batch | Discontinuity | None:
        """Return what the peer sent, awaiting a connection if there is none."""
        if self._connection is None:
            connection = self._await_connection(stop, seconds)
            if not isinstance(connection, socket.socket):
                return connection
            keep_alive(connection)
            connection.setblocking(False)
            self._connection = connection
            return Discontinuity("connected", True)
        if not stop.wait(self._connection.fileno(), seconds):
            return None
        try:
            content = self._connection.recv(MAX_BATCH)
        except BlockingIOError:
            return None
        except OSError as error:
            return self._drop_connection(error.strerror or "connection lost")
        return Batch(content) if content else self._drop_connection("the other side closed the connection")

    def _drop_connection(self, reason: str) -> Discontinuity:
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        return Discontinuity(reason, False)

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()


class ConnectSource(_ConnectionSource):
    """Connects to a server that sends samples, and reconnects with back-off."""

    def __init__(self, name: str, address: Address) -> None:
        super().__init__(name)
        self._address = address
        self._backoff = Backoff()
        self._last_problem = ""

    def _await_connection(self, stop: ShutdownSignal, seconds: float | None) -> socket.socket | Discontinuity | None:
        wait = self._backoff.remaining_s
        if wait:
            stop.wait(seconds=wait if seconds is None else min(wait, seconds))
            return None
        try:
            connection = connect(self._address)
        except OSError as error:
            self._backoff.record_failure()
            reason = f"no connection ({error.strerror or error}); retrying"
            if reason == self._last_problem:
                return None
            self._last_problem = reason
            return Discontinuity(reason, False)
        self._backoff.reset()
        self._last_problem = ""
        return connection


class ListenSource(_ConnectionSource):
    """Accepts connections to a TCP or Unix socket, one after the other. Raises UsageError."""

    def __init__(self, name: str, address: Address) -> None:
        super().__init__(name)
        self._address = address
        self._listener, is_new = bind(address, socket.SOCK_STREAM)
        self._own_path = address if isinstance(address, str) and is_new else None
        self._listener.listen(1)
        self._listener.setblocking(False)

    @property
    def port(self) -> int:
        """Port of the socket, which the system chose for port 0."""
        return int(self._listener.getsockname()[1])

    def _await_connection(self, stop: ShutdownSignal, seconds: float | None) -> socket.socket | Discontinuity | None:
        if not stop.wait(self._listener.fileno(), seconds):
            return None
        try:
            return self._listener.accept()[0]
        except OSError as error:
            if isinstance(error, (BlockingIOError, ConnectionAbortedError)):
                return None
            stop.wait(seconds=Backoff.SHORTEST_S)  # Do not spin, for example when descriptors have run out.
            return Discontinuity(f"a connection could not be accepted ({error.strerror})", False)

    def close(self) -> None:
        """Close the connection and the socket, and remove the file of a Unix socket that was created here."""
        super().close()
        self._listener.close()
        if self._own_path is not None:
            with suppress(OSError):
                os.unlink(self._own_path)


class UdpSource(Source):
    """Receives datagrams, each of complete frames. Raises UsageError."""

    datagrams = True
    reorder = 1024
    reorder_wait_s = 0.1

    def __init__(self, name: str, address: tuple[str, int]) -> None:
        self.name = name
        self._socket, _ = bind(address, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RXQ_OVFL, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)

    @property
    def port(self) -> int:
        """Port of the socket, which the system chose for port 0."""
        return int(self._socket.getsockname()[1])

    def read(self, stop: ShutdownSignal, seconds: float | None) -> Batch | Discontinuity | None:
        """Return the next datagram."""
        if not stop.wait(self._socket.fileno(), seconds):
            return None
        try:
            content, ancillary, _, _ = self._socket.recvmsg(MAX_BATCH, 64)
        except BlockingIOError:
            return None
        except OSError as error:
            raise RunFailed(f"{self.name}: reading failed ({error.strerror})") from None
        for _, _, value in ancillary:
            self.unread = int.from_bytes(value, sys.byteorder)
        return Batch(content)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def open_endpoint(endpoint: Endpoint, options: SourceOptions) -> Source:
    """Open one of tcp, tcp-listen, unix, unix-listen and udp. Raises UsageError."""
    address = _address(endpoint)
    if not isinstance(address, str) and endpoint.scheme == "udp":
        return UdpSource(endpoint.redacted, address)
    kind = ListenSource if endpoint.scheme.endswith("-listen") else ConnectSource
    return kind(endpoint.redacted, address)


def validate_endpoint(endpoint: Endpoint) -> None:
    """Raise UsageError for an option, or an address that is incomplete."""
    _address(endpoint)


def _address(endpoint: Endpoint) -> Address:
    endpoint.known_options()
    return endpoint.socket_path() if endpoint.scheme.startswith("unix") else endpoint.host_and_port()
