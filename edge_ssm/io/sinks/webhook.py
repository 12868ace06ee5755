"""A sink at a web server: lines by POST, many per request, delivered when the server answers 2xx."""

from __future__ import annotations

import contextlib
import http.client
import re
import ssl
from collections.abc import Mapping
from urllib.parse import parse_qsl, urlsplit

from edge_ssm import files
from edge_ssm.errors import UsageError
from edge_ssm.io.address import Endpoint, check_options
from edge_ssm.io.sinks.base import Transport
from edge_ssm.text import sanitize

_MAX_ANSWER = 1 << 16
"""Bytes of an answer that are read; their content is not used."""
_TEMPORARY = (408, 429)
"""Statuses of the 4xx class after which the same request may succeed later."""


class WebhookTransport(Transport):
    """Posts lines to a URL. Redirects are not followed.

    Parameters
    ----------
    url
        An http:// or https:// address.
    headers
        Additional headers of each request.
    token_file
        File whose first line is sent as bearer token; read again for each connection.
    ca_file
        Certificates to trust instead of the system's.
    timeout_s
        Seconds for each wait on the network.

    Raises UsageError for an argument that is not acceptable.
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
                raise UsageError(f"{url}: certificates {ca_file}: cannot be used ({error.strerror or error})") from None
        elif ca_file:
            raise UsageError(f"{url}: certificates are for https://, this is http://")
        self._connection: http.client.HTTPConnection | None = None
        self._has_delivered = False
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
        """Connect to the server, with the current token."""
        self.close()
        self._authorise()
        if self._tls is None:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        else:
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout_s, context=self._tls)
        connection.connect()
        self._connection, self._has_delivered = connection, False

    def send(self, lines: list[str]) -> None:
        """Post the lines. Raises OSError unless the server answers 2xx."""
        body = "".join(lines).encode()
        try:
            status, reason, location = self._post(body)
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            if not self._has_delivered:
                raise
            self.connect()  # Servers close idle connections, which does not mean that anything is wrong.
            status, reason, location = self._post(body)
        if 200 <= status < 300:
            self._has_delivered = True
            return
        self.close()
        answer = f"{status} {reason}"
        if 300 <= status < 400:
            to = f" to {location!r}" if location else ""
            raise OSError(f"the server redirects{to} ({answer}), which is not followed; use the new address")
        if 400 <= status < 500 and status not in _TEMPORARY:
            raise OSError(f"the server rejects it ({answer}); check the address, the token and the headers")
        raise OSError(f"the server cannot take it now ({answer})")

    def _post(self, body: bytes) -> tuple[int, str, str]:
        """Return the status, its reason, and the target of a redirect. Raises OSError."""
        connection = self._connection
        if connection is None:
            raise OSError("not connected")
        try:
            connection.request("POST", self._path, body, self._headers)
            answer = connection.getresponse()
            rest = answer.read(_MAX_ANSWER)
        except http.client.HTTPException as error:
            self.close()
            if isinstance(error, OSError):
                raise
            raise OSError(f"the answer is not HTTP ({type(error).__name__})") from None
        if len(rest) == _MAX_ANSWER:
            self._has_delivered = False
            connection.close()  # discards the rest of the answer; the next request reconnects
        return answer.status, sanitize(answer.reason, 80), (answer.getheader("Location") or "")[:200]

    def close(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.close()


def open_transport(endpoint: Endpoint) -> WebhookTransport:
    """Return the transport of ``http://`` or ``https://``. Raises UsageError.

    The options are in the fragment, which is never sent: ``#token_file=PATH&ca_file=PATH``.
    """
    url, _, fragment = endpoint.text.partition("#")
    options = dict(parse_qsl(fragment, keep_blank_values=True))
    if unknown := set(options) - {"token_file", "ca_file"}:
        raise UsageError(f"{url}: option {sorted(unknown)[0]!r} is unknown, expected token_file, ca_file after a #")
    check_options(options, url)
    return WebhookTransport(url, token_file=options.get("token_file"), ca_file=options.get("ca_file"))
