"""How sources and outlets are named on the command line and in configuration files: a path, "-", or an address."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

from edge_ssm.errors import UsageError

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Endpoint:
    """``scheme://host:port/path?options``; a plain path has the scheme "file", "-" the scheme "std"."""

    text: str
    scheme: str
    host: str
    port: int | None
    path: str
    options: dict[str, str]
    password: str | None = None

    @property
    def shown(self) -> str:
        """Without a password."""
        return self.text if self.password is None else self.text.replace(f":{self.password}@", ":...@", 1)

    def address(self, default_host: str = LOOPBACK) -> tuple[str, int]:
        """Host and port. Raises UsageError where no port is given."""
        if self.port is None:
            raise UsageError(f"{self.shown}: expected {self.scheme}://HOST:PORT")
        return self.host or default_host, self.port

    def socket_path(self) -> str:
        """Of a Unix socket. Raises UsageError where none is given, or a host."""
        if self.host or len(self.path) < 2:
            raise UsageError(f"{self.shown}: expected {self.scheme}:///PATH of a Unix socket")
        if len(os.fsencode(self.path)) > 107:
            raise UsageError(f"{self.shown}: a Unix socket's path has at most 107 bytes")
        return self.path

    def known_options(self, *names: str) -> dict[str, str]:
        """The options. Raises UsageError for one that is not among ``names``."""
        for name in self.options:
            if name not in names:
                expected = f"expected {', '.join(names)}" if names else f"{self.scheme} takes none"
                raise UsageError(f"{self.shown}: option {name!r} is unknown, {expected}")
        return self.options

    def whole(self, name: str, default: int) -> int:
        """An option as a whole number above 0. Raises UsageError."""
        text = self.options.get(name)
        if text is None:
            return default
        if not text.isascii() or not text.isdigit() or not 0 < int(text) < 1 << 31:
            raise UsageError(f"{self.shown}: {name} {text!r}, expected a whole number above 0")
        return int(text)


def place(text: str, schemes: tuple[str, ...]) -> Endpoint:
    """What ``text`` names. Raises UsageError for a scheme that is not among ``schemes``, or a port that is none."""
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
        return _mqtt(text, scheme)
    try:
        parts = urlsplit(text)
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        found = Endpoint(
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
    if scheme != "iio":  # whose host is a name that the kernel gives
        check_host(found.host, found.shown)
    _check_text(found.path, found.shown)
    check_options(options, found.shown)
    return found


def _mqtt(text: str, scheme: str) -> Endpoint:
    """A topic may hold # and %, which mean something else in other addresses; options stand after a ?."""
    url, _, query = text.partition("?")
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError as error:
        raise UsageError(f"{url}: not options ({error})") from None
    check_options(options, url)
    return Endpoint(url, scheme, "", None, "", options)


def check_host(host: str, shown: str) -> None:
    """Raises UsageError for a host that no resolver can be asked for: Python encodes each as IDNA (RFC 3490) when it
    connects or binds, which is in a thread or in the midst of a run, and raises no OSError."""
    try:
        host.encode("idna")
    except UnicodeError:
        raise UsageError(f"{shown}: {host[:80]!r} can't be a host; expected 1 to 63 characters between dots") from None


def _check_text(text: str, shown: str) -> None:
    """Raises UsageError for a zero byte, which %00 makes: the system would end a path there."""
    if "\0" in text:
        raise UsageError(f"{shown}: {text[:60]!r}: has a zero byte; expected a text without one")


def check_options(options: dict[str, str], shown: str) -> None:
    """Raises UsageError for a value that can't be right whatever the option means, and for a named pipe in a file's
    place, whose reader would wait for ever."""
    for name, value in options.items():
        _check_text(value, shown)
        if name.endswith("_file") and os.path.exists(value) and not os.path.isfile(value):
            raise UsageError(f"{shown}: {name} {value}: not a regular file; expected one")


def check_apart(output: str, read: Iterable[str]) -> None:
    """Raises UsageError where the output is a file that the run reads: opening it would empty it."""
    for path in read:
        with suppress(OSError, ValueError):
            if os.path.isfile(output) and os.path.samefile(output, path):
                raise UsageError(f"--output {output}: the run reads it ({path}); give another file")
