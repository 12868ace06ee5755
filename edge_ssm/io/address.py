"""Endpoints: how sources and sinks are named on the command line and in configuration files.

-                                   standard input or standard output
data/pump3.csv                      a file, a named pipe or a device node
serial:///dev/ttyUSB0?baud=115200   SCHEME://HOST:PORT/PATH?OPTIONS
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

from edge_ssm.errors import UsageError

LOOPBACK = "127.0.0.1"
MAX_SOCKET_PATH = 107
"""Bytes of a Unix socket's path (unix(7))."""


@dataclass(frozen=True)
class Endpoint:
    """A parsed endpoint, ``scheme://host:port/path?options``."""

    text: str
    """The endpoint as it was written. May contain a password: show ``redacted``."""
    scheme: str
    """Scheme of an address; "file" for a plain path, "std" for "-"."""
    host: str
    port: int | None
    path: str
    options: dict[str, str]
    password: str | None = None

    @property
    def redacted(self) -> str:
        """The text without its password."""
        return self.text if self.password is None else self.text.replace(f":{self.password}@", ":...@", 1)

    def host_and_port(self, default_host: str = LOOPBACK) -> tuple[str, int]:
        """Return host and port. Raises UsageError if there is no port."""
        if self.port is None:
            raise UsageError(f"{self.redacted}: expected {self.scheme}://HOST:PORT")
        return self.host or default_host, self.port

    def socket_path(self) -> str:
        """Return the path of a Unix socket. Raises UsageError if there is none, or a host."""
        if self.host or len(self.path) < 2:
            raise UsageError(f"{self.redacted}: expected {self.scheme}:///PATH of a Unix socket")
        if len(os.fsencode(self.path)) > MAX_SOCKET_PATH:
            raise UsageError(f"{self.redacted}: a Unix socket's path has at most {MAX_SOCKET_PATH} bytes")
        return self.path

    def known_options(self, *names: str) -> dict[str, str]:
        """Return the options. Raises UsageError for one that is not among ``names``."""
        for name in self.options:
            if name not in names:
                expected = f"expected {', '.join(names)}" if names else f"{self.scheme} takes none"
                raise UsageError(f"{self.redacted}: option {name!r} is unknown, {expected}")
        return self.options

    def positive_int(self, name: str, default: int) -> int:
        """Return an option as a whole number above 0. Raises UsageError."""
        text = self.options.get(name)
        if text is None:
            return default
        if not text.isascii() or not text.isdigit() or not 0 < int(text) < 1 << 31:
            raise UsageError(f"{self.redacted}: {name} {text!r}, expected a whole number above 0")
        return int(text)


def parse_endpoint(text: str, schemes: Iterable[str]) -> Endpoint:
    """Parse an endpoint. Raises UsageError for an unknown scheme or an invalid part."""
    if text == "-":
        return Endpoint(text, "std", "", None, "", {})
    scheme, separator, _ = text.partition("://")
    if not separator:
        if not text:
            raise UsageError("an empty path: expected a file, - or an address")
        return Endpoint(text, "file", "", None, text, {})
    if scheme not in schemes:
        raise UsageError(f"{text}: {scheme!r} is unknown, expected a file, -, or {', '.join(schemes)}")
    if scheme in ("mqtt", "mqtts"):
        return _parse_mqtt(text, scheme)
    try:
        parts = urlsplit(text)
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        endpoint = Endpoint(
            text,
            scheme,
            parts.hostname or "",
            parts.port,
            unquote(parts.path),
            options,
            parts.password and unquote(parts.password),
        )
    except ValueError as error:
        raise UsageError(f"{text}: not an address ({error})") from None
    if scheme != "iio":  # whose host is the name of a device
        check_host(endpoint.host, endpoint.redacted)
    _check_text(endpoint.path, endpoint.redacted)
    check_options(options, endpoint.redacted)
    return endpoint


def _parse_mqtt(text: str, scheme: str) -> Endpoint:
    """Split off the options only: # and % are ordinary characters of a topic, unlike of a path."""
    url, _, query = text.partition("?")
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError as error:
        raise UsageError(f"{url}: not options ({error})") from None
    check_options(options, url)
    return Endpoint(url, scheme, "", None, "", options)


def check_host(host: str, context: str) -> None:
    """Raise UsageError, beginning with ``context``, for a name that no resolver accepts.

    Python encodes a host as IDNA (RFC 3490) only when it connects or binds, possibly in another thread, and what it
    raises then is not an OSError.
    """
    try:
        host.encode("idna")
    except UnicodeError:
        raise UsageError(f"{context}: {host[:80]!r} is not a host; expected 1 to 63 characters between dots") from None


def _check_text(text: str, context: str) -> None:
    """Raise UsageError for a zero byte (%00), at which the system would end a path."""
    if "\0" in text:
        raise UsageError(f"{context}: {text[:60]!r}: has a zero byte; expected a text without one")


def check_options(options: dict[str, str], context: str) -> None:
    """Raise UsageError for a value that is wrong whatever the option means.

    This includes an option ``*_file`` that names something other than a regular file.
    """
    for name, value in options.items():
        _check_text(value, context)
        if name.endswith("_file") and os.path.exists(value) and not os.path.isfile(value):
            raise UsageError(f"{context}: {name} {value}: not a regular file; expected one")


def check_not_an_input(output: str, inputs: Iterable[str]) -> None:
    """Raise UsageError if the output is a file that the run reads: opening it would empty it."""
    for path in inputs:
        with suppress(OSError, ValueError):
            if os.path.isfile(output) and os.path.samefile(output, path):
                raise UsageError(f"--output {output}: the run reads it ({path}); give another file")
