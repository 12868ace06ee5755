"""Sockets that systemd opened for this process (sd_listen_fds(3)): a sensor may connect before the service runs."""

from __future__ import annotations

import os
import socket

FIRST = 3


def inherited() -> list[socket.socket]:
    """The sockets handed over, listening or bound; none if they were meant for another process."""
    try:
        count = int(os.environ.get("LISTEN_FDS", "0"))
        mine = int(os.environ.get("LISTEN_PID", "0")) == os.getpid()
    except ValueError:
        return []
    if not mine:
        return []
    return [socket.socket(fileno=os.dup(fd)) for fd in range(FIRST, FIRST + min(max(count, 0), 64))]
