"""TCP and Unix connections, and the sockets that wait for them, for sources and sinks."""

from __future__ import annotations

import os
import socket
import stat

from edge_ssm.errors import UsageError
from edge_ssm.io.socket_activation import inherited_sockets

CONNECT_S = 5.0
"""Seconds that an attempt to connect may take."""
Address = tuple[str, int] | str
"""Host and port, or the path of a Unix socket."""


def _address_text(address: Address) -> str:
    return address if isinstance(address, str) else f"{address[0]}:{address[1]}"


def _family(address: Address) -> socket.AddressFamily:
    if isinstance(address, str):
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET


def keep_alive(connection: socket.socket) -> None:
    """Let the system notice within about a minute that a peer has vanished without closing the connection."""
    if connection.family == socket.AF_UNIX:
        return
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    ):
        connection.setsockopt(level, option, value)


def connect(address: Address) -> socket.socket:
    """Return a connection to a server, made within CONNECT_S. Raises OSError."""
    if not isinstance(address, str):
        return socket.create_connection(address, CONNECT_S)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(CONNECT_S)
        connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection


def bind(address: Address, kind: socket.SocketKind) -> tuple[socket.socket, bool]:
    """Return a socket at ``address`` and whether it is new: systemd may have passed one on for this address.

    Raises UsageError.
    """
    inherited = inherited_sockets()
    match = next((candidate for candidate in inherited if candidate.type == kind and _is_at(candidate, address)), None)
    for candidate in inherited:
        if candidate is not match:
            candidate.close()
    if match is not None:
        return match, False
    new = socket.socket(_family(address), kind)
    try:
        new.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if isinstance(address, str):
            _remove_stale(address)
        new.bind(address)
    except (OSError, OverflowError) as error:
        new.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{_address_text(address)}: cannot listen there ({reason})") from None
    return new, True


def _is_at(candidate: socket.socket, address: Address) -> bool:
    name = candidate.getsockname()
    return name == address if isinstance(address, str) else tuple(name[:2]) == address


def _remove_stale(path: str) -> None:
    """Remove the file of a Unix socket that nobody listens on any more: it would keep the name taken."""
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
