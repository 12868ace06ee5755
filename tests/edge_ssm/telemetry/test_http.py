"""The status server as its clients see it: browsers, probes, and attackers."""

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT
from support.browser import browse
from support.networks import random_network
from support.watched import Watched, demo, rows

from edge_ssm import log
from edge_ssm.errors import UsageError
from edge_ssm.io.messages import Event
from edge_ssm.telemetry import http as telemetry_http
from edge_ssm.telemetry.http import parse_listen, serve


@pytest.fixture(scope="module")
def run():
    with demo(hz=2000, hop=50) as run:
        yield run.until(5)


@pytest.fixture(scope="module")
def server(run):
    with contextlib.closing(serve(run.publisher, ":0", prometheus=True)) as server:
        yield server


@contextlib.contextmanager
def serving(run, listen=":0", **options):
    with contextlib.closing(serve(run.publisher, listen, options.pop("prometheus", False), **options)) as server:
        yield server


def ask(server, path, method="GET", **headers):
    host, _, port = server.address.rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=20)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()


def raw(server, data, timeout=20.0):
    """Send bytes; return everything that comes back."""
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=timeout) as connection:
        with contextlib.suppress(OSError):  # It may have been hung up on already.
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        received = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                received += part
        return received


def test_the_page_is_self_contained_and_runs_nothing_else(server):
    status, headers, body = ask(server, "/")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in policy
    text = body.decode()
    assert re.findall(r'(?:src|href)="(?!data:,|/status.json)', text) == []
    assert re.findall(r"innerHTML|insertAdjacentHTML|document\.write|\beval\b| style=| on\w+=", text) == []
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("path", ["/", "/status.json", "/metrics", "/healthz", "/readyz", "/nowhere"])
def test_every_response_has_security_headers_and_is_not_cached(server, path):
    status, headers, body = ask(server, path)
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "Access-Control-Allow-Origin" not in headers
    same, lengths, nothing = ask(server, path, "HEAD")
    assert (same, nothing) == (status, b"")
    assert int(lengths["Content-Length"]) > 0
    assert int(headers["Content-Length"]) == len(body)


def test_the_status_describes_the_run(run, server):
    run.publisher.event(Event("reset", 17, {"reason": "gap"}))
    document = json.loads(ask(server, "/status.json")[2])
    assert document["status"]["model_digest"] == run.info.model_digest
    assert document["unhealthy"] == document["unready"] == ""
    assert 0 < document["status"]["samples"] <= run.counters.samples
    assert [d["index"] for d in document["decisions"]] == sorted(d["index"] for d in document["decisions"])
    last = document["decisions"][-1]
    assert last["end"] - last["start"] == 200
    assert last["label"] in document["status"]["labels"]
    assert 0 <= last["score"] <= 1
    assert document["events"][-1][1] == "sample 17: reset (reason gap)"
    assert sum(n for _, n in document["latency"]["buckets"]) <= run.counters.latency.count


def test_history_can_be_requested_from_a_time_on(run, server):
    end = time.monotonic() + 20
    while len(run.publisher.history()) < 3:
        assert time.monotonic() < end
        time.sleep(0.1)
    whole = json.loads(ask(server, "/status.json")[2])["history"]
    newer = json.loads(ask(server, f"/status.json?since={whole[1][0]:.6f}")[2])["history"]
    assert whole[2] in newer
    assert whole[0] not in newer
    for nonsense in ("since=x", "since=1e999", "since=-1", "since=1&since=2", "%"):
        assert json.loads(ask(server, f"/status.json?{nonsense}")[2])["history"][0] == whole[0]


def test_texts_from_sensors_and_models_are_cut_and_sendable():
    network = random_network(window=5)
    object.__setattr__(network, "labels", ("x" * 5000, "\ud800", "</script><b>"))
    with Watched(network, rows(network), model="\udcff") as run, serving(run) as server:
        run.until(50)
        status, _, body = ask(server, "/status.json")
    assert status == 200
    assert {d["label"] for d in json.loads(body)["decisions"]} <= {"x" * 200 + "...", "?", "</script><b>"}
    assert len(body) < 100_000


def test_values_of_a_regression_are_shown():
    network = random_network(window=5, task="regression")
    with Watched(network, rows(network)) as run, serving(run) as server:
        run.until(5)
        last = json.loads(ask(server, "/status.json")[2])["decisions"][-1]
    assert len(last["value"]) == 3
    assert "label" not in last


