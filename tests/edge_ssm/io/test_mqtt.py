"""The MQTT source and sink with a real broker that is killed and restarted."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from support.mosquitto import Broker
from support.waiting import until

from edge_ssm.errors import UsageError
from edge_ssm.io.backoff import Backoff
from edge_ssm.io.mqtt import Credentials, TopicAddress, is_loop, parse_topic_address
from edge_ssm.io.shutdown import ShutdownSignal
from edge_ssm.io.sinks.mqtt import MqttTransport
from edge_ssm.io.sources.base import Batch, Discontinuity
from edge_ssm.io.sources.mqtt import MqttSource

pytest.importorskip("paho.mqtt.client", reason="paho-mqtt is not installed")


@pytest.fixture
def broker(tmp_path):
    broker = Broker(tmp_path).start()
    yield broker
    broker.kill()


@pytest.fixture
def stop():
    with ShutdownSignal() as stop:
        yield stop


def listen(broker, *args, topic="s/+/x", **options):
    return MqttSource(f"{broker.url}/{topic}", *args, backoff=Backoff(0.3), **options)


def ready(broker, source, stop, note="connected"):
    """Wait until a new source receives what is published; each one subscribes once."""
    assert source.read(stop, 10) == Discontinuity(note, True)
    subscribed(broker, broker.awaited_subscriptions)


def subscribed(broker, before):
    """Wait for a subscription after the first ``before`` ones; the source says "connected" when it asks for one.

    ``before`` must have been counted before the source began to connect, which it does when it is made.
    """
    until(lambda: broker.subscriptions() > before)
    broker.awaited_subscriptions = before + 1


def take(source, stop, count, seconds=10):
    """Return up to that many messages as (number, token), ignoring discontinuities."""
    found, end = [], time.monotonic() + seconds
    while len(found) < count and time.monotonic() < end:
        item = source.read(stop, end - time.monotonic())
        if isinstance(item, Batch):
            found.append((int(item.content), item.token))
    return found


def numbers(found):
    return [number for number, _ in found]


def test_unacknowledged_messages_arrive_again(broker, stop):
    source = listen(broker)
    ready(broker, source, stop)
    broker.publish("s/1/x", *range(10))
    first = take(source, stop, 10)
    assert numbers(first) == list(range(10))
    assert source.in_flight == 10
    source.acknowledge(first[5][1])
    source.acknowledge(first[2][1])
    assert source.in_flight == 4
    source.close()
    broker.publish("s/1/x", 10)
    again = listen(broker)
    assert numbers(take(again, stop, 5)) == [6, 7, 8, 9, 10]
    assert take(again, stop, 1, 0.3) == []
    again.close()


def test_the_receive_maximum_limits_unacknowledged_messages(broker, stop):
    source = listen(broker, receive_maximum=7)
    ready(broker, source, stop)
    broker.publish("s/1/x", *range(30))
    found = take(source, stop, 8, 1)
    assert len(found) == source.in_flight == 7
    while len(found) < 30:
        source.acknowledge(found[-1][1])
        found += take(source, stop, min(7, 30 - len(found)))
    assert numbers(found) == list(range(30))
    source.close()


def test_the_receive_maximum_overrides_the_limit_of_the_broker(broker, stop):
    source = listen(broker)
    ready(broker, source, stop)
    broker.publish("s/1/x", *range(500))
    assert numbers(take(source, stop, 500)) == list(range(500))
    assert source.in_flight == 500
    source.close()


def test_a_broker_killed_during_the_stream_loses_nothing(broker, stop):
    source = listen(broker)
    ready(broker, source, stop)
    broker.publish("s/1/x", *range(20))
    before = take(source, stop, 20)
    acknowledged = time.time()
    source.acknowledge(before[9][1])
    until(lambda: broker.saved_after(acknowledged))
    broker.kill()
    lost = source.read(stop, 10)
    assert isinstance(lost, Discontinuity)
    assert not lost.connected
    assert source.in_flight == 0
    assert source.read(stop, 0.7) == Discontinuity("Connection refused", False)
    broker.start()
    broker.publish("s/1/x", *range(20, 30))
    assert source.read(stop, 10) == Discontinuity("connected", True)
    again = take(source, stop, 20)
    assert numbers(again) == list(range(10, 30))
    source.acknowledge(before[-1][1])  # void: of a connection that is gone
    assert source.in_flight == 20
    source.acknowledge(again[-1][1])
    assert source.in_flight == 0
    source.close()


def test_a_session_lost_by_the_broker_is_reported(broker, tmp_path, stop):
    source = listen(broker)
    ready(broker, source, stop)
    broker.kill()
    (tmp_path / "mosquitto.db").unlink(missing_ok=True)
    before = broker.subscriptions()
    broker.start()
    discontinuities = [source.read(stop, 10) for _ in range(2)]
    while not discontinuities[-1].connected:
        discontinuities.append(source.read(stop, 10))
    assert discontinuities[-1].reason.startswith("connected; the broker has lost the session")
    subscribed(broker, before)
    broker.publish("s/1/x", 1)
    assert numbers(take(source, stop, 1)) == [1]
    source.close()


READER = """
import sys
from edge_ssm.io.shutdown import ShutdownSignal
from edge_ssm.io.sources.base import Batch
from edge_ssm.io.sources.mqtt import MqttSource
source = MqttSource(sys.argv[1], client_id="reader")
with ShutdownSignal() as stop:
    held = []
    while True:
        item = source.read(stop, None)
        if isinstance(item, Batch):
            held.append(item)
        if len(held) == 10:  # all ten are kept in the file before they are acknowledged
            with open(sys.argv[2], "a") as file:
                file.write("".join(f"{int(item.content)}\\n" for item in held))
            source.acknowledge(held[-1].token)
            held.clear()
