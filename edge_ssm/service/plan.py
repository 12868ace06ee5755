"""Resolve the settings of a run into a plan: everything that can be decided before anything is opened.

``resolve`` is the only place where the rules of a run are written. It reads the files that the settings name, but opens
no device, binds no port and changes nothing. ``edge-ssm run`` executes the plan (``service.run``), ``edge-ssm service
check`` prints it (``service.check``), and ``edge-ssm service install`` reads its requirements.
"""

from __future__ import annotations

import ipaddress
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edge_ssm.engines.entries import ENGINES, installed, missing
from edge_ssm.errors import EdgeSSMError, EngineUnavailable, UsageError
from edge_ssm.formats import signatures
from edge_ssm.formats.loading import Model
from edge_ssm.hardware import boards
from edge_ssm.hardware.boards import NamedProfile
from edge_ssm.io import address, mqtt
from edge_ssm.io.address import Endpoint
from edge_ssm.io.codecs import registry as codecs
from edge_ssm.io.sinks import formats
from edge_ssm.io.sinks import registry as sinks
from edge_ssm.io.sinks.file import FileOptions
from edge_ssm.io.sinks.queue import Overflow
from edge_ssm.io.sources import registry as sources
from edge_ssm.model.network import Network
from edge_ssm.runtime import batching
from edge_ssm.runtime.windows import Windows
from edge_ssm.service import feedback, models, paths
from edge_ssm.service.adaptation import Limits
from edge_ssm.service.settings import Settings

Requirement = Literal["loopback", "network", "serial", "iio", "gpu"]
"""What a run needs beyond files, and what a sandbox must therefore permit."""


@dataclass(frozen=True)
class PlannedModel:
    """A model file that was read and checked, but has no engine yet."""

    path: str
    model: Model
    network: Network
    """At the stream's sample rate."""
    engine: str
    """Name of the engine to run it on, or "auto"."""


@dataclass(frozen=True)
class PlanWarning:
    """What may prevent the run, but depends on the moment: a file that does not exist yet, hardware that is absent."""

    setting: str
    text: str


@dataclass(frozen=True)
class RunPlan:
    """Everything about a run that follows from its settings and from the files that they name."""

    settings: Settings
    source: Endpoint
    sink: Endpoint
    codec: str
    scale: tuple[float, ...]
    model: PlannedModel
    members: tuple[PlannedModel, ...]
    """Smaller models of the same family, in the order of the settings."""
    windows: Windows
    """Unused windows of the model; ``make_windows`` makes more."""
    board: NamedProfile | None
    cores: frozenset[int]
    """CPU cores to run on; empty for any."""
    chunk: int | None
    """Samples per call of the engine; None for as many as the latency budget allows, by measurement."""
    deadline_periods: float
    limits: Limits
    overflow: Overflow
    output_format: str
    file_options: FileOptions
    state: Path | None
    listen: tuple[str, int] | None
    """Host and port of the status page."""
    warnings: tuple[PlanWarning, ...]
    requirements: dict[Requirement, str]
    """Each requirement, with the name of the setting that causes it."""

    def make_windows(self, network: Network) -> Windows:
        """Return new windows for ``network``. Raise UsageError if the hop does not fit its window."""
        return Windows(network, self.settings.hop, self.settings.carry)

    @property
    def sample_rate_hz(self) -> float | None:
        """The sample rate of the stream, where it is known."""
        return self.model.network.input.sample_rate_hz

    @property
    def is_live(self) -> bool:
        """True if samples arrive as they are taken, which a late decision can fall behind."""
        return self.source.scheme not in ("std", "file")

    @property
    def latency_budget_s(self) -> float | None:
        """Time from the last sample of a chunk to its outputs."""
        budget_ms = self.settings.latency_budget
        return None if budget_ms is None else budget_ms / 1e3


def resolve(settings: Settings, config: str | None = None) -> RunPlan:
    """Return the plan of a run with ``settings``, which ``config`` (a path) contains if they came from a file.

    Raises
    ------
    EdgeSSMError
        For whatever keeps the run from starting. ``EdgeSSMError.setting`` names the setting.
    """
    return _Resolver(settings, config).plan()


def usable_cores(affinity: list[int] | None, board: NamedProfile | None) -> frozenset[int]:
    """Return those cores of ``affinity``, or else of the board, that this process may use; empty for any core.

    Raises UsageError if it may use none of ``affinity``.
    """
    wanted = affinity if affinity is not None else board.profile.runtime.affinity if board else []
    permitted = os.sched_getaffinity(0)
    usable = frozenset(wanted) & permitted
    if affinity and not usable:
        raise UsageError(f"--affinity {affinity}: no such core, expected of {sorted(permitted)}")
    return usable


