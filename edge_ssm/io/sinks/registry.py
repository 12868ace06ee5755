"""Where formatted decisions go, by address."""

from __future__ import annotations

from urllib.parse import parse_qsl

from edge_ssm.errors import UsageError
from edge_ssm.io.address import Endpoint, check_options, place
from edge_ssm.io.sinks import file as sinks_file
from edge_ssm.io.sinks.base import Sink, Transport
from edge_ssm.io.sinks.file import REPLACED, FileOptions
from edge_ssm.io.sinks.queue import Overflow

SCHEMES = ("tcp", "udp", "unix", "mqtt", "mqtts", "http", "https")


def open_sink(
    text: str,
    file: FileOptions = REPLACED,
    queue: int = 1024,
    overflow: Overflow = "wait",
) -> Sink | None:
    """The outlet that ``text`` names: a file or SCHEME://... (docs/service.md); None for a standard output that is
    Python's alone. Raises UsageError."""
    from edge_ssm.io.sinks.queue import QueuedSink

    found = place(text, SCHEMES)
    if found.scheme == "std":
        if overflow == "wait":
            return sinks_file.standard()
        return QueuedSink(sinks_file.DescriptorTransport(1, "stdout"), queue, overflow)
    if found.scheme == "file":
        if overflow == "wait":
            return sinks_file.FileSink(text, file)
        return QueuedSink(sinks_file.FileTransport(text, file), queue, overflow)
    return QueuedSink(_transport(text), queue, overflow)


def _transport(text: str) -> Transport:
    from edge_ssm.io.sinks import socket

    found = place(text, SCHEMES)
    if found.scheme in ("mqtt", "mqtts", "http", "https"):
        return _device(found)
    found.known_options()
    if found.scheme == "unix":
        return socket.ConnectTransport(found.shown, found.socket_path())
    if found.scheme == "tcp":
        return socket.ConnectTransport(found.shown, found.address())
    return socket.UdpTransport(found.shown, found.address())


def _device(found: Endpoint) -> Transport:
    if found.scheme in ("http", "https"):
        return _webhook(found.text)
    from edge_ssm.io.mqtt import access_of
    from edge_ssm.io.sinks.mqtt import MqttTransport

    return MqttTransport(found.text, access_of(found))


def _webhook(text: str) -> Transport:
    """What stands after a # is for us and is never sent: ``#token_file=PATH&ca_file=PATH``."""
    from edge_ssm.io.sinks.webhook import WebhookTransport

    url, _, ours = text.partition("#")
    options = dict(parse_qsl(ours, keep_blank_values=True))
    if unknown := set(options) - {"token_file", "ca_file"}:
        raise UsageError(f"{url}: option {sorted(unknown)[0]!r} is unknown, expected token_file, ca_file after a #")
    check_options(options, url)
    return WebhookTransport(url, token_file=options.get("token_file"), ca_file=options.get("ca_file"))


def validate(text: str) -> Endpoint:
    """What ``text`` names, checked as far as it can be without opening anything. Raises UsageError."""
    found = place(text, SCHEMES)
    if found.scheme not in ("std", "file"):
        _transport(text).close()  # It connects when the first line is to be sent.
    return found
