"""Execute the plan of a run: open what it names, connect the parts, run the pipeline, close everything."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from edge_ssm.engines.base import Engine
from edge_ssm.engines.options import EngineOptions
from edge_ssm.engines.registry import create
from edge_ssm.errors import ArtifactError, EngineUnavailable, RunFailed, SinkClosed, SnapshotError, UsageError
from edge_ssm.io.codecs import registry as codecs
from edge_ssm.io.codecs.base import FrameDecoder
from edge_ssm.io.shutdown import ShutdownSignal
from edge_ssm.io.sinks import formats
from edge_ssm.io.sinks.base import Sink
from edge_ssm.io.sinks.registry import open_sink
from edge_ssm.io.sources.base import Source
from edge_ssm.io.sources.registry import open_source
from edge_ssm.log import NOTICE
from edge_ssm.model.network import Network
from edge_ssm.runtime import batching
from edge_ssm.runtime.counters import Counters
from edge_ssm.runtime.driver import Driver
from edge_ssm.runtime.pipeline import Pipeline, PipelineOptions
from edge_ssm.service import models as service_models
from edge_ssm.service.adaptation import Adaptation, AdaptationPolicy
from edge_ssm.service.checkpointer import Checkpointer
from edge_ssm.service.models import LoadedModel, Reloader
from edge_ssm.service.plan import PlannedModel, RunPlan, resolve
from edge_ssm.service.settings import Settings
from edge_ssm.service.supervisor import Supervisor
from edge_ssm.service.systemd.notify import Notifier
from edge_ssm.telemetry.publisher import RunInfo, StatusPublisher

logger = logging.getLogger(__name__)
LONGEST_SKIP = 1 << 40
"""Most samples that a gap by the clock may have: a clock can be set by years."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    counters: Counters
    network: Network
    """The network that ran last."""
    engine: str
    """The engine's name, with the measurements where "auto" selected it."""
    chunk: int
    """Samples per call of the engine."""
    source: str
    format: str
    failure: str
    """What ended the run early, or what it could not deliver; empty if nothing went wrong."""


def run(settings: Settings, config: str | None = None) -> Outcome:
    """Run until the source ends or a signal arrives.

    Parameters
    ----------
    settings
        What to run.
    config
        Path of the file that the settings come from; decisions must not overwrite it.

    Raises
    ------
    EdgeSSMError
        The run cannot start. What goes wrong later is part of the outcome.
    """
    with ExitStack() as stack:
        # Entered first and left last: a signal ends whatever waits in here in good order, with a summary.
        shutdown = stack.enter_context(ShutdownSignal(hangups=settings.reload))
        return execute(resolve(settings, config), shutdown, stack)


def execute(plan: RunPlan, shutdown: ShutdownSignal, stack: ExitStack) -> Outcome:
    """Run a plan, as ``run`` does. ``stack`` closes what is opened."""
    for warning in plan.warnings:
        if warning.setting == "board":
            logger.warning("warning: %s", warning.text)
    source = open_source(plan.settings.input, plan.model.network.input, plan.settings.follow, plan.settings.pace)
    stack.callback(source.close)
    decoder = source.decoder or codecs.decoder(plan.codec, plan.model.network.input, plan.scale)
    if plan.cores:
        os.sched_setaffinity(0, plan.cores)
    model = _load_verified(plan, shutdown)
    chunk = _chunk(plan, model.engine)
    adaptation = _adaptation(plan, model)
    # An existing file is emptied only once nothing can be wrong with the settings.
    notifier = Notifier()
    sink = _open_sink(plan, notifier, shutdown)
    counters = Counters()
    info = _run_info(plan, model, source)
    publisher = _publisher(plan, info, counters, sink, adaptation is not None)
    publishing = stack.enter_context(ExitStack())
    publishing.callback(publisher.close)
    pipeline = Pipeline(
        model.engine, plan.make_windows(model.network), publisher, _pipeline_options(plan, source, chunk), counters
    )
    checkpointer = _checkpointer(plan, pipeline, source, decoder, sink, model)
    stack.callback(checkpointer.close)
    reloader = _reloader(plan, pipeline) if plan.settings.reload else None
    supervisor = Supervisor(
        pipeline, publisher, shutdown, checkpointer, notifier, model, plan.make_windows, reloader, adaptation
    )
    _resume(pipeline, checkpointer, source, supervisor)
    publisher.start()
    _serve_status(plan, publisher, stack)
    if plan.settings.fifo is not None:
        _set_real_time_priority(plan.settings.fifo)
    gc.collect()
    gc.freeze()  # What exists now stays: no later collection has to look through it.
    info.ready = True
    notifier.ready(f"runs {model.path} on {model.engine.name}")
    pace = plan.sample_rate_hz if plan.settings.pace else None
    failure = _drive(Driver(pipeline, source, decoder, shutdown, supervisor, pace), counters, notifier, checkpointer)
    publishing.close()
    undelivered = _undelivered(counters, sink)
    return Outcome(
        counters=counters,
        network=pipeline.engine.network,
        engine=_engine_in_words(pipeline, supervisor),
        chunk=chunk,
        source=source.name,
        format=plan.codec,
        failure=failure or undelivered,
    )


