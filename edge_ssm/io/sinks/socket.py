"""Sinks in the network: a TCP or Unix connection, or UDP datagrams."""

from __future__ import annotations

import select
import socket

from edge_ssm.io.address import Endpoint
from edge_ssm.io.connections import Address, connect, keep_alive
from edge_ssm.io.sinks.base import Transport

SEND_S = 10.0
"""Seconds for which sending may block."""


class ConnectTransport(Transport):
    """Sends lines to a server.

    Lines that the system had taken when the connection broke may be lost, since TCP does not report their delivery.
    MQTT and webhooks do.
    """

    def __init__(self, name: str, address: Address) -> None:
        self.name, self._address = name, address
        self._socket: socket.socket | None = None

    def connect(self) -> None:
        """Connect to the server."""
        connection = connect(self._address)
        keep_alive(connection)
        connection.settimeout(SEND_S)
        self._socket = connection

    def send(self, lines: list[str]) -> None:
        """Send the lines."""
        assert self._socket is not None
        # Only reading shows that the server has closed the connection.
        if select.select([self._socket], [], [], 0)[0] and not self._socket.recv(1 << 16):
            raise ConnectionResetError(104, "the other side closed the connection")
        self._socket.sendall("".join(lines).encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class UdpTransport(Transport):
    """Sends a datagram per line, without knowing whether it arrives."""

    def __init__(self, name: str, address: tuple[str, int]) -> None:
        self.name, self._address = name, address
        self._socket: socket.socket | None = None

    def connect(self) -> None:
        """Look the host up."""
        family, _, _, _, address = socket.getaddrinfo(*self._address, type=socket.SOCK_DGRAM)[0]
        datagrams = socket.socket(family, socket.SOCK_DGRAM)
        datagrams.connect(address)
        self._socket = datagrams

    def send(self, lines: list[str]) -> None:
        """Send the lines."""
        assert self._socket is not None
        for line in lines:
            self._socket.send(line.encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def open_transport(endpoint: Endpoint) -> Transport:
    """Return the transport of one of tcp, unix and udp. Raises UsageError."""
    endpoint.known_options()
    if endpoint.scheme == "unix":
        return ConnectTransport(endpoint.redacted, endpoint.socket_path())
    kind = ConnectTransport if endpoint.scheme == "tcp" else UdpTransport
    return kind(endpoint.redacted, endpoint.host_and_port())
