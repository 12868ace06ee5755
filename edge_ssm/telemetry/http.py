"""A run's status page, health and metrics over HTTP, for browsers and for Prometheus.

The server has threads of its own and withstands hostile clients: a request may have 8 KiB and take 5 seconds, the
number of connections at a time and per second is limited, and nothing that a client does reaches the pipeline.
"""

from __future__ import annotations

import base64
import hashlib
import io
import ipaddress
import json
import logging
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any

from edge_ssm import __version__
from edge_ssm.errors import UsageError
from edge_ssm.io import address as io_address
from edge_ssm.runtime.counters import PUBLISHED
from edge_ssm.telemetry import health, status_document
from edge_ssm.telemetry.prometheus import CONTENT_TYPE, Metrics
from edge_ssm.telemetry.publisher import StatusPublisher

logger = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("status_page.html")
COUNTERS_MARK = "/* COUNTERS */[]"
"""Stands in the page for the counters' declarations."""
MAX_HEAD_BYTES = 8192
"""Limit of a request: its line and its headers."""
HEAD_S, RESPONSE_S = 5.0, 5.0
"""Time limits for a whole request to arrive, and for a whole response to be received."""
MAX_CONNECTIONS = 16
"""At a time. One more closes the oldest, so that idle clients do not keep others out."""
PER_SECOND = 50
"""Connections per second, after a burst of as many. A response takes about a millisecond, in which the pipeline
may have to wait for Python's lock."""
MAX_FAULTS = 10
"""Errors in this module that are logged; later ones are not."""
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Connection": "close",
}