"""


@pytest.mark.slow
def test_a_reader_killed_repeatedly_misses_nothing(broker, tmp_path):
    kept = tmp_path / "kept"
    kept.touch()
    stopped = threading.Event()

    def send():
        sent = 0
        while not stopped.is_set():
            broker.publish("s/1/x", *range(sent, sent + 50))
            sent += 50

    command = [sys.executable, "-c", READER, f"{broker.url}/s/1/x", str(kept)]
    reader = subprocess.Popen(command)
    until(broker.subscriptions)
    sender = threading.Thread(target=send)
    sender.start()
    for k in range(5):
        size = kept.stat().st_size
        until(lambda size=size: kept.stat().st_size > size)
        time.sleep(0.13 * k)
        reader.send_signal(signal.SIGKILL)
        reader.wait()
        reader = subprocess.Popen(command)
    time.sleep(1)
    stopped.set()
    sender.join()
    until(lambda: len(kept.read_text()) == length_after(kept, 1))
    reader.kill()
    reader.wait()
    found = [int(line) for line in kept.read_text().split()]
    assert sorted(set(found)) == list(range(max(found) + 1))
    assert len(found) > 200


def length_after(path, seconds):
    time.sleep(seconds)
    return len(path.read_text())


def broker_log(folder):
    return (folder / "mosquitto.log").read_text(errors="replace")


def test_a_broker_that_starts_later_is_waited_for(tmp_path, stop):
    broker = Broker(tmp_path)
    source = listen(broker)
    assert source.read(stop, 5) == Discontinuity("Connection refused", False)
    assert source.read(stop, 0.5) is None
    broker.start()
    ready(broker, source, stop)
    broker.publish("s/1/x", 5)
    assert numbers(take(source, stop, 1)) == [5]
    source.close()
    broker.kill()


def test_a_retained_message_is_not_delivered(broker, stop):
    broker.publish("s/1/x", 1, retain=True)
    source = listen(broker)
    ready(broker, source, stop)
    broker.publish("s/1/x", 2)
    assert numbers(take(source, stop, 1)) == [2]
    source.close()


def test_an_overlong_message_does_not_stop_the_next(broker, stop):
    source = listen(broker)
    ready(broker, source, stop)
    broker.publish("s/1/x", b"1" * 100_000, b"0" * (1 << 16), 2)
    assert len(source.read(stop, 5).content) == 1 << 16
    assert numbers(take(source, stop, 1)) == [2]
    assert source.in_flight == 2
    source.close()


def test_users_and_passwords(tmp_path, stop):
    maker = shutil.which("mosquitto_passwd")
    if maker is None:
        pytest.skip("mosquitto_passwd is not installed")
    users = tmp_path / "users"
    subprocess.run([maker, "-b", "-c", users, "sensor", "right"], check=True, capture_output=True)
    users.chmod(0o644)
    broker = Broker(tmp_path, "allow_anonymous false", f"password_file {users}").start()
    secret = tmp_path / "secret"
    secret.write_text("wrong\n")
    credentials = Credentials(username="sensor", password_file=str(secret))
    refused = "the broker refused: not authorized; check the user name and the password"
    source = listen(broker, credentials)
    transport = MqttTransport(f"{broker.url}/out", credentials)
    assert source.read(stop, 5) == Discontinuity(refused, False)
    with pytest.raises(OSError, match=refused):
        transport.connect()
    secret.write_text("right\n")  # A new password is used without a restart.
    assert source.read(stop, 5) == Discontinuity("connected", True)
    transport.connect()
    transport.send(["1\n"])
    transport.close()
    source.close()
    broker.kill()


@pytest.fixture
def certificates(tmp_path):
    """Certificates of an authority and of a server at 127.0.0.1, made by openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path / "tls"
    folder.mkdir()
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    make += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
    subprocess.run(make, check=True, capture_output=True)
    for file in folder.iterdir():
        file.chmod(0o644)
    return folder


