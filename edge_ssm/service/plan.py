"""What a configuration would run, found out beforehand: everything it names is read, no device is opened and no port
bound. What is refused here, ``edge-ssm run`` would refuse as well."""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from edge_ssm.engines.registry import ENGINES, missing
from edge_ssm.errors import EdgeSSMError, UsageError
from edge_ssm.formats import signatures
from edge_ssm.hardware import boards
from edge_ssm.io import address, mqtt
from edge_ssm.io.address import Endpoint
from edge_ssm.io.codecs import registry as codecs
from edge_ssm.io.sinks import registry as sinks
from edge_ssm.io.sources import registry as sources
from edge_ssm.model.network import Network
from edge_ssm.runtime.windows import Windows
from edge_ssm.service import feedback, models
from edge_ssm.service import run as service_run
from edge_ssm.service import settings as service_settings
from edge_ssm.service.settings import Settings
from edge_ssm.telemetry import http, prometheus
from edge_ssm.text import sanitize

LISTENING = ("tcp-listen", "unix-listen", "udp")
"""Sources whose socket systemd may open in their place."""


@dataclass
class Plan:
    settings: Settings
    source: Endpoint
    sink: Endpoint
    lines: list[tuple[str, str]] = field(default_factory=list)
    """What will run: a word, and a line about it."""
    warnings: list[str] = field(default_factory=list)
    needs: dict[str, str] = field(default_factory=dict)
    """What must be opened for it (loopback, network, serial, iio, gpu), and the key that says so."""

    def render(self) -> str:
        # A path or a label is somebody's text: a newline in one must not make a line of its own.
        return "\n".join(sanitize(f"{word:<9} {line}") for word, line in self.lines)


def check(path: str) -> Plan:
    """Raises UsageError, naming file, line and key, for whatever would keep the configuration from running."""
    try:
        settings = service_settings.settings(path, {})
    except UsageError as error:
        # What no key says alone begins with the key's name.
        if found := re.match(r"(\w+)\.(\w+) ", str(error)):
            told = service_settings.SECTIONS.get(found[1], {}).get(found[2])
            if told is not None:
                rest = str(error)[found.end() :]
                raise UsageError(f"{service_settings.where(path, told)} {rest}") from None
        raise
    return _Check(path, settings).plan


