"""A sensor behind an MQTT broker: QoS 1, a session that outlives this process, and manual acknowledgement.

A message is acknowledged only when a snapshot covers its samples. Whatever happens before, the broker sends it again.
docs/mqtt.md describes the settings that the broker needs.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import deque
from typing import Any

from edge_ssm.errors import EdgeSSMError, UsageError
from edge_ssm.io.address import Endpoint
from edge_ssm.io.backoff import Backoff
from edge_ssm.io.mailbox import Mailbox
from edge_ssm.io.mqtt import (
    Credentials,
    create_client,
    credentials_from,
    device_id,
    parse_topic_address,
    refusal_text,
    set_password,
)
from edge_ssm.io.shutdown import ShutdownSignal
from edge_ssm.io.sources.base import MAX_BATCH, Batch, Discontinuity, Source, SourceOptions

CONNECT_S = 10.0
"""Seconds that an attempt to connect may take."""
STEADY_S = 10.0
"""A connection that lasted this long was a success. Two runs with one client id push each other out sooner."""
WEEK_S = 7 * 24 * 3600
OPTIONS = ("client_id", "receive_maximum", "in_flight", "session_expiry")
"""Options of an endpoint beside the credentials."""
_HEADER_BYTES = 1 << 10
"""Bytes of a packet beside its payload: topic and properties."""


class MqttSource(Source):
    """Receives the messages of a topic; each is a ``Batch`` of complete frames.

    All of paho runs in one thread, since writing from two is not safe. A broker that is missing is waited for.

    Parameters
    ----------
    url
        ``mqtt://host[:port]/topic`` or ``mqtts://host[:port]/topic``.
    credentials
        User name, password and certificates.
    client_id
        Name of the session at the broker; derived from this machine and the address by default. Two runs with the same
        id push each other out.
    receive_maximum
        Messages that the broker may send before the first of them is acknowledged.
    max_in_flight
        Unacknowledged messages that call for a snapshot ahead of time; half of ``receive_maximum`` by default.
    session_expiry_s
        Seconds for which the broker keeps messages while nobody is connected.
    keepalive_s
        Seconds between signs of life on an idle connection.
    backoff
        Waits between attempts to connect.

    Raises UsageError for an address or a file that is not acceptable.
    """

    datagrams = True
    reorder = 1 << 20
    reorder_wait_s = 2.0

    def __init__(
        self,
        url: str,
        credentials: Credentials | None = None,
        *,
        client_id: str | None = None,
        receive_maximum: int = 1000,
        max_in_flight: int | None = None,
        session_expiry_s: int = WEEK_S,
        keepalive_s: int = 30,
        backoff: Backoff | None = None,
    ) -> None:
        self.name = url
        self._address = parse_topic_address(url, wildcards=True)
        self._credentials = credentials or Credentials()
        for name, value, maximum in (
            ("receive_maximum", receive_maximum, 65535),
            ("session_expiry_s", session_expiry_s, 2**32 - 1),
            ("keepalive_s", keepalive_s, 65535),
        ):
            if not 0 < value <= maximum:
                raise UsageError(f"{url}: {name} {value}: expected 1 to {maximum}")
        self.client_id = client_id or device_id(url)
        self.receive_maximum = receive_maximum
        self.most_in_flight = max_in_flight or max(1, receive_maximum // 2)
        self._expiry_s, self._keepalive_s = session_expiry_s, keepalive_s
        self._client = create_client(self._address, self._credentials, self.client_id, manual_ack=True)
        self._client.connect_timeout = CONNECT_S
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_message = self._on_message
        self._client.on_disconnect = self._on_disconnect

        self._backoff = backoff or Backoff()
        # There is room for all that the broker may send at once, and for some discontinuities: the network's thread
        # waits for the pipeline only if messages have QoS 0 or come again after a new connection.
        self._mailbox: Mailbox[Batch | Discontinuity] = Mailbox(receive_maximum + 8)
        self._lock = threading.Lock()
        self._connection = 0  # Tokens of other connections are void: the broker reuses its numbers (mid).
        self._received = 0
        self._unacknowledged: deque[tuple[int, int]] = deque()  # (ordinal, mid), in order of arrival
        self._due: deque[int] = deque()  # mids that the network's thread shall acknowledge
        self._last_problem = self._reason = ""
        self._was_connected = False
        self._brief = 0  # consecutive connections that did not last
        self._since = 0.0  # time.monotonic() when this connection was accepted; 0: it was not
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name=f"mqtt {self._address.host}", daemon=True)
        self._thread.start()

    # Called by the pipeline's thread

    @property
    def in_flight(self) -> int:  # type: ignore[override]
        """Messages of this connection that arrived and are not acknowledged.

        At ``receive_maximum``, or at a lower limit of the broker, no more will arrive.
        """
        return len(self._unacknowledged)

    def read(self, stop: ShutdownSignal, seconds: float | None) -> Batch | Discontinuity | None:
        """Return the next message."""
        return self._mailbox.get(stop, seconds)

    def acknowledge(self, token: Any) -> None:
        """Acknowledge the message with this token and all before it, unless its connection is gone."""
        connection, ordinal = token
        with self._lock:
            if connection != self._connection:
                return
            while self._unacknowledged and self._unacknowledged[0][0] <= ordinal:
                self._due.append(self._unacknowledged.popleft()[1])
        self._wake_up()

    def close(self) -> None:
        """Send the acknowledgements that are due and disconnect; the session remains at the broker."""
        if self._is_closing:
            return
        self._is_closing = True
        self._mailbox.close()
        self._wake_up()
        self._thread.join(5)
        if not self._thread.is_alive():  # otherwise it hangs in a name look-up and still needs them
            os.close(self._wake_reader)
            os.close(self._wake_writer)

    def _wake_up(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_writer, b"\0")

    # Called by the network's thread

    def _run(self) -> None:
        while not self._is_closing:
            try:
                self._reason, self._since = "", 0.0
                self._connect()
                self._exchange()
            except (EdgeSSMError, OSError) as error:
                self._reason = self._reason or getattr(error, "strerror", None) or str(error) or type(error).__name__
            except Exception as error:  # A broker is not trusted, and paho does not catch all errors.
                self._reason = f"the broker did not send valid MQTT ({type(error).__name__}: {error})"
            if self._since:
                self._rate_connection(time.monotonic() - self._since)
            self._drop_connection()
            if not self._is_closing:
                self._wait(self._backoff.record_failure())
        with contextlib.suppress(Exception):
            self._client.socket().close()

    def _connect(self) -> None:
        from paho.mqtt.packettypes import PacketTypes
        from paho.mqtt.properties import Properties

        set_password(self._client, self._address, self._credentials)
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = self._expiry_s
        properties.ReceiveMaximum = self.receive_maximum
        properties.MaximumPacketSize = MAX_BATCH + _HEADER_BYTES
        self._client.connect(
            self._address.host, self._address.port, self._keepalive_s, clean_start=False, properties=properties
        )

    def _exchange(self) -> None:
        """Read and write until the connection is lost or closed."""
        network = self._client
        while (connected := network.socket()) is not None:
            with self._lock:
                due, self._due = self._due, deque()
            for mid in due:
                network.ack(mid, 1)
            if self._is_closing:
                network.disconnect()  # Both are written at once, as far as the network accepts them.
                return
            poll = select.poll()
            poll.register(connected, select.POLLIN | (select.POLLOUT if network.want_write() else 0))
            poll.register(self._wake_reader, select.POLLIN)
            buffered = getattr(connected, "pending", int)()  # poll does not see what TLS has already read.
            ready = dict(poll.poll(0 if buffered else 1000))
            if ready.pop(self._wake_reader, 0):
                self._drain_wakeups()
            events = sum(ready.values())
            if buffered or events & ~select.POLLOUT:
                network.loop_read()
            if events & select.POLLOUT:
                network.loop_write()
            network.loop_misc()

    def _rate_connection(self, lasted_s: float) -> None:
        if lasted_s > STEADY_S:
            self._brief = 0
            self._backoff.reset()
            return
        self._brief += 1
        if self._brief > 1 and not self._reason:  # mosquitto 2.0.11 does not give this reason.
            self._reason = (
                f"connection lost soon after it was established; does another run use client id {self.client_id}?"
            )

    def _drop_connection(self) -> None:
        """Forget a lost connection: its acknowledgements are void, and the broker repeats what was not acknowledged."""
        with self._lock:
            self._connection += 1
            self._unacknowledged.clear()
            self._due.clear()
        with contextlib.suppress(Exception):
            self._client.socket().close()  # It is still open if paho raised.
        reason = self._reason or "connection lost"
        if reason != self._last_problem and not self._is_closing:
            self._last_problem = reason
            self._mailbox.put(Discontinuity(reason, False))

    def _wait(self, seconds: float) -> None:
        """Wait for ``seconds`` or until ``close``."""
        end = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._wake_reader, select.POLLIN)
        while not self._is_closing and (remaining := end - time.monotonic()) > 0:
            poll.poll(remaining * 1000)
            self._drain_wakeups()

    def _drain_wakeups(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_reader, 4096)

    def _on_connect(self, network: Any, _data: Any, flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            self._reason = refusal_text(reason)
            return
        from paho.mqtt.subscribeoptions import SubscribeOptions

        note = "connected"
        if self._was_connected and not flags.session_present:
            note = "connected; the broker has lost the session and the messages of the meantime"
        self._was_connected, self._last_problem, self._since = True, "", time.monotonic()
        self._mailbox.put(Discontinuity(note, True))
        # A retained message is an old sample and would arrive again at each connection.
        no_retained = SubscribeOptions.RETAIN_DO_NOT_SEND
        network.subscribe(self._address.topic, options=SubscribeOptions(qos=1, retainHandling=no_retained))

    def _on_subscribe(self, network: Any, _data: Any, _mid: int, reasons: Any, _properties: Any) -> None:
        if reasons[0].is_failure:
            self._reason = f"the broker refused the topic: {str(reasons[0]).lower()}"
            network.disconnect()

    def _on_message(self, _network: Any, _data: Any, message: Any) -> None:
        with self._lock:
            self._received += 1
            token = (self._connection, self._received)
            if message.qos:
                self._unacknowledged.append((self._received, message.mid))
        self._mailbox.put(Batch(message.payload, token))

    def _on_disconnect(self, _network: Any, _data: Any, flags: Any, reason: Any, _properties: Any) -> None:
        if flags.is_disconnect_packet_from_server:
            self._reason = f"the broker closed the connection: {str(reason).lower()}"


def open_endpoint(endpoint: Endpoint, options: SourceOptions) -> MqttSource:
    """Subscribe to the topic of ``mqtt://`` or ``mqtts://``. Raises UsageError."""
    credentials = credentials_from(endpoint, *OPTIONS)
    return MqttSource(
        endpoint.text,
        credentials,
        client_id=endpoint.options.get("client_id"),
        receive_maximum=endpoint.positive_int("receive_maximum", 1000),
        max_in_flight=endpoint.positive_int("in_flight", 0) or None,
        session_expiry_s=endpoint.positive_int("session_expiry", WEEK_S),
    )


def validate_endpoint(endpoint: Endpoint) -> None:
    """Raise UsageError for an option, an address or a file that is not acceptable, or without paho-mqtt."""
    credentials = credentials_from(endpoint, *OPTIONS)
    create_client(parse_topic_address(endpoint.text, wildcards=True), credentials, "")
    for option in ("receive_maximum", "in_flight", "session_expiry"):
        endpoint.positive_int(option, 1)
