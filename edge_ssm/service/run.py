"""A run, from its settings to its account: everything is opened, joined, run and closed here."""

from __future__ import annotations

import gc
import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edge_ssm.engines.registry import Engine, EngineOptions, create
from edge_ssm.errors import ArtifactError, EngineUnavailable, RunFailed, SinkClosed, SnapshotError, UsageError
from edge_ssm.formats import loading
from edge_ssm.hardware import boards
from edge_ssm.io.codecs import registry as codecs
from edge_ssm.io.shutdown import ShutdownSignal
from edge_ssm.io.sinks import formats
from edge_ssm.io.sinks.base import Sink
from edge_ssm.io.sinks.file import FileOptions
from edge_ssm.io.sinks.queue import Overflow
from edge_ssm.io.sinks.registry import open_sink
from edge_ssm.io.sources.base import Source
from edge_ssm.io.sources.registry import open_source
from edge_ssm.log import NOTICE
from edge_ssm.model.network import Network
from edge_ssm.runtime.counters import Counters
from edge_ssm.runtime.driver import Driver
from edge_ssm.runtime.pipeline import Pipeline, PipelineOptions
from edge_ssm.runtime.windows import Windows
from edge_ssm.service import feedback
from edge_ssm.service import models as service_models
from edge_ssm.service.adaptation import Adaptation, AdaptationPolicy, Limits
from edge_ssm.service.checkpointer import Checkpointer
from edge_ssm.service.models import LoadedModel
from edge_ssm.service.settings import Settings
from edge_ssm.service.supervisor import Supervisor
from edge_ssm.service.systemd.notify import Notifier
from edge_ssm.telemetry.publisher import RunInfo, StatusPublisher

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    account: Counters
    network: Network
    """That ran last."""
    engine: str
    """Its name, with the reason where "auto" chose it."""
    chunk: int
    source: str
    format: str
    failure: str
    """What ended it before its time, or what it could not deliver; empty if all is well."""


def run(settings: Settings) -> Outcome:
    """Run until the source ends or a signal comes; log what a user should know.

    Raises EdgeSSMError.
    """
    with ExitStack() as stack:
        return _run(settings, stack)


