"""A real MQTT broker on a free loopback port, which tests can kill and restart, and a publisher of numbers."""

import contextlib
import getpass
import re
import shutil
import socket
import subprocess
import time

import pytest


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Broker:
    def __init__(self, folder, *settings, port=None, listener=()):
        self.program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
        if self.program is None:
            pytest.skip("mosquitto is not installed")
        self.port = port or free_port()
        self.awaited_subscriptions = 0
        """Subscriptions that a test has waited for."""
        self._process = None
        self._log = folder / "mosquitto.log"
        self._configuration = folder / "mosquitto.conf"
        lines = [
            f"user {getpass.getuser()}",  # Started as root, it would switch to a user that cannot read the folder.
            f"listener {self.port} 127.0.0.1",
            *listener,
            *(settings or ["allow_anonymous true"]),
            "persistence true",
            f"persistence_location {folder}/",
            "autosave_interval 1",
            "autosave_on_changes true",
            "max_queued_messages 0",
            *(f"log_type {kind}" for kind in ("error", "warning", "notice", "information", "subscribe")),
        ]
        self._configuration.write_text("\n".join(lines) + "\n")

    @property
    def url(self):
        return f"mqtt://127.0.0.1:{self.port}"

    def start(self):
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [self.program, "-c", self._configuration], stdout=log, stderr=subprocess.STDOUT
            )
        for _ in range(500):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return self
            assert self._process.poll() is None, self._log.read_text()
            time.sleep(0.02)
        raise AssertionError(self._log.read_text())

    def kill(self):
        """Kill the broker like a power cut: it saves nothing and informs nobody."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def subscriptions(self):
        """Return how often a client has subscribed to a topic so far, with any start of the broker."""
        return len(re.findall(r"^\d+: \S+ [012] \S+$", self._log.read_text(errors="replace"), re.M))

    def saved_after(self, moment):
        """Return whether the broker has kept changes made after a time of the clock, and has kept none for a second."""
        path = self._log.with_name("mosquitto.db")
        return path.exists() and moment <= path.stat().st_mtime < time.time() - 1

    def publish(self, topic, *payloads, **options):
        """Publish each with QoS 1, and return when the broker has acknowledged them."""
        import paho.mqtt.client as paho

        client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        client.connect("127.0.0.1", self.port)
        client.loop_start()
        for info in [client.publish(topic, payload, **{"qos": 1, **options}) for payload in payloads]:
            info.wait_for_publish(10)
            assert info.is_published()
        client.disconnect()
        client.loop_stop()
