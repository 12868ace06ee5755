"""Decisions to a web server: NDJSON by POST, a batch in one request, delivered when the server answers 2xx."""

from __future__ import annotations

import contextlib
import http.client
import re
import ssl
from collections.abc import Mapping
from urllib.parse import urlsplit

from edge_ssm import files
from edge_ssm.errors import UsageError
from edge_ssm.io.sinks.base import Transport
from edge_ssm.text import sanitize

_MOST_ANSWER = 1 << 16
"""Bytes of an answer that are read; none of them is used."""
_RETRY = (408, 429)


class WebhookTransport(Transport):
    """url: http:// or https://. headers: sent along as they are. token_file: its first line goes out as bearer token,
    read anew for every connection. ca_file: certificates that are trusted in place of the system's. timeout_s: for each
    wait on the network.

    Redirects are not followed: decisions go where they were sent. Raises UsageError for what can't be right.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        token_file: str | None = None,
        ca_file: str | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        self.name = url
        try:
            parts = urlsplit(url)
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError:
            raise UsageError(f"{url[:200]}: not an address; expected http://host[:port]/path or https://") from None
        if parts.username is not None or parts.password is not None:
            raise UsageError(f"{parts.scheme}://...@{self._host}: user and password do not belong in the address")
        if parts.scheme not in ("http", "https") or not self._host or not re.fullmatch(r"[!-~]+", url):
            raise UsageError(f"{url[:200]!r}: expected http://host[:port]/path or https://, percent-encoded")
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._headers = {"Content-Type": "application/x-ndjson", "User-Agent": "edge-ssm", **(headers or {})}
        for name, value in self._headers.items():
            if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or not re.fullmatch(r"[\t -~]*", value):
                raise UsageError(f"{url}: header {name!r}: expected a name and printable ASCII")
        self._token_file, self._timeout_s = token_file, timeout_s
        self._tls: ssl.SSLContext | None = None
        if parts.scheme == "https":
            try:
                self._tls = ssl.create_default_context(cafile=ca_file)
            except OSError as error:
                raise UsageError(f"{url}: certificates {ca_file}: can't be used ({error.strerror or error})") from None
        elif ca_file:
            raise UsageError(f"{url}: certificates are for https://, this is http://")
        self._connection: http.client.HTTPConnection | None = None
        self._used = False
        try:
            self._authorise()
        except OSError as error:
            raise UsageError(f"{url}: {error}") from None

    def _authorise(self) -> None:
        if self._token_file is None:
            return
        try:
            token = files.read_first_line(self._token_file).strip()
        except OSError as error:
            raise OSError(f"token file {self._token_file}: {files.read_problem(error)}") from None
        if not re.fullmatch(r"[!-~]+", token):
            raise OSError(f"token file {self._token_file}: expected a token of printable ASCII in its first line")
        self._headers["Authorization"] = f"Bearer {token}"

    def connect(self) -> None:
        self.close()
        self._authorise()
        if self._tls is None:
            made = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        else:
            made = http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout_s, context=self._tls)
        made.connect()
        self._connection, self._used = made, False

    def send(self, lines: list[str]) -> None:
        body = "".join(lines).encode()
        try:
            status, reason, location = self._post(body)
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            if not self._used:
                raise
            self.connect()  # servers close a connection that was idle; this tells nothing about the server
            status, reason, location = self._post(body)
        if 200 <= status < 300:
            self._used = True
            return
        self.close()
        said = f"{status} {reason}"
        if 300 <= status < 400:
            to = f" to {location!r}" if location else ""
            raise OSError(f"the server redirects{to} ({said}), which is not followed; give the address it redirects to")
        if 400 <= status < 500 and status not in _RETRY:
            raise OSError(f"the server does not take it ({said}); check the address, the token and the headers")
        raise OSError(f"the server can't take it now ({said})")

    def _post(self, body: bytes) -> tuple[int, str, str]:
        """Status, its reason and where a redirect points. Raises OSError."""
        connection = self._connection
        if connection is None:
            raise OSError("not connected")
        try:
            connection.request("POST", self._path, body, self._headers)
            answer = connection.getresponse()
            rest = answer.read(_MOST_ANSWER)
        except http.client.HTTPException as error:
            self.close()
            if isinstance(error, OSError):
                raise
            raise OSError(f"the answer is no HTTP ({type(error).__name__})") from None
        if len(rest) == _MOST_ANSWER:
            self._used = False
            connection.close()  # the rest of the answer goes with it; the next request opens anew
        return answer.status, sanitize(answer.reason, 80), (answer.getheader("Location") or "")[:200]

    def close(self) -> None:
        made, self._connection = self._connection, None
        if made is not None:
            with contextlib.suppress(OSError):
                made.close()
