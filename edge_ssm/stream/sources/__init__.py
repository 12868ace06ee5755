"""Where samples come from, by address."""

from __future__ import annotations

from edge_ssm.errors import UsageError
from edge_ssm.stream.places import Place, place
from edge_ssm.stream.sources.base import BLOCK, Source

PACED_BLOCK = 1 << 10
"""A snapshot is taken between two blocks: where they are played back slowly, they must be short."""

SCHEMES = ("serial", "tcp", "tcp-listen", "udp", "unix", "unix-listen", "mqtt", "mqtts", "iio")


def open_source(text: str, follow: bool = False, paced: bool = False) -> Source:
    """The source that ``text`` names: "-", a file, or SCHEME://... (docs/service.md). Raises UsageError."""
    from edge_ssm.stream.sources import files, sockets

    found = place(text, SCHEMES)
    if found.scheme in ("std", "file"):
        return files.FileSource(text, follow, PACED_BLOCK if paced else BLOCK)
    if follow:
        raise UsageError(f"--follow: only for a file, not {found.shown}")
    if found.scheme in ("serial", "iio", "mqtt", "mqtts"):
        return _device(found)
    found.known_options()
    if found.scheme == "udp":
        return sockets.UdpSource(found.shown, found.address())
    address = found.socket_path() if found.scheme.startswith("unix") else found.address()
    made = sockets.ListenSource if found.scheme.endswith("-listen") else sockets.ConnectSource
    return made(found.shown, address)


def _device(found: Place) -> Source:
    raise UsageError(f"{found.shown}: {found.scheme} is not there yet")
