"""Decisions to an MQTT broker, each line a message with QoS 1: delivered when the broker has acknowledged it."""

from __future__ import annotations

import threading
import time
from typing import Any

from edge_ssm.errors import UsageError
from edge_ssm.io.mqtt import Access, client, parse, refusal
from edge_ssm.io.sinks.base import Transport

KEEPALIVE_S = 30


class MqttTransport(Transport):
    """timeout_s: for a connection, and for the acknowledgement of all lines of one ``send``. retain: the broker keeps
    the last line for those who subscribe later.

    Raises UsageError for an address or a file that can't be right.
    """

    def __init__(
        self,
        url: str,
        access: Access | None = None,
        *,
        retain: bool = False,
        timeout_s: float = 10.0,
    ) -> None:
        self.name = url
        self._address = parse(url, wildcards=False)
        self._access = access or Access()
        self._retain, self._timeout_s = retain, timeout_s
        self._client: Any = None
        client(self._address, self._access, "")  # refuses now what can't be right
        self._changed = threading.Condition()
        self._connected = False
        self._problem = ""
        self._waiting: set[int] = set()  # mids that the broker has not acknowledged
        self._early: dict[int, str] = {}  # acknowledged before publish() told us the mid

    def connect(self) -> None:
        self.close()
        # A client anew: the old one would send what it still holds, out of order and beside what we send again.
        try:
            made = client(self._address, self._access, "")
        except UsageError as error:  # a file that was there at the start
            raise OSError(str(error)) from None
        made.connect_timeout = self._timeout_s
        made.on_connect, made.on_disconnect, made.on_publish = self._on_connect, self._on_disconnect, self._on_publish
        self._connected, self._problem = False, ""
        self._waiting.clear()
        self._early.clear()
        try:
            made.connect(self._address.host, self._address.port, KEEPALIVE_S, clean_start=True)
        except ValueError as error:
            raise OSError(str(error)) from None
        self._client = made
        made.loop_start()  # keeps the connection alive between decisions
        self._until(lambda: self._connected, "no answer to the connection")

    def send(self, lines: list[str]) -> None:
        if self._client is None:
            raise OSError("not connected")
        for line in lines:
            info = self._client.publish(self._address.topic, line.rstrip("\n"), qos=1, retain=self._retain)
            with self._changed:
                problem = self._early.pop(info.mid, None)
                if problem is None:
                    self._waiting.add(info.mid)
                else:
                    self._problem = self._problem or problem
        self._until(lambda: not self._waiting, "not acknowledged by the broker")

    def close(self) -> None:
        made, self._client = self._client, None
        if made is not None:
            made.on_disconnect = None
            made.disconnect()
            made.loop_stop()

    def _until(self, done: Any, late: str) -> None:
        end = time.monotonic() + self._timeout_s
        with self._changed:
            self._changed.wait_for(lambda: self._problem or done(), max(0.0, end - time.monotonic()))
            if self._problem:
                raise OSError(self._problem)
            if not done():
                raise OSError(f"{late} within {self._timeout_s:g} s")

    def _on_connect(self, _client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        with self._changed:
            if reason.is_failure:
                self._problem = refusal(reason)
            else:
                self._connected = True
            self._changed.notify_all()

    def _on_disconnect(self, _client: Any, _data: Any, flags: Any, reason: Any, _properties: Any) -> None:
        with self._changed:
            said = f": {str(reason).lower()}" if flags.is_disconnect_packet_from_server else ""
            self._problem = self._problem or f"the connection to the broker was lost{said}"
            self._changed.notify_all()

    def _on_publish(self, _client: Any, _data: Any, mid: int, reason: Any, _properties: Any) -> None:
        problem = refusal(reason) if reason.is_failure else ""
        with self._changed:
            if mid in self._waiting:
                self._waiting.discard(mid)
                self._problem = self._problem or problem
            else:
                self._early[mid] = problem
            self._changed.notify_all()