def test_tls(tmp_path, certificates, stop):
    listener = (f"certfile {certificates}/cert.pem", f"keyfile {certificates}/key.pem")
    broker = Broker(tmp_path, "allow_anonymous true", listener=listener).start()
    url = f"mqtts://127.0.0.1:{broker.port}/a"
    stranger = MqttSource(url)
    refused = stranger.read(stop, 10)
    assert not refused.connected
    assert "CERTIFICATE_VERIFY_FAILED" in refused.reason
    stranger.close()
    credentials = Credentials(ca_file=str(certificates / "cert.pem"))
    source = MqttSource(url, credentials)
    ready(broker, source, stop)
    transport = MqttTransport(url, credentials)
    transport.connect()
    transport.send([f"{k}\n" for k in range(300)])
    found = take(source, stop, 300)
    assert numbers(found) == list(range(300))
    source.acknowledge(found[-1][1])
    transport.close()
    source.close()
    broker.kill()


def test_a_shutdown_ends_the_wait_and_close_is_quick(tmp_path):
    with ShutdownSignal() as stop:
        source = listen(Broker(tmp_path))
        assert isinstance(source.read(stop, 5), Discontinuity)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert source.read(stop, None) is None
        began = time.monotonic()
        source.close()
        source.close()
        assert time.monotonic() - began < 1


def test_two_clients_with_one_id_are_reported_and_spare_the_broker(broker, tmp_path, stop):
    sources = [listen(broker, client_id="same") for _ in range(2)]
    began, discontinuities = time.monotonic(), []

    def told():
        discontinuities.extend(source.read(stop, 0.1) for source in sources)
        return any("does another run use client id same?" in each.reason for each in discontinuities if each)

    until(told)
    time.sleep(max(0.0, 3 - (time.monotonic() - began)))
    assert broker_log(tmp_path).count("as same") < 50  # each waits 0.3 s at most in this test
    for source in sources:
        source.close()


JUNK = [
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
    bytes(range(256)),
    b"\x20\x03\x00\x00\x00" + b"\x30\xff\xff\xff\xff\xff",  # a CONNACK, then a length that does not end
    b"\x20\x03\x00\x00\x00" + b"\x32\x02\x00\x50",  # a message that is shorter than its topic
    b"\x20\x03\x00\x00\x00" + b"\x32\x06\x00\x01a\x00\x01\x7f",  # missing properties
    b"\x20\x00",
    b"\x90\x03\x00\x01\x00",
]


@pytest.mark.parametrize("junk", JUNK)
def test_a_broker_that_sends_junk_does_no_harm(junk, stop):
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = MqttSource(f"mqtt://127.0.0.1:{server.getsockname()[1]}/a", backoff=Backoff(0.1))
        for _ in range(3):
            connection, _ = server.accept()
            connection.recv(4096)
            with contextlib.suppress(OSError):  # It may have closed the connection already.
                connection.sendall(junk)
                connection.shutdown(socket.SHUT_WR)
            time.sleep(0.05)
            connection.close()
        discontinuities = [discontinuity for _ in range(8) if (discontinuity := source.read(stop, 0.2)) is not None]
        assert any(
            isinstance(discontinuity, Discontinuity) and not discontinuity.connected
            for discontinuity in discontinuities
        )
        source.close()
        assert not source._thread.is_alive()


def test_a_broker_that_never_answers_is_reported(stop):
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = MqttSource(f"mqtt://127.0.0.1:{server.getsockname()[1]}/a", keepalive_s=1, backoff=Backoff(0.1))
        discontinuity = source.read(stop, 5)
        assert isinstance(discontinuity, Discontinuity)
        assert not discontinuity.connected
        source.close()


def test_messages_with_qos_0_arrive_too(broker, stop):
    source = listen(broker, receive_maximum=5)
    ready(broker, source, stop)
    broker.publish("s/1/x", *range(50), qos=0)
    assert numbers(take(source, stop, 50)) == list(range(50))
    assert source.in_flight == 0
    source.close()


# The sink


def test_lines_are_published_and_acknowledged(broker, stop):
    source = listen(broker, topic="out/#")
    ready(broker, source, stop)
    transport = MqttTransport(f"{broker.url}/out/decisions")
    transport.connect()
    transport.send([f"{k}\n" for k in range(100)])
    transport.send([f"{k}\n" for k in range(100, 110)])
    assert numbers(take(source, stop, 110)) == list(range(110))
    transport.close()
    source.close()