class _Check:
    def __init__(self, path: str, settings: Settings) -> None:
        self._path, self._settings = path, settings
        with self._at("input"):
            source = sources.validate(settings.input)
        with self._at("output"):
            sink = sinks.validate(settings.output)
            feedback.check(settings)
            address.check_not_an_input(settings.output, [path])
        self.plan = Plan(settings, source, sink)
        network = self._model()
        windows = self._windows(network)
        self._members(network)
        self._source(network)
        self._window_line(network, windows)
        self._engine(windows)
        self._sink()
        self._state()
        self._metrics()

    @contextmanager
    def _at(self, name: str) -> Iterator[None]:
        """Errors within are about this field."""
        try:
            yield
        except EdgeSSMError as error:
            raise UsageError(f"{service_settings.where(self._path, name)}: {error}") from None

    def _say(self, word: str, line: str) -> None:
        self.plan.lines.append((word, line))

    def _warn(self, name: str, line: str) -> None:
        self.plan.warnings.append(f"{service_settings.where(self._path, name)}: {line}")

    def _model(self) -> Network:
        settings = self._settings
        with self._at("require_signature"):
            for key in settings.require_signature:
                signatures.load_key(Path(key))
        with self._at("model"):
            model, network = models.load(settings.model, settings.sample_rate, settings.require_signature)
        self._asked = model.resolve_engine
        self._digest = model.digest
        signed = ", signed" if settings.require_signature else ""
        kept = ", reloaded when it changes" if settings.reload else ""
        self._say("model", f"{settings.model}, digest {model.digest[:12]}{signed}{kept}")
        self._say("reads", f"{len(network.input.channels)} channels: {', '.join(network.input.channels)}")
        with self._at("pace" if settings.pace else "time_gaps"):
            service_run.check_rate(settings, network)
        return network

    def _windows(self, network: Network) -> Windows:
        with self._at("hop"):
            return Windows(network, self._settings.hop, self._settings.carry)

    def _members(self, network: Network) -> None:
        settings = self._settings
        loaded = {self._digest: settings.model}
        for path in settings.member:
            with self._at("member"):
                model, member = models.load(path, settings.sample_rate, settings.require_signature)
                models.check_channels(path, member, network)
                if not models.same_windows(member, network):
                    raise UsageError(f"{path}: its windows or labels are not those of {settings.model}")
                if model.digest in loaded:
                    raise UsageError(f"{path}: is {loaded[model.digest]}, or there twice; expected a smaller model")
            loaded[model.digest] = path
            self._threads(model.resolve_engine(settings.engine))
            self._say("member", f"{path}, digest {model.digest[:12]}")

    def _source(self, network: Network) -> None:
        settings, found = self._settings, self.plan.source
        if settings.follow and found.scheme != "file":
            with self._at("follow"):
                raise UsageError("only for a file")
        codec = settings.format or codecs.guess_format(settings.input)
        with self._at("scale"):
            codecs.decoder(codec, network.input, service_run.scale_factors(settings.scale))
        if found.scheme == "file":
            self._source_file(Path(found.path))
        self._needs("input", found)
        silent = f", stale after {settings.stale_after:g} s" if settings.stale_after else ""
        self._say("source", f"{found.redacted}, {codec}{', followed' if settings.follow else ''}{silent}")

    def _source_file(self, path: Path) -> None:
        try:
            mode = path.stat().st_mode
        except OSError as error:
            self._warn("input", f"{path}: not there now ({error.strerror}); the run ends with status 2 until it is")
            return
        if stat.S_ISDIR(mode):
            with self._at("input"):
                raise UsageError(f"{path}: a directory; expected a file, a named pipe or a device")
        if stat.S_ISFIFO(mode) and not self._settings.follow:
            self._warn("input", "a named pipe ends with its first writer; source.follow = true waits for the next")
        if stat.S_ISCHR(mode) and re.match(r"/dev/(tty|serial/)", str(path)):
            self.plan.needs["serial"] = "input"

    def _window_line(self, network: Network, windows: Windows) -> None:
        rate = network.input.sample_rate_hz
        hz = f" at {rate:g} Hz" if rate else ""
        how = "an output a sample" if network.pooling == "none" else f"{network.window} samples, hop {windows.hop}"
        self._say("windows", f"{how}{hz}; {windows.lanes} at once; gaps: {self._settings.gap}")

    def _engine(self, windows: Windows) -> None:
        settings = self._settings
        with self._at("engine"):
            if settings.engine not in ("auto", *ENGINES):
                raise UsageError(f"{settings.engine!r}: unknown, expected auto, {', '.join(ENGINES)}")
            name = self._asked(settings.engine)
            if name != "auto" and (why := missing(name)):
                raise UsageError(why)
        if settings.engine in ENGINES and ENGINES[settings.engine].nodes:
            self.plan.needs["gpu"] = "engine"
        self._threads(name)
        named = None
        with self._at("profile"):
            if settings.profile != "none":
                named, warning = boards.select(settings.profile)
                if warning:
                    self._warn("profile", warning)
        with self._at("latency_budget" if settings.latency_budget and settings.chunk != "auto" else "chunk"):
            chunk = service_run.chunk_asked(settings, str(named.profile.runtime.chunk) if named else "1")
        if settings.affinity and not set(settings.affinity) & set(range(os.cpu_count() or 1)):
            with self._at("affinity"):
                raise UsageError(f"{settings.affinity}: no such core, this machine has {os.cpu_count()}")
        self._say(
            "engine",
            f"{name}; profile {named.name if named else 'none'}; "
            f"{'as many samples as the budget allows' if chunk is None else chunk} a call; "
            f"deadline {settings.deadline or (named.profile.runtime.deadline_periods if named else 1):g} periods"
            + (f"; real-time priority {settings.fifo}" if settings.fifo else ""),
        )

    def _threads(self, name: str) -> None:
        """For a model on the engine ``name``."""
        threads = self._settings.threads
        with self._at("threads"):
            if threads is not None and not (name in ENGINES and ENGINES[name].graphs):
                takes = " or ".join(known for known, entry in ENGINES.items() if entry.graphs)
                raise UsageError(f"{threads}: not for the engine {name}; only {takes} take a number of threads")

    def _sink(self) -> None:
        settings, found = self._settings, self.plan.sink
        if found.scheme == "file":
            self._sink_file(found.path)
        self._needs("output", found)
        rotated = f", rotated at {settings.rotate_bytes} bytes" if settings.rotate_bytes else ""
        self._say("sink", f"{'stdout' if found.scheme == 'std' else found.redacted}{rotated}")

    def _sink_file(self, path: str) -> None:
        with self._at("output"):
            if path.endswith("/") or os.path.isdir(path):
                raise UsageError(f"{path}: a directory; expected a file")
            if os.path.exists(path):
                if not os.access(path, os.W_OK):
                    raise UsageError(f"{path}: can't be written (no permission); give another file")
                return
            folder = os.path.dirname(os.path.realpath(path))  # a link may lead to what is not there yet
            if os.path.isdir(folder):
                if not _takes_files(folder):
                    raise UsageError(f"{path}: can't be written (no new files in {folder}); give another file")
                return
        self._warn("output", f"{folder}: not there now; the run ends with status 2 until it is")

    def _state(self) -> None:
        settings = self._settings
        if settings.state is None:
            self._say("state", "none kept by this file (edge-ssm@.service keeps its own)")
            return
        with self._at("state"):
            folder = Path(settings.state)
            there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
            if not os.path.isdir(there) or not _takes_files(there):
                raise UsageError(f"{folder}: snapshots can't be kept there ({there}: no permission, or no folder)")
        self._say("state", f"{folder}, every {settings.snapshot_interval:g} s")

    def _metrics(self) -> None:
        listen = self._settings.listen
        if listen is None:
            return
        with self._at("listen"):
            host, port = http.parse_listen(listen)
        with self._at("prometheus"):
            if self._settings.prometheus:
                prometheus.require()
        self._open("listen", host)
        self._say("page", f"{host} port {port}{', with metrics' if self._settings.prometheus else ''}")

    def _needs(self, name: str, found: Endpoint) -> None:
        if found.scheme in ("serial", "iio"):
            self.plan.needs[found.scheme] = name
        elif found.scheme in ("mqtt", "mqtts"):
            self._open(name, mqtt.parse_topic_address(found.text, wildcards=True).host)
        elif found.scheme not in ("std", "file") and not found.scheme.startswith("unix"):
            self._open(name, found.host)

    def _open(self, name: str, host: str) -> None:
        """A socket to, or at, ``host``; empty: loopback."""
        self.plan.needs["loopback" if not host or loopback(host) else "network"] = name


def loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _takes_files(folder: str | Path) -> bool:
    """Whether a new file could be made there, without trying. Root is let by os.access where /proc and /sys let
    nobody."""
    kernel = [os.stat(place).st_dev for place in ("/proc", "/sys") if os.path.ismount(place)]
    return os.access(folder, os.W_OK | os.X_OK) and os.stat(folder).st_dev not in kernel
