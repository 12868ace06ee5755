"""What the MQTT source and the MQTT sink share: addresses, credentials, and a paho-mqtt client."""

from __future__ import annotations

import hashlib
import platform
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_ssm.errors import UsageError
from edge_ssm.files import read_first_line, read_problem
from edge_ssm.io.address import Endpoint, check_host

PORTS = {"mqtt": 1883, "mqtts": 8883}
"""Default port of each scheme."""


@dataclass(frozen=True)
class Credentials:
    """How this device identifies itself to the broker, and the broker to it. Files are given by their paths."""

    username: str | None = None
    password: str | None = field(default=None, repr=False)
    password_file: str | None = None
    """Its first line is the password, read again for each connection."""
    ca_file: str | None = None
    """Certificates to trust instead of the system's."""
    cert_file: str | None = None
    """This device's certificate (PEM)."""
    key_file: str | None = None
    """The key of this device's certificate (PEM)."""

    def current_password(self) -> str | None:
        """Return the password. Raises OSError if its file cannot be read."""
        return self.password if self.password_file is None else read_first_line(self.password_file)


@dataclass(frozen=True)
class TopicAddress:
    """A topic at a broker."""

    url: str
    host: str
    port: int
    topic: str
    tls: bool


def parse_topic_address(url: str, wildcards: bool) -> TopicAddress:
    """Parse ``mqtt://host[:port]/topic`` or ``mqtts://host[:port]/topic``.

    The topic is everything after the slash, unchanged: ``#`` and ``%`` have no other meaning. It may contain
    ``wildcards`` for a subscription only. Raises UsageError.
    """
    match = re.fullmatch(r"(mqtts?)://(\[[0-9A-Fa-f:.]+\]|[^/:\[\]]+)(?::(\d{1,5}))?/(.+)", url, re.S)
    redacted = re.sub(r"//[^/]*@", "//...@", url)
    if match is None or "@" in match[2]:
        hint = "; give user and password by options, not in the address" if redacted != url else ""
        raise UsageError(f"{redacted}: expected mqtt://host[:port]/topic or mqtts://host[:port]/topic{hint}")
    scheme, host, port, topic = match.groups()
    if port is not None and not 0 < int(port) < 1 << 16:
        raise UsageError(f"{url}: port {port}: expected 1 to 65535")
    check_host(host, redacted)
    if "\0" in topic or len(topic.encode(errors="replace")) > 65535:
        raise UsageError(f"{url[:80]}: the topic is too long, or has a NUL")
    levels = topic.split("/")
    is_misplaced = (
        any(("#" in level or "+" in level) and level not in ("#", "+") for level in levels) or "#" in levels[:-1]
    )
    if is_misplaced or (not wildcards and {"#", "+"} & set(levels)):
        expected = "+ for one level, # for the last ones" if wildcards else "a topic without + and #"
        raise UsageError(f"{url}: topic {topic!r}: expected {expected}")
    return TopicAddress(url, host.strip("[]"), int(port or PORTS[scheme]), topic, scheme == "mqtts")


def is_loop(source: TopicAddress, sink: TopicAddress) -> bool:
    """Return True if ``source`` would receive what is published to ``sink``.

    Only the addresses are compared, although a broker can have several names. Raises ImportError without paho-mqtt.
    """
    from paho.mqtt.client import topic_matches_sub

    # One broker listens on both default ports, one of them with TLS; two brokers on one machine use others.
    ports = {source.port, sink.port}
    if source.host.lower() != sink.host.lower() or not (len(ports) == 1 or ports == set(PORTS.values())):
        return False
    subscription = re.sub(r"^\$share/[^/]*/", "", source.topic)  # a shared subscription: MQTT 5.0, section 4.8.2
    return bool(topic_matches_sub(subscription, sink.topic))


def create_client(address: TopicAddress, credentials: Credentials, client_id: str, **options: Any) -> Any:
    """Return a ``paho.mqtt.client.Client`` for MQTT 5 that is not connected.

    Raises UsageError without paho-mqtt, and for a file that cannot be used.
    """
    try:
        import paho.mqtt.client as paho
    except ImportError:
        raise UsageError(f"{address.url}: needs paho-mqtt 2; install it: pip install 'edge-ssm[mqtt]'") from None
    if not hasattr(paho, "CallbackAPIVersion"):
        raise UsageError(f"{address.url}: paho-mqtt is older than 2; upgrade it: pip install -U 'edge-ssm[mqtt]'")
    client = paho.Client(
        paho.CallbackAPIVersion.VERSION2, client_id, protocol=paho.MQTTv5, reconnect_on_failure=False, **options
    )
    if credentials.password is not None and credentials.password_file is not None:
        raise UsageError(f"{address.url}: both a password and a password file; expected one of them")
    if credentials.username is None and (credentials.password or credentials.password_file) is not None:
        raise UsageError(f"{address.url}: a password without a user name")
    set_password(client, address, credentials)
    if address.tls:
        client.tls_set_context(_tls(address, credentials))
    elif credentials.ca_file or credentials.cert_file or credentials.key_file:
        raise UsageError(f"{address.url}: certificates are for mqtts://, this is mqtt://")
    return client


def set_password(client: Any, address: TopicAddress, credentials: Credentials) -> None:
    """Give the client its user name and the current password. Raises UsageError if the file cannot be read."""
    if credentials.username is None:
        return
    try:
        client.username_pw_set(credentials.username, credentials.current_password())
    except OSError as error:
        raise UsageError(f"{address.url}: password file {credentials.password_file}: {read_problem(error)}") from None


def _tls(address: TopicAddress, credentials: Credentials) -> ssl.SSLContext:
    if credentials.key_file and not credentials.cert_file:
        raise UsageError(f"{address.url}: a key without a certificate")
    try:
        context = ssl.create_default_context(cafile=credentials.ca_file)
        if credentials.cert_file:
            # Without a callback, OpenSSL would ask for the key's passphrase on the terminal.
            context.load_cert_chain(credentials.cert_file, credentials.key_file, password=lambda: "")
    except (OSError, ValueError) as error:
        files = ", ".join(f for f in (credentials.ca_file, credentials.cert_file, credentials.key_file) if f)
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise UsageError(f"{address.url}: certificates cannot be used ({reason}): {files}") from None
    return context


def device_id(purpose: str) -> str:
    """Return a client id that is stable on this machine, differs between machines, and does not identify it."""
    try:
        machine = Path("/etc/machine-id").read_text().strip()
    except OSError:
        machine = platform.node()
    return "edge-ssm-" + hashlib.sha256(f"edge-ssm {machine} {purpose}".encode()).hexdigest()[:14]


def refusal_text(reason: object) -> str:
    """Return a broker's reason code in words, with the remedy if there is one for the user."""
    text = str(reason)
    if text in ("Bad user name or password", "Not authorized"):
        return f"the broker refused: {text.lower()}; check the user name and the password"
    return f"the broker refused: {text.lower()}"


def credentials_from(endpoint: Endpoint, *others: str) -> Credentials:
    """Return the credentials in an endpoint's options: username, password_file, ca_file, cert_file, key_file.

    Raises UsageError for an option that is neither one of them nor one of ``others``.
    """
    names = ("username", "password_file", "ca_file", "cert_file", "key_file")
    options = endpoint.known_options(*names, *others)
    return Credentials(**{name: options[name] for name in names if name in options})