def is_loopback(host: str) -> bool:
    """Return whether ``host`` is this machine; a host that is empty is."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("", "localhost")


@dataclass
class _Resolver:
    """The rules, one method for each group of settings."""

    settings: Settings
    config: str | None
    warnings: list[PlanWarning] = field(default_factory=list)
    requirements: dict[Requirement, str] = field(default_factory=dict)

    def plan(self) -> RunPlan:
        settings = self.settings
        source, sink = self._endpoints()
        model = self._model()
        with self._about("hop"):
            windows = Windows(model.network, settings.hop, settings.carry)
        members = self._members(model)
        codec, scale = self._codec(source, model.network)
        self._source(source)
        board = self._board()
        self._engine(model)
        chunk = self._chunk(model.network, board)
        with self._about("affinity"):
            cores = usable_cores(settings.affinity, board)
        self._sink(sink)
        return RunPlan(
            settings=settings,
            source=source,
            sink=sink,
            codec=codec,
            scale=scale,
            model=model,
            members=members,
            windows=windows,
            board=board,
            cores=cores,
            chunk=chunk,
            deadline_periods=settings.deadline or (board.profile.runtime.deadline_periods if board else 1.0),
            limits=self._limits(board),
            overflow=settings.overflow or ("wait" if source.scheme in ("std", "file") else "drop-oldest"),
            output_format=self._output_format(),
            file_options=self._file_options(),
            state=self._state(),
            listen=self._listen(),
            warnings=tuple(self.warnings),
            requirements=self.requirements,
        )

    @contextmanager
    def _about(self, setting: str) -> Iterator[None]:
        """Attribute errors within to a setting."""
        try:
            yield
        except EdgeSSMError as error:
            error.setting = error.setting or setting
            raise

    def _warn(self, setting: str, *texts: str) -> None:
        self.warnings += [PlanWarning(setting, text) for text in texts]

    def _endpoints(self) -> tuple[Endpoint, Endpoint]:
        settings = self.settings
        with self._about("input"):
            source = sources.validate(settings.input)
        with self._about("pace"):
            if settings.pace and source.scheme not in ("std", "file"):
                raise UsageError(f"--pace: only for a recording; {source.scheme}:// sets the pace itself")
        with self._about("rotate_bytes"):
            if settings.rotate_bytes and settings.output == "-":
                raise UsageError("--rotate-bytes: only for a file, see --output")
        with self._about("output"):
            sink = sinks.validate(settings.output)
            feedback.check(settings)
            if self.config is not None:
                address.check_not_an_input(settings.output, [self.config])
        return source, sink

    def _model(self) -> PlannedModel:
        settings = self.settings
        with self._about("require_signature"):
            for key in settings.require_signature:
                signatures.load_key(Path(key))
        with self._about("model"):
            model, network = models.load(settings.model, settings.sample_rate, settings.require_signature)
        for name, flag in (("pace", "--pace"), ("time_gaps", "--time-gaps")):
            with self._about(name):
                if getattr(settings, name) and network.input.sample_rate_hz is None:
                    raise UsageError(f"{flag}: the model states no sample rate; give --sample-rate")
        return PlannedModel(settings.model, model, network, model.resolve_engine(settings.engine))

    def _members(self, main: PlannedModel) -> tuple[PlannedModel, ...]:
        settings, members = self.settings, []
        known = {main.model.digest: main.path}
        for path in settings.member:
            with self._about("member"):
                model, network = models.load(path, settings.sample_rate, settings.require_signature)
                models.check_channels(path, network, main.network)
                if not models.same_windows(network, main.network):
                    raise UsageError(f"--member {path}: its windows or labels are not those of {main.path}")
                if model.digest in known:
                    same = f"is {known[model.digest]}, or is listed twice"
                    raise UsageError(f"--member {path}: {same}; expected a smaller model")
            known[model.digest] = path
            engine = model.resolve_engine(settings.engine)
            self._threads(engine)
            members.append(PlannedModel(path, model, network, engine))
        return tuple(members)

    def _codec(self, source: Endpoint, network: Network) -> tuple[str, tuple[float, ...]]:
        settings = self.settings
        codec = settings.format or codecs.guess_format(settings.input)
        with self._about("scale"):
            try:
                scale = tuple(float(part) for part in settings.scale.split(","))
            except ValueError:
                raise UsageError(f"--scale {settings.scale!r}: expected numbers separated by commas") from None
            if source.scheme != "iio":  # which has a decoder of its own
                codecs.decoder(codec, network.input, scale)
        return codec, scale

    def _source(self, source: Endpoint) -> None:
        settings = self.settings
        if settings.follow and source.scheme != "file":
            with self._about("follow"):
                if source.scheme == "std":
                    raise UsageError("--follow: only for a file; standard input ends where it ends, give --input FILE")
                raise UsageError(f"--follow: only for a file, not {source.redacted}")
        if source.scheme == "file":
            path = Path(source.path)
            with self._about("input"):
                self._warn("input", *paths.check_input(path, settings.follow))
            if paths.is_terminal_device(path):
                self.requirements["serial"] = "input"
        self._require("input", source)

    def _board(self) -> NamedProfile | None:
        if self.settings.board == "none":
            return None
        with self._about("board"):
            board, mismatch = boards.select(self.settings.board)
        if mismatch:
            self._warn("board", mismatch)
        return board

    def _engine(self, main: PlannedModel) -> None:
        settings = self.settings
        with self._about("engine"):
            if settings.engine not in ("auto", *ENGINES):
                expected = f"auto, {', '.join(ENGINES)}"
                raise UsageError(f"engine {settings.engine!r}: unknown, expected {expected}")
            if main.engine != "auto":
                if reason := missing(main.engine):
                    raise EngineUnavailable(reason)
                if not installed(main.engine):
                    nodes = ", ".join(ENGINES[main.engine].nodes)
                    self._warn("engine", f"engine {main.engine}: its hardware is absent now (none of {nodes})")
        if settings.engine in ENGINES and ENGINES[settings.engine].nodes:
            self.requirements["gpu"] = "engine"
        self._threads(main.engine)

    def _threads(self, engine: str) -> None:
        """Check the number of threads for a model on ``engine``."""
        threads = self.settings.threads
        with self._about("threads"):
            if threads is not None and not (engine in ENGINES and ENGINES[engine].graphs):
                graph_engines = " or ".join(name for name, entry in ENGINES.items() if entry.graphs)
                raise UsageError(
                    f"--threads {threads}: not for the engine {engine}; only {graph_engines} take a number of threads"
                )

    def _chunk(self, network: Network, board: NamedProfile | None) -> int | None:
        settings = self.settings
        text, budget_ms = str(settings.chunk or (board.profile.runtime.chunk if board else 1)), settings.latency_budget
        with self._about("latency_budget"):
            if text != "auto" and budget_ms is not None:
                raise UsageError("--latency-budget: only with --chunk auto")
        with self._about("chunk"):
            if text != "auto":
                size = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
                if not 1 <= size <= batching.MAX_CHUNK:
                    raise UsageError(f"--chunk {text!r}: expected auto, or 1 to {batching.MAX_CHUNK} samples")
                return size
            if budget_ms is None or not math.isfinite(budget_ms):
                raise UsageError("--chunk auto: needs --latency-budget, in milliseconds")
            if network.pooling == "none" and network.input.sample_rate_hz is None:
                raise UsageError("--chunk auto: the model states no sample rate; give --sample-rate")
        return None

    def _limits(self, board: NamedProfile | None) -> Limits:
        settings, runtime = self.settings, board.profile.runtime if board else None
        return Limits(
            settings.max_misses,
            settings.max_power or (runtime.max_power_w if runtime else None),
            settings.max_temperature or (runtime.max_temperature_c if runtime else None),
            settings.settle,
        )

    def _output_format(self) -> str:
        settings = self.settings
        if settings.output_format:
            return settings.output_format
        if settings.output == "-":
            return formats.stdout_format()
        return "csv" if settings.output.endswith(".csv") else "ndjson"

    def _file_options(self) -> FileOptions:
        settings = self.settings
        append = settings.append or settings.state is not None or settings.rotate_bytes > 0
        torn: Literal["cut", "end"] = "cut" if settings.state is not None else "end"
        return FileOptions(append, torn, settings.rotate_bytes, settings.rotate_keep)

    def _sink(self, sink: Endpoint) -> None:
        if sink.scheme == "file":
            with self._about("output"):
                self._warn("output", *paths.check_output(sink.path))
        self._require("output", sink)

    def _state(self) -> Path | None:
        if self.settings.state is None:
            return None
        folder = Path(self.settings.state)
        with self._about("state"):
            paths.check_state_folder(folder)
        return folder

    def _listen(self) -> tuple[str, int] | None:
        settings = self.settings
        if settings.listen is None:
            return None
        from edge_ssm.telemetry import http, prometheus  # loads an HTTP server

        with self._about("listen"):
            host, port = http.parse_listen(settings.listen)
        with self._about("prometheus"):
            if settings.prometheus:
                prometheus.require()
        self._require_host("listen", host)
        return host, port

    def _require(self, setting: str, endpoint: Endpoint) -> None:
        """Record what an endpoint needs."""
        if endpoint.scheme == "serial":
            self.requirements["serial"] = setting
        elif endpoint.scheme == "iio":
            self.requirements["iio"] = setting
        elif endpoint.scheme in ("mqtt", "mqtts"):
            self._require_host(setting, mqtt.parse_topic_address(endpoint.text, wildcards=True).host)
        elif endpoint.scheme not in ("std", "file") and not endpoint.scheme.startswith("unix"):
            self._require_host(setting, endpoint.host)

    def _require_host(self, setting: str, host: str) -> None:
        self.requirements["loopback" if is_loopback(host) else "network"] = setting
