"""Where samples come from, by address."""

from __future__ import annotations

from edge_ssm.errors import UsageError
from edge_ssm.io.address import Endpoint, place
from edge_ssm.io.sources.base import BLOCK, Source
from edge_ssm.model.network import InputSpec

PACED_BLOCK = 1 << 10
"""A snapshot is taken between two blocks: where they are played back slowly, they must be short."""

SCHEMES = ("serial", "tcp", "tcp-listen", "udp", "unix", "unix-listen", "mqtt", "mqtts", "iio")


_IIO_OPTIONS = ("elements", "length", "watermark", "trigger", "sampling_frequency", "raw")
_MQTT_OPTIONS = ("client_id", "receive_maximum", "in_flight", "session_expiry")


def open_source(text: str, spec: InputSpec, follow: bool = False, paced: bool = False) -> Source:
    """The source that ``text`` names: "-", a file, or SCHEME://... (docs/service.md). Raises UsageError."""
    from edge_ssm.io.sources import file, socket

    found = place(text, SCHEMES)
    if found.scheme in ("std", "file"):
        return file.FileSource(text, follow, PACED_BLOCK if paced else BLOCK)
    if follow:
        raise UsageError(f"--follow: only for a file, not {found.shown}")
    if found.scheme in ("serial", "iio", "mqtt", "mqtts"):
        return _device(found, spec)
    found.known_options()
    if found.scheme == "udp":
        return socket.UdpSource(found.shown, found.address())
    address = found.socket_path() if found.scheme.startswith("unix") else found.address()
    made = socket.ListenSource if found.scheme.endswith("-listen") else socket.ConnectSource
    return made(found.shown, address)


def _device(found: Endpoint, spec: InputSpec) -> Source:
    if found.scheme == "serial":
        return _serial(found)
    if found.scheme == "iio":
        return _iio(found, spec)
    from edge_ssm.io.mqtt import access_of
    from edge_ssm.io.sources.mqtt import MqttSource

    access = access_of(found, *_MQTT_OPTIONS)
    made = MqttSource(
        found.text,
        access,
        client_id=found.options.get("client_id"),
        receive_maximum=found.whole("receive_maximum", 1000),
        session_expiry_s=found.whole("session_expiry", 7 * 24 * 3600),
    )
    made.most_in_flight = found.whole("in_flight", made.most_in_flight)
    return made


def _serial(found: Endpoint) -> Source:
    from edge_ssm.io.sources.serial import SerialSource

    options = found.known_options("baud", "parity", "stop_bits", "data_bits", "flow")
    if found.host or len(found.path) < 2:
        raise UsageError(f"{found.shown}: expected serial:///dev/DEVICE?baud=115200")
    try:
        stop_bits = float(options.get("stop_bits", "1"))
    except ValueError:
        raise UsageError(f"{found.shown}: stop_bits {options['stop_bits']!r}, expected 1, 1.5 or 2") from None
    return SerialSource(
        found.path,
        found.whole("baud", 115200),
        parity=options.get("parity", "none"),
        stop_bits=stop_bits,
        data_bits=found.whole("data_bits", 8),
        flow=options.get("flow", "none"),
    )


def _iio(found: Endpoint, spec: InputSpec) -> Source:
    from edge_ssm.io.sources.iio import IioSource

    options = found.known_options(*_IIO_OPTIONS)
    if not found.host and len(found.path) < 2:
        raise UsageError(f"{found.shown}: expected iio://NAME or iio:///dev/iio:device0")
    frequency = options.get("sampling_frequency")
    try:
        hertz = None if frequency is None else float(frequency)
    except ValueError:
        raise UsageError(f"{found.shown}: sampling_frequency {frequency!r}, expected a number of hertz") from None
    return IioSource(
        found.host or found.path,
        spec,
        elements=options["elements"].split(",") if "elements" in options else None,
        length=found.whole("length", 1024),
        watermark=found.whole("watermark", 1) if "watermark" in options else None,
        trigger=options.get("trigger"),
        sampling_frequency=hertz,
        raw="raw" in options,
    )


def validate(text: str) -> Endpoint:
    """What ``text`` names, checked as far as it can be without opening anything. Raises UsageError."""
    found = place(text, SCHEMES)
    if found.scheme == "serial":
        _serial(found).close()  # It opens its device with the first read.
    elif found.scheme in ("mqtt", "mqtts"):
        from edge_ssm.io import mqtt

        access = mqtt.access_of(found, *_MQTT_OPTIONS)
        mqtt.client(mqtt.parse(found.text, wildcards=True), access, "")
        for option in ("receive_maximum", "in_flight", "session_expiry"):
            found.whole(option, 1)
    elif found.scheme == "iio":
        found.known_options(*_IIO_OPTIONS)
    elif found.scheme.startswith("unix"):
        found.known_options()
        found.socket_path()
    elif found.scheme in ("tcp", "tcp-listen", "udp"):
        found.known_options()
        found.address()
    return found
