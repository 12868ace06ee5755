"""Housekeeping on the pipeline's thread: watchdog pings, checkpoints, reloads, adaptation, status updates."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from edge_ssm.engines.registry import Snapshot
from edge_ssm.engines.state_transfer import transfer_state
from edge_ssm.errors import EdgeSSMError
from edge_ssm.hardware import machine
from edge_ssm.io.shutdown import ShutdownSignal
from edge_ssm.log import NOTICE
from edge_ssm.model.network import Network
from edge_ssm.runtime.pipeline import Pipeline, PipelineObserver
from edge_ssm.runtime.windows import Windows
from edge_ssm.service.adaptation import Adaptation, Measurements
from edge_ssm.service.checkpointer import Checkpointer
from edge_ssm.service.models import LoadedModel, Reloader, same_windows
from edge_ssm.service.systemd.notify import Notifier
from edge_ssm.telemetry.publisher import StatusPublisher

logger = logging.getLogger(__name__)

CHECK_S = 1.0
"""Time between two checks of engine, output and measurements."""
STATUS_S = 10.0
"""Time between two status lines for systemd."""


class Supervisor(PipelineObserver):
    """Looks after a pipeline between two samples.

    ``running`` is the model that runs first, ``make_windows`` makes the windows of another network. ``reloader`` and
    ``adaptation`` are None if the model is never replaced.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        publisher: StatusPublisher,
        shutdown: ShutdownSignal,
        checkpointer: Checkpointer,
        notifier: Notifier,
        running: LoadedModel,
        make_windows: Callable[[Network], Windows],
        reloader: Reloader | None = None,
        adaptation: Adaptation | None = None,
    ) -> None:
        self.running = running
        """The model that runs now."""
        self.keeps_state = checkpointer.keeps_state
        self._pipeline = pipeline
        self._publisher = publisher
        self._shutdown = shutdown
        self._checkpointer = checkpointer
        self._notifier = notifier
        self._make_windows = make_windows
        self._reloader = reloader
        self._adaptation = adaptation
        self._hangups = 0
        self._check_at = self._status_at = 0.0
        self._counted = (0, 0)  # decisions and deadline misses when the policy last began to count
        self._counted_at = 0.0
        self._has_reported_loss = False
        self._output_problem = ""
        self._is_connected: bool | None = None

    def on_tick(self) -> None:
        """Ping the watchdog; once a second look at everything that may change by itself."""
        now = time.monotonic()
        self._notifier.alive()
        info = self._publisher.info
        info.ticked_at, info.snapshot_at = now, self._checkpointer.written_at
        info.source_state = self._source_state()
        if self._reloader is not None:
            self._reload(self._reloader)
        if now >= self._check_at:
            self._check_at = now + CHECK_S
            self._check(now)

    def on_batch_end(self, token: Any) -> None:
        """Let the checkpointer work."""
        if problem := self._checkpointer.tick(token):
            logger.warning(problem)
            self._pipeline.emit_event("snapshot_failed", reason=problem)

    def on_connection_change(self, connected: bool) -> None:
        """Remember whether the source has a connection."""
        self._is_connected = connected

    def _source_state(self) -> str:
        if self._is_connected is False:
            return "lost"
        if self._pipeline.is_stale:
            return "stale"
        return "flowing" if self._pipeline.counters.samples else "waiting"

    def _check(self, now: float) -> None:
        engine = self._pipeline.engine
        if engine.lost and not self._has_reported_loss:
            self._has_reported_loss = True
            self._pipeline.counters.engine_losses += 1
            self._pipeline.emit_event("engine_lost", reason=engine.lost, engine=engine.name)
            logger.warning("engine lost (%s); %s took over", engine.lost, engine.name)
        self._publisher.info.engine = engine.name
        self._check_output()
        if self._adaptation is not None:
            self._adapt(self._adaptation, now)
        if now >= self._status_at:
            self._status_at = now + STATUS_S
            status = self._publisher.status()
            self._notifier.status(
                f"{status.samples} samples ({status.samples_per_s:.0f} a second), {status.decisions} decisions, "
                f"{sum(status.dropped.values())} dropped, source {status.source_state}"
            )

    def _check_output(self) -> None:
        """Report a reader that is gone, once, and its return."""
        sink = self._publisher.sink
        if sink is None or sink.problem == self._output_problem:
            return
        self._output_problem = sink.problem
        if sink.problem:
            logger.warning("%s; decisions wait, %d at most", sink.problem, sink.size)
        else:
            logger.log(NOTICE, "%s: delivers again", sink.name)

    # Reloads: the file of the model has changed, or SIGHUP came.

    def _reload(self, reloader: Reloader) -> None:
        if self._shutdown.hangups != self._hangups:
            self._hangups = self._shutdown.hangups
            self._notifier.reloading()
            reloader.request()
        result = reloader.poll()
        if result is None:
            return
        current = self._adaptation.members[0] if self._adaptation else self.running
        if isinstance(result, str):
            self._report_refusal(result)
        elif result.digest == current.digest:
            self._notifier.ready("the model is the same")
            self._pipeline.emit_event("reloaded", model=result.path, digest=result.digest[:12], changed=False)
        else:
            self._adopt(result)

    def _report_refusal(self, reason: str) -> None:
        self._notifier.ready(f"a new model was refused: {reason}")
        logger.warning("reload failed, the old model goes on: %s", reason)
        self._pipeline.counters.reload_failures += 1
        self._pipeline.emit_event("reload_failed", reason=reason)

    def _adopt(self, new: LoadedModel) -> None:
        """Run a reloaded model: when the open window ends if windows do not overlap, so that no window is lost."""
        pipeline = self._pipeline
        are_same = same_windows(pipeline.engine.network, new.network) and pipeline.windows.lanes == new.engine.lanes
        try:
            windows = None if are_same else self._make_windows(new.network)
        except EdgeSSMError as error:  # a hop that is longer than the new window
            self._report_refusal(str(error))
            return

        def replace_model() -> None:
            if windows is None:
                self._transfer_to(new)
            else:
                pipeline.replace_engine(new.engine, windows)
                self._publisher.adopt(new.network)
            pipeline.counters.reloads += 1
            self._set_running(new)
            self._replace_largest_member(new)
            digest = new.digest[:12]
            pipeline.emit_event("reloaded", model=new.path, digest=digest, changed=True)
            logger.log(NOTICE, "%s: reloaded, digest %s, engine %s", new.path, digest, new.engine_description)
            self._notifier.ready(f"runs {new.path}, digest {digest}")

        if pipeline.windows.carry or pipeline.windows.lanes > 1:
            replace_model()
        else:
            logger.log(NOTICE, "%s: ready, digest %s; taken over when the open window ends", new.path, new.digest[:12])
            self._notifier.ready(f"{new.path} is taken over when the open window ends")
            pipeline.call_when_idle(replace_model)

    def _replace_largest_member(self, new: LoadedModel) -> None:
        """Make a reloaded model the largest member of the family, if the others have the same windows and labels."""
        adaptation = self._adaptation
        if adaptation is None:
            return
        if all(same_windows(member.network, new.network) for member in adaptation.members[1:]):
            adaptation.members[0] = new
            adaptation.policy.start_at(0)
        else:
            self._adaptation = None
            logger.warning(
                "%s: its windows or labels are not those of the smaller members; no moves any more", new.path
            )

    def _transfer_to(self, new: LoadedModel) -> None:
        """Continue with another model of the same windows, and with the state of the one that runs."""
        old = self._pipeline.engine.snapshot()
        state = transfer_state(self._pipeline.engine.network, old.state, new.network)
        new.engine.restore(Snapshot(new.engine.fingerprint, state))
        self._pipeline.replace_engine(new.engine)

    def _set_running(self, model: LoadedModel) -> None:
        self.running = model
        self._checkpointer.set_artifact(model.artifact_digest)
        info = self._publisher.info
        info.model, info.model_digest, info.engine = model.path, model.digest, model.engine.name

    # Adaptation: a family of models.

    def run_artifact(self, digest: str) -> bool:
        """Run the artifact with this digest if it is a member of the family; return whether it runs now."""
        if digest == self.running.artifact_digest:
            return True
        if self._adaptation is not None:
            for level, member in enumerate(self._adaptation.members):
                if member.artifact_digest == digest:
                    self._adaptation.policy.start_at(level)
                    self._pipeline.replace_engine(member.engine)
                    self._set_running(member)
                    return True
        return False

    def _adapt(self, adaptation: Adaptation, now: float) -> None:
        counters, policy = self._pipeline.counters, adaptation.policy
        decisions, misses = counters.decisions - self._counted[0], counters.deadline_misses - self._counted[1]
        celsius = max(machine.temperatures().values(), default=None)
        old_level = policy.level
        reason = policy.update(Measurements(decisions, misses, self._publisher.info.power_w, celsius), now)
        if reason or (decisions and now - self._counted_at >= policy.cooldown_s):
            self._counted, self._counted_at = (counters.decisions, counters.deadline_misses), now
        if not reason:
            return
        member = adaptation.members[policy.level]
        self._transfer_to(member)
        counters.moves += 1
        self._set_running(member)
        direction = "smaller" if policy.level > old_level else "larger"
        self._pipeline.emit_event("adapted", to=member.path, direction=direction, reason=reason)
        logger.log(NOTICE, "moved to the %s %s: %s", direction, member.path, reason)