def _open_sink(plan: RunPlan, notifier: Notifier, shutdown: ShutdownSignal) -> Sink | None:
    """Open the output; None for standard output."""

    def keep_waiting() -> bool:
        notifier.alive()  # A pipeline that waits for a reader of its output is not stuck.
        return not shutdown.requested

    return open_sink(plan.settings.output, plan.file_options, plan.settings.queue, plan.overflow, keep_waiting)


def _load_verified(plan: RunPlan, shutdown: ShutdownSignal) -> LoadedModel:
    """Load the engine of the plan's model; an exported file's outputs are verified first."""
    model = load_engine(plan, plan.model)
    if plan.model.model.exported is not None:
        service_models.check_outputs(model, lambda: shutdown.requested)
    return model


def load_engine(plan: RunPlan, planned: PlannedModel) -> LoadedModel:
    """Return a model of the plan with its engine.

    Raises EngineUnavailable if the engine does not load, ArtifactError if the model does not fit it.
    """
    from edge_ssm.engines import selection
    from edge_ssm.engines.cpu import cache as kernel_cache

    runtime = plan.board.profile.runtime if plan.board else None
    model, network = planned.model, planned.network
    lanes = plan.make_windows(network).lanes
    options = EngineOptions(lanes, runtime.gpu_waits if runtime else "spin", model.graph, plan.settings.threads)
    if planned.engine in ("auto", "cpu", "cpu-float32"):
        with suppress(EngineUnavailable):  # Raised again by what follows, unless another engine takes its place.
            kernel_cache.load(lambda: logger.log(NOTICE, "compiling for this processor, once; takes some seconds"))
    if planned.engine == "auto":
        engine, trial = selection.select_engine(network, options, runtime.engines if runtime else None)
        reason = f"{engine.name} (by trial: {trial.why()})"
    else:
        try:
            engine = create(planned.engine, network, options)
        except ArtifactError as error:
            raise ArtifactError(f"{planned.path}: {error}") from None
        if engine.warning:
            logger.warning("warning: %s", engine.warning)
        reason = f"{planned.engine} ({engine.where})" if engine.where else planned.engine
    max_error = model.exported.document.measured.max_error if model.exported else 0.0
    return LoadedModel(planned.path, model.digest, model.artifact.digest, network, engine, reason, max_error)


def _chunk(plan: RunPlan, engine: Engine) -> int:
    """Return the samples per call of the engine, measured if the plan leaves it open."""
    if plan.chunk is not None:
        return plan.chunk
    assert plan.latency_budget_s is not None
    network, rate = engine.network, plan.sample_rate_hz
    if network.pooling == "none":  # Every sample has an output, which waits for the others of its chunk.
        assert rate is not None
        return batching.largest_chunk(engine, batching.MAX_CHUNK, plan.latency_budget_s, 1 / rate)
    return batching.largest_chunk(engine, plan.windows.hop, plan.latency_budget_s, 0.0)


def _adaptation(plan: RunPlan, model: LoadedModel) -> Adaptation | None:
    """Load the smaller models, if there are any."""
    if not plan.members:
        return None
    members = [model]
    for planned in plan.members:
        member = load_engine(plan, planned)
        service_models.check_replacement(member, model.network)
        members.append(member)
    return Adaptation(AdaptationPolicy(len(members), plan.limits, time.monotonic()), members)


def _run_info(plan: RunPlan, model: LoadedModel, source: Source) -> RunInfo:
    board = plan.board.name if plan.board else None
    return RunInfo(model.path, model.digest, model.engine.name, plan.sample_rate_hz, board, source.name)


def _publisher(
    plan: RunPlan, info: RunInfo, counters: Counters, sink: Sink | None, is_adaptive: bool
) -> StatusPublisher:
    settings, network = plan.settings, plan.model.network
    formatter = formats.make(plan.output_format, sink or formats.stdout(), network, settings.logits, settings.truth)
    read_power = _power_reader() if plan.listen is not None or is_adaptive else lambda: None
    return StatusPublisher(formatter, info, counters, read_power)


def _pipeline_options(plan: RunPlan, source: Source, chunk: int) -> PipelineOptions:
    settings, rate = plan.settings, plan.sample_rate_hz
    has_deadline = rate is not None and (plan.is_live or settings.pace)
    return PipelineOptions(
        gap_policy=settings.gap,
        max_gap=settings.max_gap,
        strict=settings.strict,
        chunk=chunk,
        deadline_s=plan.deadline_periods / rate if rate is not None and has_deadline else None,
        stale_after_s=settings.stale_after,
        time_stamp_hz=rate if settings.time_gaps else None,
        source=source.name,
        reorder=source.reorder,
        reorder_wait_s=source.reorder_wait_s,
    )


