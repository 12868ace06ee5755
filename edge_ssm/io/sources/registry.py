"""All sources, by the scheme of their endpoint.

A module of a source has two functions: ``open_endpoint(endpoint, options)`` returns the source, and
``validate_endpoint(endpoint)`` checks an endpoint as far as possible without opening anything. Both raise UsageError.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from edge_ssm.errors import UsageError
from edge_ssm.io.address import Endpoint, parse_endpoint
from edge_ssm.io.sources.base import Source, SourceOptions
from edge_ssm.model.network import InputSpec

MODULES = {
    "std": "file",
    "file": "file",
    "serial": "serial",
    "tcp": "socket",
    "tcp-listen": "socket",
    "udp": "socket",
    "unix": "socket",
    "unix-listen": "socket",
    "mqtt": "mqtt",
    "mqtts": "mqtt",
    "iio": "iio",
}
"""Scheme -> module of this package, imported when it is needed: some need optional packages."""
SCHEMES = tuple(scheme for scheme in MODULES if scheme not in ("std", "file"))
"""Schemes of addresses."""


def open_source(text: str, spec: InputSpec, follow: bool = False, paced: bool = False) -> Source:
    """Open the source that ``text`` names: "-", a file, or SCHEME://... (docs/service.md).

    ``follow``: read past the end of a file, as it grows. ``paced``: a recording will be played back slowly.
    Raises UsageError.
    """
    endpoint = parse_endpoint(text, SCHEMES)
    if follow and endpoint.scheme not in ("std", "file"):
        raise UsageError(f"--follow: only for a file, not {endpoint.redacted}")
    source: Source = _module(endpoint).open_endpoint(endpoint, SourceOptions(spec, follow, paced))
    return source


def validate(text: str) -> Endpoint:
    """Return the parsed endpoint, checked as far as possible without opening anything. Raises UsageError."""
    endpoint = parse_endpoint(text, SCHEMES)
    _module(endpoint).validate_endpoint(endpoint)
    return endpoint


def _module(endpoint: Endpoint) -> Any:
    return import_module(f"edge_ssm.io.sources.{MODULES[endpoint.scheme]}")
