"""A run's status page, health and metrics over HTTP, for a browser beside the device and for Prometheus.

A server of its own thread that can be let stand in a hostile network: a request is at most 8 KiB and 5 seconds, few are
answered at a time and a second, and nothing that a client does reaches the loop.
"""

from __future__ import annotations

import base64
import hashlib
import io
import ipaddress
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

from edge_ssm import __version__, journal
from edge_ssm.errors import UsageError
from edge_ssm.io import address as io_address
from edge_ssm.telemetry.health import unhealthy, unready
from edge_ssm.telemetry.prometheus import CONTENT_TYPE, Metrics
from edge_ssm.telemetry.publisher import StatusPublisher
from edge_ssm.telemetry.status_document import document

PAGE = Path(__file__).with_name("status_page.html")
HEAD_BYTES = 8192
"""Most of a request: its line and its headers."""
HEAD_S, ANSWER_S = 5.0, 5.0
"""For a whole request to arrive, and for a whole answer to be taken."""
CONNECTIONS = 16
"""At a time. One more closes the oldest, so that clients who only hold on keep nobody out."""
PER_SECOND = 50
"""Connections, after as many at once: each answer costs about a millisecond in which the loop may wait for Python."""
FAULTS = 10
"""Of this module that are told of before it falls silent."""
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Connection": "close",
}


def parse_listen(listen: str) -> tuple[str, int]:
    """HOST:PORT, [ADDRESS]:PORT or :PORT (of 127.0.0.1) as host and port. Raises UsageError."""
    found = re.fullmatch(r"(?:\[([\w:.%]+)\]|([\w.-]*)):([0-9]{1,5})", listen, re.ASCII)
    if found is None or int(found[3]) > 65535:
        raise UsageError(
            f"listen {listen[:100]!r}: expected HOST:PORT, :PORT or [IPV6-ADDRESS]:PORT, as 127.0.0.1:9464"
        )
    host = found[1] or found[2] or io_address.LOOPBACK
    io_address.check_host(host, f"listen {listen[:100]!r}")
    return host, int(found[3])