def test_metrics_are_off_unless_asked_for(run, server):
    assert ask(server, "/metrics")[1]["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert b"edge_ssm_samples_total" in ask(server, "/metrics")[2]
    with serving(run) as plain:
        status, _, body = ask(plain, "/metrics")
    assert (status, body) == (
        404,
        b"metrics are off; turn them on with metrics.prometheus in the configuration, or --prometheus\n",
    )


def test_a_stuck_pipeline_is_unhealthy():
    with demo(hz=500) as run, serving(run, stuck_after_s=0.5) as server:
        run.until(1)
        assert ask(server, "/healthz")[::2] == (200, b"ok\n")
        run.stop.set()
        time.sleep(0.8)
        status, _, body = ask(server, "/healthz")
        assert status == 503
        problem = r"the loop has not run for \d+\.\d s \(limit 0\.5 s\)"
        assert re.fullmatch(f"{problem}\n", body.decode())
        assert re.fullmatch(problem, json.loads(ask(server, "/status.json")[2])["unhealthy"])


def test_ready_means_that_decisions_can_be_expected():
    network = random_network(window=5)
    run = Watched(network, rows(network))
    with serving(run) as server:
        assert ask(server, "/readyz")[::2] == (
            503,
            b"not ready: the model is not loaded or the source is not open yet\n",
        )
        run.info.ready = True
        for state, expected in [("waiting", 200), ("flowing", 200), ("stale", 503), ("lost", 503)]:
            run.info.source_state = state
            assert ask(server, "/readyz")[0] == expected
        assert ask(server, "/readyz")[2] == b"source recording: no connection\n"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "__class__", "get"])
def test_other_methods_are_refused(server, method):
    status, headers, body = ask(server, "/", method)
    assert (status, headers["Allow"], body) == (405, "GET, HEAD", b"Method Not Allowed\n")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("127.0.0.1:9", 200),
        ("[::1]:9", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.", 403),
        ("", 403),
        ("localhost:80:80", 403),
    ],
)
def test_on_loopback_only_its_own_names_are_answered(server, host, expected):
    assert ask(server, "/status.json", Host=host)[0] == expected


def test_on_other_addresses_any_host_name_is_answered(run):
    with serving(run, "0.0.0.0:0") as server:
        assert ask(server, "/healthz", Host="device.example")[0] == 200


def test_it_listens_on_loopback_unless_told_otherwise(server):
    host, _, port = server.address.rpartition(":")
    assert host == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{port}/"


def test_ipv6(run):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with serving(run, "[::1]:0") as server:
        assert server.address.startswith("[::1]:")
        assert ask(server, "/healthz")[0] == 200


@pytest.mark.parametrize(
    "listen",
    [
        "",
        "9464",
        "localhost",
        ":",
        ":x",
        ":65536",
        ":-1",
        "a:b:1",
        "::1:80",
        "[::1]",
        "[x:1",
        "http://x:1",
        "a b:1",
        "a\0:1",
    ],
)
def test_an_invalid_address_is_refused_in_one_line(listen):
    with pytest.raises(UsageError, match=r"listen .*: expected HOST:PORT") as refused:
        parse_listen(listen)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("host", ["a..b", "a" * 64])
def test_a_host_that_no_resolver_takes_is_refused_before_it_is_asked(host):
    with pytest.raises(UsageError, match="is not a host; expected 1 to 63 characters between dots"):
        parse_listen(f"{host}:80")


@given(st.one_of(st.text(), st.from_regex(r"\[?[\w:.%]*\]?:[0-9]*")))
def test_any_text_is_an_address_or_refused(listen):
    try:
        host, port = parse_listen(listen)
    except UsageError as refused:
        assert str(refused).isprintable()
    else:
        assert host
        assert 0 <= port <= 65535


def test_an_address_that_is_taken_or_not_here_is_refused(run, server):
    for listen, why in [
        (server.address, "address already in use"),
        ("192.0.2.1:0", "cannot assign requested address"),
        ("nowhere.invalid:0", ""),
        (f"{'a' * 70}.b:0", ""),
    ]:
        with pytest.raises(UsageError, match=f"^listen '{re.escape(listen)}': {why}"):
            serve(run.publisher, listen, prometheus=False)


def test_a_port_is_free_again_after_close(run):
    with serving(run) as server:
        ask(server, "/healthz")
    with serving(run, server.address):
        pass


STRANGE = [
    b"\r\n\r\n",
    b"\0" * 100 + b"\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 500 + b"\r\n",
    b"GET //[ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
    b"GET /" + b"a" * 100_000,
    b"GET / HTTP/1.1\r\nA: " + b"b" * 1_000_000,
]