def _run(settings: Settings, stack: ExitStack) -> Outcome:
    # The first to come and the last to go: a signal ends whatever waits here in good order, with an account.
    stop = stack.enter_context(ShutdownSignal(hangups=settings.reload))
    feedback.check(settings)
    model, network = service_models.load(settings.model, settings.sample_rate, settings.require_signature)
    pace = network.input.sample_rate_hz
    check_rate(settings, network)

    def make_windows(of: Network) -> Windows:
        return Windows(of, settings.hop, settings.carry)

    windows = make_windows(network)
    source = open_source(settings.input, network.input, settings.follow, settings.pace)
    stack.callback(source.close)
    codec = settings.format or codecs.guess_format(settings.input)
    decoder = source.decoder or codecs.decoder(codec, network.input, scale_factors(settings.scale))
    named = firmware_profile(settings.profile)
    keep_to(settings.affinity, named)
    running = candidate(settings, settings.model, model, network, windows.lanes, named)
    engine = running.engine
    if model.exported is not None:
        service_models.check_outputs(running, lambda: stop.requested)
    chunk = _chunk(settings, str(named.profile.runtime.chunk) if named else "1", engine, windows)
    adaptive = _adaptive(settings, running, windows, named)
    if settings.listen is not None:
        from edge_ssm.telemetry import http

        http.parse_listen(settings.listen)
    # What is there is emptied only once nothing can be wrong with what was asked for.
    overflow: Overflow = settings.overflow or ("drop-oldest" if source.live else "wait")
    notifier = Notifier()
    sink = open_sink(settings.output, _file_options(settings), settings.queue, overflow, lambda: _waits(notifier, stop))
    formatter = formats.make(_sink_format(settings), sink or formats.stdout(), network, settings.logits, settings.truth)
    info = RunInfo(settings.model, model.digest, engine.name, pace, named.name if named else None, source.name)
    counters = Counters()
    measures_power = settings.listen is not None or adaptive is not None
    publisher = StatusPublisher(formatter, info, counters, _power() if measures_power else lambda: None)
    closing = stack.enter_context(ExitStack())
    closing.callback(publisher.close)
    periods = settings.deadline or (named.profile.runtime.deadline_periods if named else 1.0)
    options = PipelineOptions(
        gap_policy=settings.gap,
        max_gap=settings.max_gap,
        strict=settings.strict,
        chunk=chunk,
        deadline_s=periods / pace if pace and (source.live or settings.pace) else None,
        stale_after_s=settings.stale_after,
        time_stamp_hz=pace if settings.time_gaps else None,
        source=source.name,
        reorder=source.reorder,
        reorder_wait_s=source.reorder_wait_s,
    )
    pipeline = Pipeline(engine, windows, publisher, options, counters)
    checkpointer = Checkpointer(
        _state_folder(settings),
        settings.snapshot_interval,
        pipeline,
        source,
        decoder,
        sink,
        running.artifact_digest,
    )
    stack.callback(checkpointer.close)
    supervisor = Supervisor(
        pipeline,
        publisher,
        stop,
        checkpointer,
        notifier,
        running,
        make_windows,
        _reloader(settings, pipeline, make_windows, named) if settings.reload else None,
        adaptive,
    )
    _resume(pipeline, checkpointer, source, supervisor)
    publisher.start()
    if settings.listen is not None:
        page = http.serve(publisher, settings.listen, settings.prometheus)
        stack.callback(page.close)
        logger.log(NOTICE, "status page at http://%s/", page.address)
    if settings.fifo is not None:
        _real_time(settings.fifo)
    gc.collect()
    gc.freeze()  # What is there now stays: no later collection looks through it.
    info.ready = True
    notifier.ready(f"runs {settings.model} on {engine.name}")
    failure = ""
    driver = Driver(pipeline, source, decoder, stop, supervisor, pace if settings.pace else None)
    try:
        driver.run()
    except RunFailed as error:
        counters.ended_by, failure = "failure", str(error)
    notifier.stopping()
    try:
        if problem := checkpointer.finish(driver.is_consistent):
            logger.warning(problem)
    except (SinkClosed, RunFailed) as error:  # of what waited for its chunk
        failure = failure or str(error)
    closing.close()
    failure = failure or _undelivered(counters, sink)
    engine = pipeline.engine
    why = supervisor.running.engine_description
    if engine.lost:
        why += f", lost in mid-stream ({engine.lost}); {engine.name} took over"
    return Outcome(counters, engine.network, why, chunk, source.name, codec, failure)


def _undelivered(account: Counters, sink: Sink | None) -> str:
    """Put what the outlet dropped into the account; what is wrong with that, if it was not as asked for. Who stops a
    run while its reader is dead knows what he does."""
    if sink is None:
        return ""
    account.dropped.update({f"output_{reason}": n for reason, n in sink.dropped.items()})
    unsent = sink.dropped["unsent"]
    if not unsent or account.ended_by == "signal":
        return ""
    return f"{sink.problem or sink.name}; {unsent} decisions and events did not get there"


def _waits(notifier: Notifier, stop: ShutdownSignal) -> bool:
    """A loop that waits for its reader, as it was told to, is not stuck. False: it shall end."""
    notifier.alive()
    return not stop.requested


def check_rate(settings: Settings, network: Network) -> None:
    """Raises UsageError where a setting needs the sample rate and nobody states it."""
    for name, wanted in (("--pace", settings.pace), ("--time-gaps", settings.time_gaps)):
        if wanted and network.input.sample_rate_hz is None:
            raise UsageError(f"{name}: the model states no sample rate; give --sample-rate")


def _sink_format(settings: Settings) -> str:
    if settings.output_format:
        return settings.output_format
    if settings.output == "-":
        return formats.stdout_format()
    return "csv" if settings.output.endswith(".csv") else "ndjson"


