"""All sinks, by the scheme of their endpoint.

Files and standard output are written directly or through a queue. Every other scheme has a module with a function
``open_transport(endpoint)``, which returns a ``Transport`` that is not connected yet, and raises UsageError.
"""

from __future__ import annotations

from importlib import import_module

from edge_ssm.io.address import Endpoint, parse_endpoint
from edge_ssm.io.sinks import file as file_sinks
from edge_ssm.io.sinks.base import Sink, Transport, Waiting, keep_waiting
from edge_ssm.io.sinks.file import REPLACED, FileOptions
from edge_ssm.io.sinks.queue import Overflow, QueuedSink

MODULES = {
    "tcp": "socket",
    "udp": "socket",
    "unix": "socket",
    "mqtt": "mqtt",
    "mqtts": "mqtt",
    "http": "webhook",
    "https": "webhook",
}
"""Scheme -> module of this package, imported when it is needed."""
SCHEMES = tuple(MODULES)
"""Schemes of addresses."""


def open_sink(
    text: str,
    file: FileOptions = REPLACED,
    queue: int = 1024,
    overflow: Overflow = "wait",
    while_waiting: Waiting = keep_waiting,
) -> Sink | None:
    """Open the sink that ``text`` names: "-", a file, or SCHEME://... (docs/service.md).

    Return None if standard output exists in Python only. Raises UsageError.
    """
    endpoint = parse_endpoint(text, SCHEMES)
    if overflow == "wait":
        if endpoint.scheme == "std":
            return file_sinks.standard_output(while_waiting)
        if endpoint.scheme == "file":
            return file_sinks.FileSink(text, file, while_waiting)
    return QueuedSink(_open_transport(endpoint, file), queue, overflow, while_waiting)


def _open_transport(endpoint: Endpoint, file: FileOptions) -> Transport:
    if endpoint.scheme == "std":
        return file_sinks.DescriptorTransport(1, "stdout")
    if endpoint.scheme == "file":
        return file_sinks.FileTransport(endpoint.text, file)
    module = import_module(f"edge_ssm.io.sinks.{MODULES[endpoint.scheme]}")
    transport: Transport = module.open_transport(endpoint)
    return transport


def validate(text: str) -> Endpoint:
    """Return the parsed endpoint, checked as far as possible without opening anything. Raises UsageError."""
    endpoint = parse_endpoint(text, SCHEMES)
    if endpoint.scheme in MODULES:
        _open_transport(endpoint, REPLACED).close()  # It connects when the first line is sent.
    return endpoint