class Web:
    """A server that answers until ``close``."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        host, port = str(server.server_address[0]), server.server_address[1]
        self.address = f"[{host}]:{port}" if server.address_family == socket.AF_INET6 else f"{host}:{port}"
        """HOST:PORT, the port being the real one where 0 was asked for."""
        self._thread = threading.Thread(target=server.serve_forever, name="web", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://{self.address}/"

    def close(self) -> None:
        """Within a second; answers on their way are cut off."""
        self._server.shutdown()
        self._server.server_close()
        self._server.close_connections()
        self._thread.join(5)


def serve(live: StatusPublisher, listen: str, prometheus: bool, stuck_after_s: float = 10.0) -> Web:
    """Serve ``live`` at ``listen`` (``parse_listen``; port 0: any that is free), /metrics with ``prometheus``.

    ``stuck_after_s``: how long the loop may not go round before /healthz says 503. To be called before the loop's
    thread takes a real-time priority, which the server's threads would inherit.

    Raises UsageError: an address that is none, is taken or is not this machine's; prometheus-client missing.
    """
    host, port = parse_listen(listen)
    metrics = Metrics(live) if prometheus else None
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return Web(_Server(family, address, host, live, metrics, stuck_after_s))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no such host"
        raise UsageError(f"listen {listen!r}: {reason[0].lower()}{reason[1:]}") from None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_port = False
    request_queue_size = 64

    def __init__(
        self, family: int, address: Any, host: str, live: StatusPublisher, metrics: Metrics | None, stuck_after_s: float
    ) -> None:
        self.address_family = family
        self.live = live
        self.metrics = metrics
        self.stuck_after_s = stuck_after_s
        self._open: dict[socket.socket, None] = {}
        self._lock = threading.Lock()
        self._credit, self._credited = float(PER_SECOND), time.monotonic()
        self._faults = 0
        super().__init__(address, _Handler)
        # A page of somewhere else, whose name was made to point here (DNS rebinding), still asks for that name. Where
        # others may come in anyway the server can't know its names.
        bound = str(self.server_address[0])
        loopback = ipaddress.ip_address(bound.partition("%")[0]).is_loopback
        self.names = {"localhost", "127.0.0.1", "[::1]", host.lower(), bound, f"[{bound}]"} if loopback else None

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's would ask the name service for this machine's name.

    def get_request(self) -> tuple[socket.socket, Any]:
        now = time.monotonic()
        self._credit = min(self._credit + (now - self._credited) * PER_SECOND, PER_SECOND) - 1
        self._credited = now
        if self._credit < 0:
            time.sleep(-self._credit / PER_SECOND)
        try:
            return super().get_request()
        except OSError:
            time.sleep(0.1)  # No descriptor is left: trying again at once would only burn the processor.
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            oldest = next(iter(self._open)) if len(self._open) >= CONNECTIONS else None
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
        with self._lock:
            left, self._open = list(self._open), {}
        for connection in left:
            _hang_up(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        # A connection's end is no news.
        if isinstance(error, Exception) and not isinstance(error, OSError):
            self.fault(error)

    def fault(self, error: Exception) -> None:
        self._faults += 1
        if self._faults <= FAULTS:
            journal.log("error", "the status server failed", error=repr(error))


def _hang_up(connection: socket.socket) -> None:
    """Wakes the thread that waits for it, which then closes it."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        self.connection = self.request
        self.wfile = io.BytesIO()  # One answer, sent as a whole.

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
                self._answer()
            except Exception as error:  # A client must see no traceback, and no other client must notice.
                self.server.fault(error)
                self.wfile = io.BytesIO()
                self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR)

    def finish(self) -> None:
        self.connection.settimeout(ANSWER_S)
        self.connection.sendall(self.wfile.getvalue())  # type: ignore[attr-defined]

    def handle_expect_100(self) -> bool:
        return True  # No answer needs a body.

    def _answer(self) -> None:
        if self.command not in ("GET", "HEAD"):
            self.send_error(HTTPStatus.METHOD_NOT_ALLOWED)
            return
        names = self.server.names
        if names is not None and _name(self.headers.get("Host", "")) not in names:
            self._send(
                HTTPStatus.FORBIDDEN, "text/plain", b"this server answers on this machine only: not for that Host\n"
            )
            return
        path, _, query = self.path.partition("?")
        answer = _PATHS.get(path)
        if answer is None:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", f"not here; there are {', '.join(_PATHS)}\n".encode())
            return
        self._send(*answer(self.server, query))

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
        """The standard library's would repeat what the client sent."""
        status = HTTPStatus(code)
        self._send(status, "text/plain", f"{status.phrase}\n".encode())

    def version_string(self) -> str:
        return f"edge-ssm/{__version__}"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a scrape every few seconds is no news."""


def _head(connection: socket.socket) -> bytes | None:
    """The request's line and headers; cut off without a line's end if they are too long; None: they did not come."""
    head, until = b"", time.monotonic() + HEAD_S
    while len(head) < HEAD_BYTES:
        # A limit for each read alone would let one byte a second hold on for ever.
        left = until - time.monotonic()
        if left <= 0:
            return None
        connection.settimeout(left)
        try:
            data = connection.recv(HEAD_BYTES - len(head))
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
    """Of a Host header, without its port."""
    return re.sub(r":[0-9]*$", "", host.strip().lower(), flags=re.ASCII)


Answer = tuple[HTTPStatus, str, bytes]


@cache
def _page() -> tuple[bytes, str]:
    """The status page and its policy: its own script and style, nothing from anywhere else."""
    text = PAGE.read_text(encoding="utf-8")

    def digest(tag: str) -> str:
        inner = text.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy


def _root(server: _Server, query: str) -> Answer:
    return HTTPStatus.OK, "text/html; charset=utf-8", _page()[0]


def _status(server: _Server, query: str) -> Answer:
    since = re.fullmatch(r"since=(\d{1,12}(?:\.\d{1,9})?)", query, re.ASCII)
    body = document(server.live, server.stuck_after_s, float(since[1]) if since else 0.0)
    return HTTPStatus.OK, "application/json", body


def _metrics(server: _Server, query: str) -> Answer:
    if server.metrics is None:
        return HTTPStatus.NOT_FOUND, "text/plain", b"metrics are off; the configuration turns them on\n"
    return HTTPStatus.OK, CONTENT_TYPE, server.metrics.text()


def _health(server: _Server, query: str) -> Answer:
    return _said(unhealthy(server.live.status(), server.stuck_after_s))


def _ready(server: _Server, query: str) -> Answer:
    return _said(unready(server.live.status()))


def _said(problem: str) -> Answer:
    status = HTTPStatus.SERVICE_UNAVAILABLE if problem else HTTPStatus.OK
    return status, "text/plain; charset=utf-8", f"{problem or 'ok'}\n".encode()


_PATHS: dict[str, Callable[[_Server, str], Answer]] = {
    "/": _root,
    "/status.json": _status,
    "/metrics": _metrics,
    "/healthz": _health,
    "/readyz": _ready,
}