def _file_options(settings: Settings) -> FileOptions:
    append = settings.append or settings.state is not None or settings.rotate_bytes > 0
    torn: Literal["cut", "end"] = "cut" if settings.state is not None else "end"
    return FileOptions(append, torn, settings.rotate_bytes, settings.rotate_keep)


def _state_folder(settings: Settings) -> Path | None:
    if settings.state is None:
        return None
    folder = Path(settings.state)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "no permission to write there")
    except OSError as error:
        raise UsageError(f"{folder}: snapshots can't be kept there ({error.strerror}); see --state") from None
    return folder


def _resume(pipeline: Pipeline, checkpointer: Checkpointer, source: Source, supervisor: Supervisor) -> None:
    """Go on where the last snapshot was taken, and say how many samples were missed since."""
    try:
        found = checkpointer.resume(supervisor.run_artifact)
    except SnapshotError as error:
        logger.warning(str(error))
        pipeline.emit_event("snapshot_refused", reason=str(error))
        return
    if found is None:
        return
    age_s = max(0.0, time.time() - found.saved_at)
    rate = pipeline.engine.network.input.sample_rate_hz
    skipped: int | None = None
    if checkpointer.has_resumed_exactly:
        skipped = 0
    elif source.position():
        pipeline.emit_event("replaced", source=source.name)
        logger.warning(
            "%s: not the file that was read before, or cut short; it is read from its beginning", source.name
        )
    elif not pipeline.is_numbered and rate is not None and source.live:
        # Nobody counted them: by the clock, which may have been set meanwhile.
        skipped = round(age_s * rate)
        pipeline.fill_gap(min(skipped, 1 << 40), "stopped")
    told = {None: "unknown" if source.position() else "known with the next sequence number", 0: "0"}.get(
        skipped, f"about {skipped}"
    )
    pipeline.emit_event("resumed", age_s=round(age_s, 3), skipped=skipped)
    logger.log(
        NOTICE,
        "resumed at sample %d, %.1f s after the snapshot; samples skipped: %s",
        pipeline.windows.sample,
        age_s,
        told,
    )


def candidate(
    settings: Settings,
    path: str,
    model: loading.Model,
    network: Network,
    lanes: int,
    named: boards.NamedProfile | None,
) -> LoadedModel:
    """A model on its engine; ``network`` is the model's, or that at another sample rate.

    Raises EngineUnavailable, UsageError.
    """
    from edge_ssm.engines import selection
    from edge_ssm.engines.cpu import cache as kernel_cache

    runtime = named.profile.runtime if named else None
    engine_options = EngineOptions(lanes, runtime.gpu_waits if runtime else "spin", model.graph, settings.threads)
    name = model.resolve_engine(settings.engine)
    off_by = model.exported.document.measured.max_error if model.exported else 0.0
    if name in ("auto", "cpu", "cpu-float32"):
        with suppress(EngineUnavailable):  # said again, or gone around, by what follows
            kernel_cache.load(lambda: logger.log(NOTICE, "compiling for this processor, once; takes some seconds"))
    if name != "auto" or settings.threads is not None:
        try:
            engine = create(name, network, engine_options)
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from None
        if engine.warning:
            logger.warning("warning: %s", engine.warning)
        why = f"{name} ({engine.where})" if engine.where else name
        return LoadedModel(path, model.digest, model.artifact.digest, network, engine, why, off_by)
    engine, trial = selection.select_engine(network, engine_options, runtime.engines if runtime else None)
    why = f"{engine.name} (by trial: {trial.why()})"
    return LoadedModel(path, model.digest, model.artifact.digest, network, engine, why)


def firmware_profile(name: str) -> boards.NamedProfile | None:
    """The one asked for; a mismatch is a warning."""
    if name == "none":
        return None
    named, warning = boards.select(name)
    if warning:
        logger.warning("warning: %s", warning)
    return named


def keep_to(affinity: list[int] | None, named: boards.NamedProfile | None) -> None:
    """Stay on these cores, or on those of the profile. Raises UsageError where none of those given is there."""
    cores = affinity if affinity is not None else named.profile.runtime.affinity if named else []
    there = set(cores) & os.sched_getaffinity(0)
    if affinity and not there:
        raise UsageError(f"--affinity {affinity}: no such core, expected of {sorted(os.sched_getaffinity(0))}")
    if there:
        os.sched_setaffinity(0, there)


