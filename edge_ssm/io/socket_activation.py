"""Sockets that systemd opened for this process (sd_listen_fds(3)).

With them a sensor can connect before the service runs.
"""

from __future__ import annotations

import os
import socket

FIRST_DESCRIPTOR = 3
MAX_SOCKETS = 64


def inherited_sockets() -> list[socket.socket]:
    """Return the sockets that were passed on, listening or bound; none if they are meant for another process."""
    try:
        count = int(os.environ.get("LISTEN_FDS", "0"))
        is_for_us = int(os.environ.get("LISTEN_PID", "0")) == os.getpid()
    except ValueError:
        return []
    if not is_for_us:
        return []
    descriptors = range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + min(max(count, 0), MAX_SOCKETS))
    return [socket.socket(fileno=os.dup(descriptor)) for descriptor in descriptors]