@pytest.fixture(scope="module")
def hurried():
    """Let fuzzing send more than fifty requests per second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(telemetry_http, "PER_SECOND", 5000)
        yield


@settings(max_examples=150)
@given(
    st.one_of(
        st.binary(max_size=300),
        st.builds(
            lambda start, headers: start + b"\r\n" + b"\r\n".join(headers) + b"\r\n\r\n",
            st.sampled_from(
                [b"GET / HTTP/1.1", b"HEAD /status.json HTTP/1.0", b"GET /healthz", b"GET /metrics HTTP/1.1"]
            ),
            st.lists(st.binary(max_size=60), max_size=5),
        ),
    )
)
def test_any_bytes_are_answered_or_hung_up_on(server, hurried, data):
    received = raw(server, data)
    assert b"Traceback" not in received
    assert b"Internal Server Error" not in received
    assert server._server._faults == 0


@pytest.mark.parametrize("data", STRANGE)
def test_strange_requests_are_answered_or_hung_up_on(server, data):
    received = raw(server, data)
    assert re.fullmatch(rb"(HTTP/1\.1 (200|4\d\d|505) .*)?|[A-Z][ A-Za-z]+\n", received, re.S)
    assert b"Traceback" not in received
    assert ask(server, "/healthz")[0] == 200


def test_a_request_that_is_too_long_gets_an_error_response(server):
    received = raw(server, b"GET / HTTP/1.1\r\nA: " + b"b" * (telemetry_http.MAX_HEAD_BYTES - 19))
    assert received.startswith(b"HTTP/1.1 431 ")


def test_a_client_that_sends_a_byte_at_a_time_is_hung_up_on(run, monkeypatch):
    monkeypatch.setattr(telemetry_http, "HEAD_S", 0.6)
    with serving(run) as server:
        host, _, port = server.address.rpartition(":")
        began = time.monotonic()
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            with contextlib.suppress(ConnectionError):
                while time.monotonic() < began + 10 and not _closed(connection):
                    connection.send(b"G")
                    time.sleep(0.05)
            assert 0.5 < time.monotonic() - began < 3


def _closed(connection):
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False


def test_a_client_that_never_takes_its_answer_is_hung_up_on(run, monkeypatch):
    monkeypatch.setattr(telemetry_http, "RESPONSE_S", 0.5)
    monkeypatch.setattr(telemetry_http, "_page", lambda: (b"x" * 20_000_000, "default-src 'none'"))
    with serving(run) as server:
        host, _, port = server.address.rpartition(":")
        threads = threading.active_count()
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            end = time.monotonic() + 10
            time.sleep(0.2)
            while threading.active_count() > threads:
                assert time.monotonic() < end
                time.sleep(0.05)


def test_two_hundred_idle_connections_neither_block_others_nor_cost_memory(run):
    with serving(run) as server, contextlib.ExitStack() as stack:
        host, _, port = server.address.rpartition(":")
        ask(server, "/status.json")
        process, samples = psutil.Process(), run.counters.samples
        before = process.memory_info().rss
        for _ in range(200):
            idle = stack.enter_context(socket.create_connection((host, int(port)), timeout=20))
            with contextlib.suppress(OSError):  # It may be the oldest by now.
                idle.sendall(b"GET / HT")
        began = time.monotonic()
        assert ask(server, "/healthz")[0] == 200
        assert time.monotonic() - began < 8
        assert (
            sum(thread.name.startswith("Thread") for thread in threading.enumerate())
            < 2 * telemetry_http.MAX_CONNECTIONS
        )
        # The clients' own sockets are in it too.
        assert process.memory_info().rss - before < 8 << 20
        assert run.counters.samples > samples
    assert run.publisher.status().loop_age_s < 1


FLOOD = """
import socket, sys
while True:
    try:
        with socket.create_connection((sys.argv[1], int(sys.argv[2])), 5) as connection:
            connection.sendall(b"GET /status.json HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
            while connection.recv(65536):
                pass
    except OSError:
        pass
"""


@pytest.mark.slow
def test_a_flood_of_requests_does_not_stop_the_loop():
    """The pipeline keeps its rate while clients send as many requests as they can; they get what the limit allows."""
    with demo(hz=500, hop=50, engine="cpu") as run, serving(run) as server:
        run.until(1)
        lengths, close = [], server._server.shutdown_request
        server._server.shutdown_request = lambda request: (lengths.append(1), close(request))
        command = [sys.executable, "-c", FLOOD, *server.address.split(":")]
        clients = [subprocess.Popen(command) for _ in range(3)]
        try:
            time.sleep(1)
            samples, answered, began = run.counters.samples, len(lengths), time.monotonic()
            time.sleep(3)
            seconds = time.monotonic() - began
            assert run.counters.samples - samples > 0.9 * 500 * seconds
            assert 0 < len(lengths) - answered < 1.2 * telemetry_http.PER_SECOND * seconds
            assert run.publisher.status().loop_age_s < 1
        finally:
            for client in clients:
                client.kill()
                client.wait()


@pytest.mark.slow
def test_responses_do_not_leak_memory(run):
    with serving(run, prometheus=True) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(telemetry_http, "PER_SECOND", 5000)
        grown = []
        for _ in range(4):
            for path in ("/status.json", "/metrics", "/", "/nowhere") * 40:
                ask(server, path)
            grown.append(psutil.Process().memory_info().rss)
    assert grown[-1] - grown[1] < 2 << 20


def test_an_error_in_the_server_is_logged_and_shows_no_traceback(run, capfd):
    log.configure()
    with serving(run) as server:
        # Without a publisher, the real handler fails.
        server._server.publisher = None
        for _ in range(2 * telemetry_http.MAX_FAULTS):
            assert ask(server, "/healthz")[::2] == (500, b"Internal Server Error\n")
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == telemetry_http.MAX_FAULTS
    assert all(line.startswith("edge-ssm: the status server failed error=") for line in lines)


def cells(page, table):
    body = re.search(rf'<table id="{table}">(.*?)</table>', page, re.S)[1]
    return [re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in re.findall(r"<tr>(.*?)</tr>", body, re.S)]


def test_a_browser_shows_the_decisions_of_the_run(run, server, tmp_path):
    first = run.counters.decisions
    page, refused = browse(server.url, tmp_path)
    last = run.counters.decisions
    assert refused == []
    shown = [row for row in cells(page, "decisions") if row]
    assert len(shown) == 24
    assert first - 2 < int(shown[0][0].replace(",", "")) + 1 <= last
    recent = {f"{d.index:,}": d for d in run.publisher.decisions()}
    known = [row for row in shown if row[0] in recent]
    for number, samples, label, score in known:
        d = recent[number]
        assert (samples, label) == (f"{d.start:,} to {d.end:,}", d.label)
        assert f"{d.score:.3f}" in score
    assert known or last - first > 40
    assert "receiving samples" in page
    assert 'aria-label="calls by time: half within' in page
    assert re.search(r'id="banner"[^>]*hidden', page)


def test_a_browser_shows_hostile_names_as_text(tmp_path):
    network = random_network(window=5)
    attack = "<img src=x onerror=document.title='owned'>"
    object.__setattr__(network, "labels", (attack, f"{attack}2", f"{attack}3"))
    with Watched(network, rows(network), model=attack, hz=200) as run, serving(run) as server:
        run.publisher.event(Event(attack, 0))
        run.until(5)
        page, refused = browse(server.url, tmp_path)
    assert refused == []
    assert "<img" not in page
    assert "&lt;img" in page
    assert "<title>owned" not in page


def test_a_browser_says_when_the_loop_is_stuck(tmp_path):
    with demo(hz=500) as run, serving(run, stuck_after_s=0.2) as server:
        run.until(1)
        run.stop.set()
        time.sleep(0.5)
        page, _ = browse(server.url, tmp_path)
    assert re.search(r'role="alert">Stuck: the loop has not run for', page)


ENDING = """
import os, sys, time
sys.path[:0] = {paths!r}
from support.watched import demo
from edge_ssm.telemetry.http import serve
with demo(hz=500) as run:
    run.until(1)
    web = serve(run.publisher, ":0", prometheus=False)
    print(web.url, flush=True)
    answer = web._server.shutdown_request
    left = 3  # The page and two answers; then the process is gone in the middle of the browser's visit.
    def counted(request):
        global left
        answer(request)
        left -= 1
        if not left:
            os._exit(0)  # At once: a browser's virtual time runs ahead of any timer here.
    web._server.shutdown_request = counted
    time.sleep(60)
"""


def test_a_browser_says_when_the_service_is_gone(tmp_path):
    paths = [str(ROOT / "tests"), str(ROOT)]
    command = [sys.executable, "-c", ENDING.format(paths=paths)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"EDGE_SSM_RUN": str(tmp_path)}
    ) as service:
        try:
            page, _ = browse(service.stdout.readline().strip(), tmp_path / "browser", 8000)
        finally:
            service.kill()
    assert re.search(r'role="alert">No answer from the service since [^<]*: the values shown are old', page)
