"""Webhooks, with a real HTTP server on loopback."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from edge_ssm.errors import UsageError
from edge_ssm.io.sinks.webhook import WebhookTransport


class Server(ThreadingHTTPServer):
    """Answers with ``answers`` in turn, then 204; keeps the requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests, self.connections = [], [], 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/in?x=1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def get_request(self):
        self.connections += 1
        return super().get_request()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.requests.append((self.path, dict(self.headers), body))
        answer = self.server.answers.pop(0) if self.server.answers else 204
        if answer == "close":
            self.close_connection = True
            answer = 204
        elif answer == "hang":
            threading.Event().wait(2)
            return
        elif answer == "junk":
            self.wfile.write(b"\x00\x01 junk\r\n\r\n")
            self.close_connection = True
            return
        elif answer == "long":
            self.send_response(200)
            self.send_header("Content-Length", str(1 << 20))
            self.end_headers()
            self.wfile.write(bytes(1 << 20))
            return
        self.send_response(answer)
        self.send_header("Content-Length", "0")
        if 300 <= answer < 400:
            self.send_header("Location", "http://elsewhere.invalid/in")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def open_transport(server, **options):
    transport = WebhookTransport(server.url, **options)
    transport.connect()
    return transport


def test_a_batch_is_one_request_on_one_connection(server, tmp_path):
    token = tmp_path / "token"
    token.write_text("abc\n")
    transport = open_transport(server, headers={"X-Device": "d1"}, token_file=str(token))
    transport.send(['{"a":1}\n', '{"b":"\u00e9"}\n'])
    transport.send(['{"c":1}\n'])
    transport.close()
    (path, headers, body), (_, _, second) = server.requests
    assert (path, body, second) == ("/in?x=1", '{"a":1}\n{"b":"\u00e9"}\n', '{"c":1}\n')
    assert headers["Content-Type"] == "application/x-ndjson"
    assert headers["X-Device"] == "d1"
    assert headers["Authorization"] == "Bearer abc"
    assert server.connections == 1


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (404, r"rejects it \(404 Not Found\); check the address"),
        (401, r"rejects it \(401 Unauthorized\)"),
        (429, r"cannot take it now \(429 Too Many Requests\)"),
        (503, r"cannot take it now \(503 Service Unavailable\)"),
        (307, r"redirects to 'http://elsewhere\.invalid/in' \(307 Temporary Redirect\), which is not followed"),
        ("junk", "the answer is not HTTP"),
        ("hang", "timed out"),
    ],
)
def test_a_rejected_request_is_an_error_and_can_be_repeated(server, answer, problem):
    server.answers = [answer]
    transport = open_transport(server, timeout_s=0.5)
    with pytest.raises(OSError, match=problem):
        transport.send(["1\n"])
    transport.connect()
    transport.send(["1\n"])
    assert [body for *_, body in server.requests] == ["1\n", "1\n"]
    transport.close()


def test_a_connection_closed_while_idle_is_restored(server):
    server.answers = ["close"]
    transport = open_transport(server)
    for k in range(3):
        transport.send([f"{k}\n"])
    assert [body for *_, body in server.requests] == ["0\n", "1\n", "2\n"]
    assert server.connections == 2
    transport.close()


def test_an_endless_answer_is_cut_off(server):
    server.answers = ["long"]
    transport = open_transport(server)
    transport.send(["1\n"])
    transport.send(["2\n"])
    assert len(server.requests) == 2
    transport.close()


def test_no_server_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    transport = WebhookTransport(f"http://127.0.0.1:{port}")
    with pytest.raises(OSError, match="refused"):
        transport.connect()
    with pytest.raises(OSError, match="not connected"):
        transport.send(["1\n"])


@pytest.mark.parametrize(
    ("url", "options", "problem"),
    [
        ("ftp://h/x", {}, "expected http://host"),
        ("http:///x", {}, "expected http://host"),
        ("http://h:x/", {}, "not an address"),
        ("http://h/a b", {}, "percent-encoded"),
        ("http://u:secret@h/", {}, "do not belong in the address"),
        ("http://h/", {"headers": {"A": "b\r\nC: d"}}, "header 'A'"),
        ("http://h/", {"ca_file": "x"}, "certificates are for https"),
        ("https://h/", {"ca_file": "/nowhere/x"}, "certificates /nowhere/x: cannot be used"),
        ("http://h/", {"token_file": "/nowhere/x"}, "token file /nowhere/x: cannot be read"),
    ],
)
def test_invalid_arguments_are_refused(url, options, problem):
    with pytest.raises(UsageError, match=problem) as caught:
        WebhookTransport(url, **options)
    assert "secret" not in str(caught.value)