def _real_time(priority: int) -> None:
    """The loop's thread comes before all ordinary ones."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    except OSError as error:
        logger.warning("warning: no real-time priority (%s); a service needs LimitRTPRIO=%d", error.strerror, priority)


def _adaptive(
    settings: Settings, running: LoadedModel, windows: Windows, named: boards.NamedProfile | None
) -> Adaptation | None:
    if not settings.member:
        return None
    members = [running]
    for path in settings.member:
        model, network = service_models.load(path, settings.sample_rate, settings.require_signature)
        if not service_models.same_windows(network, running.network):
            raise UsageError(f"--member {path}: its windows or labels are not those of {running.path}")
        if model.digest in {member.digest for member in members}:
            raise UsageError(f"--member {path}: is {running.path}, or there twice; expected a smaller model")
        member = candidate(settings, path, model, network, windows.lanes, named)
        service_models.check_replacement(member, running.network)
        members.append(member)
    runtime = named.profile.runtime if named else None
    limits = Limits(
        settings.max_misses,
        settings.max_power or (runtime.max_power_w if runtime else None),
        settings.max_temperature or (runtime.max_temperature_c if runtime else None),
        settings.settle,
    )
    return Adaptation(AdaptationPolicy(len(members), limits, time.monotonic()), members)


def _reloader(
    settings: Settings,
    pipeline: Pipeline,
    make_windows: Callable[[Network], Windows],
    named: boards.NamedProfile | None,
) -> service_models.Reloader:
    def prepare() -> LoadedModel:
        model, network = service_models.load(settings.model, settings.sample_rate, settings.require_signature)
        made = candidate(settings, settings.model, model, network, make_windows(network).lanes, named)
        service_models.check_replacement(made, pipeline.engine.network)
        return made

    return service_models.Reloader(settings.model, prepare)


def _power() -> Callable[[], float | None]:
    """Watts now, by the first meter that is read from files; None where there is none."""
    from edge_ssm.errors import MeterLost
    from edge_ssm.hardware.meters.registry import open_file_meter

    meter = open_file_meter()

    def read() -> float | None:
        if meter is None:
            return None
        try:
            reading = meter.read()
        except MeterLost:
            return None
        return None if reading is None else meter.total_w(reading)

    return read


def chunk_asked(settings: Settings, default: str) -> int | None:
    """Samples a call; None: as many as the budget allows, by a trial. Raises UsageError."""
    from edge_ssm.runtime import batching

    text, budget_ms = str(settings.chunk or default), settings.latency_budget
    if text != "auto":
        if budget_ms is not None:
            raise UsageError("--latency-budget: only with --chunk auto")
        size = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
        if not 1 <= size <= batching.MAX_CHUNK:
            raise UsageError(f"--chunk {text!r}: expected auto, or 1 to {batching.MAX_CHUNK} samples")
        return size
    if budget_ms is None or not math.isfinite(budget_ms):
        raise UsageError("--chunk auto: needs --latency-budget, in milliseconds")
    return None


def _chunk(settings: Settings, default: str, engine: Engine, windows: Windows) -> int:
    from edge_ssm.runtime import batching

    asked, budget_ms = chunk_asked(settings, default), settings.latency_budget
    if asked is not None or budget_ms is None:
        return asked or 1
    network = engine.network
    wait = 0.0
    if network.pooling == "none":
        if network.input.sample_rate_hz is None:
            raise UsageError("--chunk auto: the model states no sample rate; give --sample-rate")
        wait = 1 / network.input.sample_rate_hz
    return batching.largest_chunk(engine, windows.hop if wait == 0 else batching.MAX_CHUNK, budget_ms / 1e3, wait)


def scale_factors(text: str) -> list[float]:
    """Raises UsageError."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--scale {text!r}: expected numbers separated by commas") from None