def _checkpointer(
    plan: RunPlan, pipeline: Pipeline, source: Source, decoder: FrameDecoder, sink: Sink | None, model: LoadedModel
) -> Checkpointer:
    """Create the folder of snapshots, if there is one, and what writes them. Raise UsageError if that is impossible."""
    folder = plan.state
    if folder is not None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(13, "no permission to write there")
        except OSError as error:
            raise UsageError(f"{folder}: snapshots cannot be kept there ({error.strerror}); see --state") from None
    interval_s = plan.settings.snapshot_interval
    return Checkpointer(folder, interval_s, pipeline, source, decoder, sink, model.artifact_digest)


def _reloader(plan: RunPlan, pipeline: Pipeline) -> Reloader:
    """Return what loads the model's file again, in the background."""

    def prepare() -> LoadedModel:
        path, settings = plan.settings.model, plan.settings
        model, network = service_models.load(path, settings.sample_rate, settings.require_signature)
        loaded = load_engine(plan, PlannedModel(path, model, network, model.resolve_engine(settings.engine)))
        service_models.check_replacement(loaded, pipeline.engine.network)
        return loaded

    return Reloader(plan.settings.model, prepare)


def _resume(pipeline: Pipeline, checkpointer: Checkpointer, source: Source, supervisor: Supervisor) -> None:
    """Continue from the last snapshot, and report how many samples were missed since."""
    try:
        snapshot = checkpointer.resume(supervisor.run_artifact)
    except SnapshotError as error:
        logger.warning(str(error))
        pipeline.emit_event("snapshot_refused", reason=str(error))
        return
    if snapshot is None:
        return
    age_s = max(0.0, time.time() - snapshot.saved_at)
    rate = pipeline.engine.network.input.sample_rate_hz
    skipped: int | None = None
    in_words = "known with the next sequence number"
    if checkpointer.has_resumed_exactly:
        skipped, in_words = 0, "0"
    elif source.position():
        in_words = "unknown"
        pipeline.emit_event("replaced", source=source.name)
        logger.warning(
            "%s: not the file that was read before, or cut short; it is read from its beginning", source.name
        )
    elif not pipeline.is_numbered and rate is not None and source.live:
        # Without sequence numbers, by the clock, which may have been set meanwhile.
        skipped = round(age_s * rate)
        in_words = f"about {skipped}"
        pipeline.fill_gap(min(skipped, LONGEST_SKIP), "stopped")
    pipeline.emit_event("resumed", age_s=round(age_s, 3), skipped=skipped)
    message = "resumed at sample %d, %.1f s after the snapshot; samples skipped: %s"
    logger.log(NOTICE, message, pipeline.windows.sample, age_s, in_words)


def _serve_status(plan: RunPlan, publisher: StatusPublisher, stack: ExitStack) -> None:
    """Serve the status page, health and metrics over HTTP, if the plan says so."""
    if plan.settings.listen is not None:
        from edge_ssm.telemetry import http  # loads an HTTP server

        page = http.serve(publisher, plan.settings.listen, plan.settings.prometheus)
        stack.callback(page.close)
        logger.log(NOTICE, "status page at http://%s/", page.address)


def _power_reader() -> Callable[[], float | None]:
    """Return a function that reads the power in watts from the first meter that is read from files."""
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


def _set_real_time_priority(priority: int) -> None:
    """Let this thread run before all ordinary ones."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    except OSError as error:
        logger.warning("warning: no real-time priority (%s); a service needs LimitRTPRIO=%d", error.strerror, priority)


def _drive(driver: Driver, counters: Counters, notifier: Notifier, checkpointer: Checkpointer) -> str:
    """Run the pipeline to its end and write the last snapshot. Return why the run failed, or ""."""
    failure = ""
    try:
        driver.run()
    except RunFailed as error:
        counters.ended_by, failure = "failure", str(error)
    notifier.stopping()
    try:
        if problem := checkpointer.finish(driver.is_consistent):
            logger.warning(problem)
    except (SinkClosed, RunFailed) as error:  # Decisions that waited for their chunk could not be written.
        failure = failure or str(error)
    return failure


def _undelivered(counters: Counters, sink: Sink | None) -> str:
    """Count what the sink dropped. Return a description if decisions were lost against the user's wish, or "".

    Who stops a run while its reader is gone knows that the rest is not delivered.
    """
    if sink is None:
        return ""
    counters.dropped.update({f"output_{reason}": n for reason, n in sink.dropped.items()})
    unsent = sink.dropped["unsent"]
    if not unsent or counters.ended_by == "signal":
        return ""
    return f"{sink.problem or sink.name}; {unsent} decisions and events were not delivered"


def _engine_in_words(pipeline: Pipeline, supervisor: Supervisor) -> str:
    engine, reason = pipeline.engine, supervisor.running.engine_description
    return f"{reason}, lost in mid-stream ({engine.lost}); {engine.name} took over" if engine.lost else reason