def parse_listen(listen: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT, [ADDRESS]:PORT or :PORT (on 127.0.0.1). Raises UsageError."""
    match = re.fullmatch(r"(?:\[([\w:.%]+)\]|([\w.-]*)):([0-9]{1,5})", listen, re.ASCII)
    if match is None or int(match[3]) > 65535:
        raise UsageError(
            f"listen {listen[:100]!r}: expected HOST:PORT, :PORT or [IPV6-ADDRESS]:PORT, as 127.0.0.1:9464"
        )
    host = match[1] or match[2] or io_address.LOOPBACK
    io_address.check_host(host, f"listen {listen[:100]!r}")
    return host, int(match[3])


class StatusServer:
    """A server that runs until ``close``."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        host, port = str(server.server_address[0]), server.server_address[1]
        self.address = f"[{host}]:{port}" if server.address_family == socket.AF_INET6 else f"{host}:{port}"
        """HOST:PORT; where port 0 was requested, the port that was free."""
        self._thread = threading.Thread(target=server.serve_forever, name="http", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Address of the status page."""
        return f"http://{self.address}/"

    def close(self) -> None:
        """Stop within a second; responses on their way are cut off."""
        self._server.shutdown()
        self._server.server_close()
        self._server.close_connections()
        self._thread.join(5)


def serve(publisher: StatusPublisher, listen: str, prometheus: bool, stuck_after_s: float = 10.0) -> StatusServer:
    """Serve a run's status at ``listen`` (see ``parse_listen``; port 0 is any free one); /metrics if ``prometheus``.

    ``/healthz`` reports 503 once the pipeline has not ticked for ``stuck_after_s`` seconds. Call this before the
    pipeline's thread gets a real-time priority, which the server's threads would inherit.

    Raises UsageError if the address is invalid, in use or not of this machine, or if prometheus-client is missing.
    """
    host, port = parse_listen(listen)
    metrics = Metrics(publisher) if prometheus else None
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return StatusServer(_Server(family, address, host, publisher, metrics, stuck_after_s))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no such host"
        raise UsageError(f"listen {listen!r}: {reason[0].lower()}{reason[1:]}") from None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_port = False
    request_queue_size = 64

    def __init__(
        self,
        family: int,
        address: Any,
        host: str,
        publisher: StatusPublisher,
        metrics: Metrics | None,
        stuck_after_s: float,
    ) -> None:
        self.address_family = family
        self.publisher = publisher
        self.metrics = metrics
        self.stuck_after_s = stuck_after_s
        self._open: dict[socket.socket, None] = {}
        self._lock = threading.Lock()
        self._credit, self._credited = float(PER_SECOND), time.monotonic()
        self._faults = 0
        super().__init__(address, _Handler)
        # DNS rebinding: a page from elsewhere whose host name has been made to point here still sends that name. If the
        # server accepts connections from other machines, it cannot know the names that it has there.
        bound = str(self.server_address[0])
        loopback = ipaddress.ip_address(bound.partition("%")[0]).is_loopback
        self.names = {"localhost", "127.0.0.1", "[::1]", host.lower(), bound, f"[{bound}]"} if loopback else None

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's asks the name service for this machine's name.

    def get_request(self) -> tuple[socket.socket, Any]:
        now = time.monotonic()
        self._credit = min(self._credit + (now - self._credited) * PER_SECOND, PER_SECOND) - 1
        self._credited = now
        if self._credit < 0:
            time.sleep(-self._credit / PER_SECOND)
        try:
            return super().get_request()
        except OSError:
            time.sleep(0.1)  # No descriptor is free: to retry at once would only use processor time.
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            oldest = next(iter(self._open)) if len(self._open) >= MAX_CONNECTIONS else None
            if oldest is not None:
                del self._open[oldest]
            self._open[request] = None
        if oldest is not None:
            _hang_up(oldest)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        """Hang up on every client."""
        with self._lock:
            left, self._open = list(self._open), {}
        for connection in left:
            _hang_up(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        # A connection that ended is not worth a line in the log.
        if isinstance(error, Exception) and not isinstance(error, OSError):
            self.fault(error)

    def fault(self, error: Exception) -> None:
        """Log an error in this module, the first few times."""
        self._faults += 1
        if self._faults <= MAX_FAULTS:
            logger.error("the status server failed", extra={"fields": {"error": repr(error)}})


def _hang_up(connection: socket.socket) -> None:
    """Wake the thread that waits for this connection; it then closes it."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        self.connection = self.request
        self.wfile = io.BytesIO()  # The response is sent as a whole.

    def handle(self) -> None:
        self.close_connection = True
        head = _head(self.connection)
        if head is None:
            return
        self.rfile = io.BytesIO(head)
        if not head.endswith(b"\n"):
            self.requestline, self.request_version, self.command = "", self.protocol_version, ""
            self.send_error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            return
        self.raw_requestline = self.rfile.readline()
        if self.parse_request():
            try:
                self._respond()
            except Exception as error:  # The client must not see a traceback, nor other clients be affected.
                self.server.fault(error)
                self.wfile = io.BytesIO()
                self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR)

    def finish(self) -> None:
        self.connection.settimeout(RESPONSE_S)
        self.connection.sendall(self.wfile.getvalue())  # type: ignore[attr-defined]

    def handle_expect_100(self) -> bool:
        return True  # No request needs a body.

    def _respond(self) -> None:
        if self.command not in ("GET", "HEAD"):
            self.send_error(HTTPStatus.METHOD_NOT_ALLOWED)
            return
        names = self.server.names
        if names is not None and _name(self.headers.get("Host", "")) not in names:
            self._send(
                HTTPStatus.FORBIDDEN, "text/plain", b"this server answers on this machine only, not for that Host\n"
            )
            return
        path, _, query = self.path.partition("?")
        respond = _PATHS.get(path)
        if respond is None:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", f"not found; expected one of {', '.join(_PATHS)}\n".encode())
            return
        self._send(*respond(self.server, query))

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        policy = _page()[1] if kind.startswith("text/html") else "default-src 'none'; frame-ancestors 'none'"
        self.send_header("Content-Security-Policy", policy)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send an error. The standard library's page would repeat what the client sent."""
        status = HTTPStatus(code)
        self._send(status, "text/plain", f"{status.phrase}\n".encode())

    def version_string(self) -> str:
        return f"edge-ssm/{__version__}"

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: there is a scrape every few seconds."""


def _head(connection: socket.socket) -> bytes | None:
    """Read the request's line and headers.

    Return None if they do not arrive in time; without a line end if they are too long.
    """
    head, end_time = b"", time.monotonic() + HEAD_S
    while len(head) < MAX_HEAD_BYTES:
        # A limit for each read alone would let a client that sends a byte per second stay for ever.
        left = end_time - time.monotonic()
        if left <= 0:
            return None
        connection.settimeout(left)
        try:
            data = connection.recv(MAX_HEAD_BYTES - len(head))
        except OSError:
            return None
        if not data:
            return None
        head += data
        end = re.search(rb"\r?\n\r?\n", head)
        if end:
            return head[: end.end()]
    return head.rstrip(b"\r\n")


def _name(host: str) -> str:
    """Return the name in a Host header, without its port."""
    return re.sub(r":[0-9]*$", "", host.strip().lower(), flags=re.ASCII)


Response = tuple[HTTPStatus, str, bytes]
"""Status, content type, body."""


@cache
def _page() -> tuple[bytes, str]:
    """Return the status page, and its content security policy: only its own script and style are allowed."""
    rows = [(each.name, each.row, each.prefix) for each in PUBLISHED if each.row]
    text = PAGE.read_text(encoding="utf-8").replace(COUNTERS_MARK, json.dumps(rows))

    def digest(tag: str) -> str:
        inner = text.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy


def _root(server: _Server, query: str) -> Response:
    return HTTPStatus.OK, "text/html; charset=utf-8", _page()[0]


def _status(server: _Server, query: str) -> Response:
    since = re.fullmatch(r"since=(\d{1,12}(?:\.\d{1,9})?)", query, re.ASCII)
    body = status_document.encode(server.publisher, server.stuck_after_s, float(since[1]) if since else 0.0)
    return HTTPStatus.OK, "application/json", body


def _metrics(server: _Server, query: str) -> Response:
    if server.metrics is None:
        return (
            HTTPStatus.NOT_FOUND,
            "text/plain",
            b"metrics are off; turn them on with metrics.prometheus in the configuration, or --prometheus\n",
        )
    return HTTPStatus.OK, CONTENT_TYPE, server.metrics.text()


def _health(server: _Server, query: str) -> Response:
    return _verdict(health.why_unhealthy(server.publisher.status(), server.stuck_after_s))


def _ready(server: _Server, query: str) -> Response:
    return _verdict(health.why_unready(server.publisher.status()))


def _verdict(problem: str) -> Response:
    status = HTTPStatus.SERVICE_UNAVAILABLE if problem else HTTPStatus.OK
    return status, "text/plain; charset=utf-8", f"{problem or 'ok'}\n".encode()


_PATHS: dict[str, Callable[[_Server, str], Response]] = {
    "/": _root,
    "/status.json": _status,
    "/metrics": _metrics,
    "/healthz": _health,
    "/readyz": _ready,
}
