"""A sensor behind an MQTT broker: QoS 1, a session that outlives this process, and acknowledgement by hand.

A message is acknowledged only once the loop says that its samples will not be asked for again; whatever happens before,
the broker sends it again. docs/mqtt.md tells what the broker must be set to.
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
from edge_ssm.io.backoff import Backoff
from edge_ssm.io.mailbox import Mailbox
from edge_ssm.io.mqtt import Access, client, device_id, log_in, parse, refusal
from edge_ssm.io.shutdown import ShutdownSignal
from edge_ssm.io.sources.base import BLOCK, Batch, Discontinuity, Source

CONNECT_S = 10.0
STEADY_S = 10.0
"""A connection that lasted so long was a success. Two runs with one client id push each other out sooner."""
WEEK_S = 7 * 24 * 3600
_HEADERS = 1 << 10
"""Bytes of a packet beside the payload: topic and properties."""


class MqttSource(Source):
    """The messages of a topic, each one ``Data`` with whole frames.

    client_id: the session's name at the broker; by default one made from this machine and the address. Two runs with
    the same one push each other out. receive_maximum: most messages that the broker may send before the first of them
    is acknowledged. session_expiry_s: how long the broker keeps what comes while nobody is connected.

    All of paho runs in one thread, since its writing is not safe from two.

    Raises UsageError for an address or a file that can't be right; a broker that is not there is waited for.
    """

    datagrams = True
    reorder = 1 << 20
    reorder_wait_s = 2.0

    def __init__(
        self,
        url: str,
        access: Access | None = None,
        *,
        client_id: str | None = None,
        receive_maximum: int = 1000,
        session_expiry_s: int = WEEK_S,
        keepalive_s: int = 30,
        back_off: Backoff | None = None,
    ) -> None:
        self.name = url
        self._address = parse(url, wildcards=True)
        self._access = access or Access()
        for name, value, most in (
            ("receive_maximum", receive_maximum, 65535),
            ("session_expiry_s", session_expiry_s, 2**32 - 1),
            ("keepalive_s", keepalive_s, 65535),
        ):
            if not 0 < value <= most:
                raise UsageError(f"{url}: {name} {value}: expected 1 to {most}")
        self.client_id = client_id or device_id(url)
        self.receive_maximum = receive_maximum
        self.most_in_flight = max(1, receive_maximum // 2)
        self._expiry_s, self._keepalive_s = session_expiry_s, keepalive_s
        self._client = client(self._address, self._access, self.client_id, manual_ack=True)
        self._client.connect_timeout = CONNECT_S
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_message = self._on_message
        self._client.on_disconnect = self._on_disconnect

        self._back_off = back_off or Backoff()
        # Room for all that the broker may send at once, and some seams: the network's thread waits for the loop only
        # where messages come with QoS 0, or again after a new connection.
        self._mailbox: Mailbox[Batch | Discontinuity] = Mailbox(receive_maximum + 8)
        self._lock = threading.Lock()
        self._connection = 0  # tokens of another one are void: the broker uses its numbers (mid) again
        self._received = 0
        self._unacknowledged: deque[tuple[int, int]] = deque()  # (ordinal, mid), in order of coming
        self._due: deque[int] = deque()  # mids to be acknowledged by the network's thread
        self._said = self._reason = ""
        self._accepted_before = False
        self._brief = 0  # connections in a row that did not last
        self._since = 0.0  # when this connection was accepted; 0: it is not
        self._waker, self._wake = os.pipe()
        os.set_blocking(self._waker, False)
        os.set_blocking(self._wake, False)
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name=f"mqtt {self._address.host}", daemon=True)
        self._thread.start()

    # The loop's side

    @property
    def in_flight(self) -> int:  # type: ignore[override]
        """Messages of this connection that came and are not acknowledged; at ``receive_maximum`` (or less, if the
        broker allows less) no more will come."""
        return len(self._unacknowledged)

    def read(self, stop: ShutdownSignal, seconds: float | None) -> Batch | Discontinuity | None:
        return self._mailbox.get(stop, seconds)

    def acknowledge(self, token: Any) -> None:
        connection, ordinal = token
        with self._lock:
            if connection != self._connection:
                return
            while self._unacknowledged and self._unacknowledged[0][0] <= ordinal:
                self._due.append(self._unacknowledged.popleft()[1])
        self._signal()

    def close(self) -> None:
        """Sends the acknowledgements that are due; the session stays at the broker."""
        if self._closing:
            return
        self._closing = True
        self._mailbox.close()
        self._signal()
        self._thread.join(5)
        if not self._thread.is_alive():  # else it hangs in a name look-up and still needs them
            os.close(self._waker)
            os.close(self._wake)

    def _signal(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake, b"\0")

    # The network's thread

    def _serve(self) -> None:
        while not self._closing:
            try:
                self._reason, self._since = "", 0.0
                self._connect()
                self._exchange()
            except (EdgeSSMError, OSError) as error:
                self._reason = self._reason or getattr(error, "strerror", None) or str(error) or type(error).__name__
            except Exception as error:  # what a broker sends is not trusted, and paho does not catch all of it
                self._reason = f"the broker sent what is no MQTT ({type(error).__name__}: {error})"
            if self._since:
                self._judge(time.monotonic() - self._since)
            self._drop()
            if not self._closing:
                self._wait(self._back_off.failed())
        with contextlib.suppress(Exception):
            self._client.socket().close()

    def _connect(self) -> None:
        from paho.mqtt.packettypes import PacketTypes
        from paho.mqtt.properties import Properties

        log_in(self._client, self._address, self._access)
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = self._expiry_s
        properties.ReceiveMaximum = self.receive_maximum
        properties.MaximumPacketSize = BLOCK + _HEADERS
        self._client.connect(
            self._address.host, self._address.port, self._keepalive_s, clean_start=False, properties=properties
        )

    def _exchange(self) -> None:
        """Read and write until the connection is gone."""
        network = self._client
        while (connected := network.socket()) is not None:
            with self._lock:
                due, self._due = self._due, deque()
            for mid in due:
                network.ack(mid, 1)
            if self._closing:
                network.disconnect()  # both are written at once, as far as the network takes them
                return
            poll = select.poll()
            poll.register(connected, select.POLLIN | (select.POLLOUT if network.want_write() else 0))
            poll.register(self._waker, select.POLLIN)
            buffered = getattr(connected, "pending", int)()  # what TLS has read already is not seen by poll
            ready = dict(poll.poll(0 if buffered else 1000))
            if ready.pop(self._waker, 0):
                self._wakened()
            events = sum(ready.values())
            if buffered or events & ~select.POLLOUT:
                network.loop_read()
            if events & select.POLLOUT:
                network.loop_write()
            network.loop_misc()

    def _judge(self, lasted_s: float) -> None:
        if lasted_s > STEADY_S:
            self._brief = 0
            self._back_off.succeeded()
            return
        self._brief += 1
        if self._brief > 1 and not self._reason:  # mosquitto 2.0.11 does not say that it is so
            self._reason = f"connection lost soon after it was made; does another run use client id {self.client_id}?"

    def _drop(self) -> None:
        """The connection is gone: its acknowledgements are void, and what they were for comes again."""
        with self._lock:
            self._connection += 1
            self._unacknowledged.clear()
            self._due.clear()
        with contextlib.suppress(Exception):
            self._client.socket().close()  # left open where paho raised
        reason = self._reason or "connection lost"
        if reason != self._said and not self._closing:
            self._said = reason
            self._mailbox.put(Discontinuity(reason, False))

    def _wait(self, seconds: float) -> None:
        """That long, or until ``close``; acknowledgements can wait for a connection."""
        end = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._waker, select.POLLIN)
        while not self._closing and (left := end - time.monotonic()) > 0:
            poll.poll(left * 1000)
            self._wakened()

    def _wakened(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._waker, 4096)

    def _on_connect(self, network: Any, _data: Any, flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            self._reason = refusal(reason)
            return
        from paho.mqtt.subscribeoptions import SubscribeOptions

        note = "connected"
        if self._accepted_before and not flags.session_present:
            note = "connected; the broker has lost the session, and with it what came in the meantime"
        self._accepted_before, self._said, self._since = True, "", time.monotonic()
        self._mailbox.put(Discontinuity(note, True))
        # A retained message is an old sample, which would come again at each connection.
        keep_out = SubscribeOptions.RETAIN_DO_NOT_SEND
        network.subscribe(self._address.topic, options=SubscribeOptions(qos=1, retainHandling=keep_out))

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
