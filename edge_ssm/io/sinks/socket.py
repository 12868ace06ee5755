"""Lines to the network: a TCP or Unix connection, or UDP datagrams."""

from __future__ import annotations

import select
import socket

from edge_ssm.io.sinks.base import Transport
from edge_ssm.io.sources.socket import Address, connected, keep_alive

SEND_S = 10.0


class ConnectTransport(Transport):
    """A connection to a server that reads lines. Lines that were handed to the system when it broke may be lost with
    it: TCP does not tell. MQTT and a webhook do."""

    def __init__(self, name: str, address: Address) -> None:
        self.name, self._address = name, address
        self._socket: socket.socket | None = None

    def connect(self) -> None:
        made = connected(self._address)
        keep_alive(made)
        made.settimeout(SEND_S)
        self._socket = made

    def send(self, lines: list[str]) -> None:
        assert self._socket is not None
        # A server that is gone has said so, but only who reads hears it.
        if select.select([self._socket], [], [], 0)[0] and not self._socket.recv(1 << 16):
            raise ConnectionResetError(104, "the other side closed the connection")
        self._socket.sendall("".join(lines).encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class UdpTransport(Transport):
    """A datagram a line: sent, and never heard of again."""

    def __init__(self, name: str, address: tuple[str, int]) -> None:
        self.name, self._address = name, address
        self._socket: socket.socket | None = None

    def connect(self) -> None:
        found = socket.getaddrinfo(*self._address, type=socket.SOCK_DGRAM)[0]
        made = socket.socket(found[0], socket.SOCK_DGRAM)
        made.connect(found[4])
        self._socket = made

    def send(self, lines: list[str]) -> None:
        assert self._socket is not None
        for line in lines:
            self._socket.send(line.encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