def test_a_lost_broker_is_an_error_and_the_same_lines_can_be_sent_again(broker, stop):
    transport = MqttTransport(f"{broker.url}/out", timeout_s=5)
    with pytest.raises(OSError, match="not connected"):
        transport.send(["0\n"])
    transport.connect()
    broker.kill()
    with pytest.raises(OSError, match="connection to the broker was lost"):
        transport.send(["1\n"])
    with pytest.raises(OSError, match="refused"):
        transport.connect()
    broker.start()
    source = listen(broker, topic="out")
    ready(broker, source, stop)
    transport.connect()
    transport.send(["1\n"])
    assert numbers(take(source, stop, 1)) == [1]
    transport.close()
    source.close()


def test_a_stalled_broker_is_an_error(broker):
    transport = MqttTransport(f"{broker.url}/out", timeout_s=0.5)
    transport.connect()
    broker._process.send_signal(signal.SIGSTOP)
    with pytest.raises(OSError, match=r"not acknowledged by the broker within 0\.5 s"):
        transport.send(["1\n"])
    with pytest.raises(OSError, match="no answer to the connection"):
        transport.connect()
    broker._process.send_signal(signal.SIGCONT)
    transport.close()


# Addresses


def test_addresses():
    assert parse_topic_address("mqtt://h/a/+/#", True) == TopicAddress("mqtt://h/a/+/#", "h", 1883, "a/+/#", False)
    assert parse_topic_address("mqtts://[::1]:99/a%23 b", False) == TopicAddress(
        "mqtts://[::1]:99/a%23 b", "::1", 99, "a%23 b", True
    )


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("mqtt://h", r"expected mqtt://host\[:port\]/topic"),
        ("mqtt://h/", r"expected mqtt://host\[:port\]/topic"),
        ("http://h/a", r"expected mqtt://host\[:port\]/topic"),
        ("mqtt://h:0/a", "port 0: expected 1 to 65535"),
        ("mqtt://h:70000/a", "port 70000"),
        ("mqtt://me:secret@h/a", "by options, not in the address"),
        ("mqtt://h/a#", "topic 'a#': expected"),
        ("mqtt://h/#/a", "topic '#/a': expected"),
        ("mqtt://h/a\0", "NUL"),
        ("mqtt://a..b/t", r"mqtt://a\.\.b/t: 'a\.\.b' is not a host"),
    ],
)
def test_invalid_addresses_are_refused(url, problem):
    with pytest.raises(UsageError, match=problem) as caught:
        parse_topic_address(url, True)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "sink", "expected"),
    [
        ("mqtt://h/a/#", "mqtt://h/a/b", True),
        ("mqtt://h/a/#", "mqtt://H:1883/a", True),
        ("mqtt://h/+/b", "mqtts://h/a/b", True),
        ("mqtt://h/$share/g/a/#", "mqtt://h/a/b", True),
        ("mqtt://h/a/b", "mqtt://h/a/b", True),
        ("mqtt://h/a/+", "mqtt://h/a/b/c", False),
        ("mqtt://h/#", "mqtt://other/a", False),
        ("mqtt://h/#", "mqtt://h:1884/a", False),
    ],
)
def test_a_sink_whose_messages_the_source_would_receive_is_a_loop(source, sink, expected):
    assert is_loop(parse_topic_address(source, True), parse_topic_address(sink, False)) is expected


@pytest.mark.parametrize(
    ("credentials", "problem"),
    [
        (Credentials(password="x"), "a password without a user name"),
        (Credentials("u", "x", "y"), "both a password and a password file"),
        (Credentials("u", password_file="/nowhere/x"), "password file /nowhere/x: cannot be read"),
        (Credentials(ca_file="x"), "certificates are for mqtts://"),
    ],
)
def test_invalid_credentials_are_refused(credentials, problem):
    with pytest.raises(UsageError, match=problem):
        MqttSource("mqtt://127.0.0.1/a", credentials)
    with pytest.raises(UsageError, match=problem):
        MqttTransport("mqtt://127.0.0.1/a", credentials)


def test_invalid_certificate_files_are_refused(tmp_path):
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    for credentials in (
        Credentials(ca_file=str(junk)),
        Credentials(cert_file=str(junk)),
        Credentials(ca_file="/nowhere/ca.pem"),
    ):
        with pytest.raises(UsageError, match="certificates cannot be used"):
            MqttSource("mqtts://127.0.0.1/a", credentials)
    with pytest.raises(UsageError, match="a key without a certificate"):
        MqttSource("mqtts://127.0.0.1/a", Credentials(key_file=str(junk)))
    with pytest.raises(UsageError, match="topic 'a/#': expected a topic without"):
        MqttTransport("mqtt://127.0.0.1/a/#")
