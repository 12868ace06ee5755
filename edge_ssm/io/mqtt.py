"""What the MQTT source and the MQTT outlet share: the address, who one is there, and a client of paho-mqtt."""

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


@dataclass(frozen=True)
class Access:
    """Who we are for the broker, and how we know it. Paths of files; None: not used."""

    username: str | None = None
    password: str | None = field(default=None, repr=False)
    password_file: str | None = None
    """Its first line is the password; read anew at every connection."""
    ca_file: str | None = None
    """Certificates that are trusted in place of the system's."""
    cert_file: str | None = None
    key_file: str | None = None
    """This device's own certificate and its key (PEM)."""

    def secret(self) -> str | None:
        """Return the password. Raises OSError if its file cannot be read."""
        return self.password if self.password_file is None else read_first_line(self.password_file)


@dataclass(frozen=True)
class Address:
    url: str
    host: str
    port: int
    topic: str
    tls: bool


def parse(url: str, wildcards: bool) -> Address:
    """``mqtt://host[:port]/topic`` or ``mqtts://``. The topic is all after the first slash, as it stands there: ``#``
    and ``%`` mean nothing else. Raises UsageError."""
    match = re.fullmatch(r"(mqtts?)://(\[[0-9A-Fa-f:.]+\]|[^/:\[\]]+)(?::(\d{1,5}))?/(.+)", url, re.S)
    shown = re.sub(r"//[^/]*@", "//...@", url)
    if match is None or "@" in match[2]:
        hint = "; give user and password by options, not in the address" if shown != url else ""
        raise UsageError(f"{shown}: expected mqtt://host[:port]/topic or mqtts://host[:port]/topic{hint}")
    scheme, host, port, topic = match.groups()
    if port is not None and not 0 < int(port) < 1 << 16:
        raise UsageError(f"{url}: port {port}: expected 1 to 65535")
    check_host(host, shown)
    if "\0" in topic or len(topic.encode(errors="replace")) > 65535:
        raise UsageError(f"{url[:80]}: the topic is too long, or has a NUL")
    levels = topic.split("/")
    misplaced = (
        any(("#" in level or "+" in level) and level not in ("#", "+") for level in levels) or "#" in levels[:-1]
    )
    if misplaced or (not wildcards and {"#", "+"} & set(levels)):
        expected = "+ for one level, # for the last ones" if wildcards else "a topic without + and #"
        raise UsageError(f"{url}: topic {topic!r}: expected {expected}")
    return Address(url, host.strip("[]"), int(port or PORTS[scheme]), topic, scheme == "mqtts")


def comes_back(source: Address, sink: Address) -> bool:
    """Whether what goes to ``sink`` is what ``source`` asks for, as far as addresses tell: a broker can have several
    names. Raises ImportError without paho-mqtt."""
    from paho.mqtt.client import topic_matches_sub

    # A broker listens on both default ports, one with TLS; two brokers on one machine have others.
    ports = {source.port, sink.port}
    if source.host.lower() != sink.host.lower() or not (len(ports) == 1 or ports == set(PORTS.values())):
        return False
    shared = re.sub(r"^\$share/[^/]*/", "", source.topic)  # subscribers that share it: MQTT 5.0, section 4.8.2
    return bool(topic_matches_sub(shared, sink.topic))


def client(address: Address, access: Access, client_id: str, **options: Any) -> Any:
    """A ``paho.mqtt.client.Client`` for MQTT 5 that is not connected. Raises UsageError: no paho-mqtt, a file that
    can't be used."""
    try:
        import paho.mqtt.client as paho
    except ImportError:
        raise UsageError(f"{address.url}: needs paho-mqtt 2; install it: pip install 'edge-ssm[mqtt]'") from None
    if not hasattr(paho, "CallbackAPIVersion"):
        raise UsageError(f"{address.url}: paho-mqtt is older than 2; renew it: pip install -U 'edge-ssm[mqtt]'")
    made = paho.Client(
        paho.CallbackAPIVersion.VERSION2, client_id, protocol=paho.MQTTv5, reconnect_on_failure=False, **options
    )
    if access.password is not None and access.password_file is not None:
        raise UsageError(f"{address.url}: both a password and a password file; expected one of them")
    if access.username is None and (access.password or access.password_file) is not None:
        raise UsageError(f"{address.url}: a password without a user name")
    log_in(made, address, access)
    if address.tls:
        made.tls_set_context(_tls(address, access))
    elif access.ca_file or access.cert_file or access.key_file:
        raise UsageError(f"{address.url}: certificates are for mqtts://, this is mqtt://")
    return made


def log_in(made: Any, address: Address, access: Access) -> None:
    """Hand the client its user name and password. Raises UsageError if the password's file can't be read."""
    if access.username is None:
        return
    try:
        made.username_pw_set(access.username, access.secret())
    except OSError as error:
        raise UsageError(f"{address.url}: password file {access.password_file}: {read_problem(error)}") from None


def _tls(address: Address, access: Access) -> ssl.SSLContext:
    if access.key_file and not access.cert_file:
        raise UsageError(f"{address.url}: a key without its certificate")
    try:
        context = ssl.create_default_context(cafile=access.ca_file)
        if access.cert_file:
            # Without a callback OpenSSL would ask for the key's passphrase on the terminal, for ever.
            context.load_cert_chain(access.cert_file, access.key_file, password=lambda: "")
    except (OSError, ValueError) as error:
        files = ", ".join(f for f in (access.ca_file, access.cert_file, access.key_file) if f)
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise UsageError(f"{address.url}: certificates can't be used ({reason}): {files}") from None
    return context


def device_id(purpose: str) -> str:
    """A client id that stays the same on this machine and differs between machines, without telling which it is."""
    try:
        machine = Path("/etc/machine-id").read_text().strip()
    except OSError:
        machine = platform.node()
    return "edge-ssm-" + hashlib.sha256(f"edge-ssm {machine} {purpose}".encode()).hexdigest()[:14]


def refusal(reason: object) -> str:
    """A broker's reason code in words, with what to do where the user can do it."""
    text = str(reason)
    if text in ("Bad user name or password", "Not authorized"):
        return f"the broker refused: {text.lower()}; check the user name and the password"
    return f"the broker refused: {text.lower()}"


def access_of(place: Endpoint, *others: str) -> Access:
    """From an address's options: username, password_file, ca_file, cert_file, key_file; ``others`` are known too.

    Raises UsageError for an option that is none of them.
    """
    names = ("username", "password_file", "ca_file", "cert_file", "key_file")
    options = place.known_options(*names, *others)
    return Access(**{name: options[name] for name in names if name in options})
