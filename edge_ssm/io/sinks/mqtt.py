"""A sink at an MQTT broker: each line is a message with QoS 1, delivered when the broker acknowledges it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from edge_ssm.errors import UsageError
from edge_ssm.io.address import Endpoint
from edge_ssm.io.mqtt import Credentials, create_client, credentials_from, parse_topic_address, refusal_text
from edge_ssm.io.sinks.base import Transport

KEEPALIVE_S = 30
"""Seconds between signs of life on an idle connection."""


class MqttTransport(Transport):
    """Publishes lines to a topic.

    Parameters
    ----------
    url
        ``mqtt://host[:port]/topic`` or ``mqtts://host[:port]/topic``.
    credentials
        User name, password and certificates.
    retain
        Let the broker keep the last line for later subscribers.
    timeout_s
        Seconds for a connection, and for the acknowledgement of all lines of one ``send``.

    Raises UsageError for an address or a file that is not acceptable.
    """

    def __init__(
        self,
        url: str,
        credentials: Credentials | None = None,
        *,
        retain: bool = False,
        timeout_s: float = 10.0,
    ) -> None:
        self.name = url
        self._address = parse_topic_address(url, wildcards=False)
        self._credentials = credentials or Credentials()
        self._retain, self._timeout_s = retain, timeout_s
        self._client: Any = None
        create_client(self._address, self._credentials, "")  # raises now for what is not acceptable
        self._changed = threading.Condition()
        self._is_connected = False
        self._problem = ""
        self._unacknowledged: set[int] = set()  # mids that the broker has not acknowledged
        self._early: dict[int, str] = {}  # mid -> problem, if acknowledged before publish() returned

    def connect(self) -> None:
        """Connect with a new client and wait for the broker's answer."""
        self.close()
        # The old client would send what it still holds, out of order and beside what is sent again.
        try:
            client = create_client(self._address, self._credentials, "")
        except UsageError as error:  # a file that existed at the start
            raise OSError(str(error)) from None
        client.connect_timeout = self._timeout_s
        client.on_connect, client.on_disconnect = self._on_connect, self._on_disconnect
        client.on_publish = self._on_publish
        self._is_connected, self._problem = False, ""
        self._unacknowledged.clear()
        self._early.clear()
        try:
            client.connect(self._address.host, self._address.port, KEEPALIVE_S, clean_start=True)
        except ValueError as error:
            raise OSError(str(error)) from None
        self._client = client
        client.loop_start()  # keeps the connection alive between decisions
        self._wait_until(lambda: self._is_connected, "no answer to the connection")

    def send(self, lines: list[str]) -> None:
        """Publish the lines and wait for their acknowledgements."""
        if self._client is None:
            raise OSError("not connected")
        for line in lines:
            info = self._client.publish(self._address.topic, line.rstrip("\n"), qos=1, retain=self._retain)
            with self._changed:
                problem = self._early.pop(info.mid, None)
                if problem is None:
                    self._unacknowledged.add(info.mid)
                else:
                    self._problem = self._problem or problem
        self._wait_until(lambda: not self._unacknowledged, "not acknowledged by the broker")

    def close(self) -> None:
        """Disconnect."""
        client, self._client = self._client, None
        if client is not None:
            client.on_disconnect = None
            client.disconnect()
            client.loop_stop()

    def _wait_until(self, is_done: Callable[[], bool], problem: str) -> None:
        end = time.monotonic() + self._timeout_s
        with self._changed:
            self._changed.wait_for(lambda: self._problem or is_done(), max(0.0, end - time.monotonic()))
            if self._problem:
                raise OSError(self._problem)
            if not is_done():
                raise OSError(f"{problem} within {self._timeout_s:g} s")

    def _on_connect(self, _client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        with self._changed:
            if reason.is_failure:
                self._problem = refusal_text(reason)
            else:
                self._is_connected = True
            self._changed.notify_all()

    def _on_disconnect(self, _client: Any, _data: Any, flags: Any, reason: Any, _properties: Any) -> None:
        with self._changed:
            explanation = f": {str(reason).lower()}" if flags.is_disconnect_packet_from_server else ""
            self._problem = self._problem or f"the connection to the broker was lost{explanation}"
            self._changed.notify_all()

    def _on_publish(self, _client: Any, _data: Any, mid: int, reason: Any, _properties: Any) -> None:
        problem = refusal_text(reason) if reason.is_failure else ""
        with self._changed:
            if mid in self._unacknowledged:
                self._unacknowledged.discard(mid)
                self._problem = self._problem or problem
            else:
                self._early[mid] = problem
            self._changed.notify_all()


def open_transport(endpoint: Endpoint) -> MqttTransport:
    """Return the transport of ``mqtt://`` or ``mqtts://``. Raises UsageError."""
    return MqttTransport(endpoint.text, credentials_from(endpoint))
