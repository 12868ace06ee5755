"""What is looked after while a pipeline runs, from the pipeline's own thread, between two samples: that systemd knows it is
alive, that its state is kept, which network it runs, and that whoever watches is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edge_ssm.engines.registry import Snapshot
from edge_ssm.engines.state_transfer import transfer_state
from edge_ssm.errors import EdgeSSMError
from edge_ssm.hardware import machine
from edge_ssm.io.shutdown import ShutdownSignal
from edge_ssm.io.sources.base import Source
from edge_ssm.runtime.pipeline import Pipeline, PipelineObserver
from edge_ssm.runtime.windows import Windows
from edge_ssm.service.adaptation import AdaptationPolicy, Measurements
from edge_ssm.service.checkpointer import Checkpointer
from edge_ssm.service.models import LoadedModel, Reloader, same_windows
from edge_ssm.service.systemd.notify import Notifier
from edge_ssm.telemetry.publisher import StatusPublisher

LOOK_S = 1.0
STATUS_S = 10.0


@dataclass
class Adaptation:
    ladder: AdaptationPolicy
    members: list[LoadedModel]
    """The largest first; member 0 is the model itself."""


class Supervisor(PipelineObserver):
    def __init__(
        self,
        pipeline: Pipeline,
        live: StatusPublisher,
        stop: ShutdownSignal,
        checkpointer: Checkpointer,
        notifier: Notifier,
        running: LoadedModel,
        make_windows: Callable[[Any], Windows],
        say: Callable[[str], None],
        reloader: Reloader | None = None,
        adaptive: Adaptation | None = None,
    ) -> None:
        self._pipeline, self._live, self._stop = pipeline, live, stop
        self._checkpointer, self._notifier, self._say = checkpointer, notifier, say
        self._make_windows = make_windows
        self._reloader, self._adaptive = reloader, adaptive
        self.running = running
        self._hangups = 0
        self._look_at = self._status_at = 0.0
        self._before = (0, 0)
        self._lost_said = False
        self._outlet_problem = ""
        self._connected: bool | None = None
        checkpointer.artifact = running.artifact
        self.keeps_state = checkpointer.keeps_state

    def on_tick(self) -> None:
        now = time.monotonic()
        self._notifier.alive()
        facts = self._live.facts
        facts.loop_at, facts.snapshot_at = now, self._checkpointer.written_at
        facts.source_state = self._source_state()
        if self._reloader is not None:
            self._reload(self._reloader)
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            self._look(now)

    def on_batch_end(self, source: Source, token: Any) -> None:
        if problem := self._checkpointer.tick(self._pipeline, source, token):
            self._say(problem)
            self._pipeline.emit_event("snapshot_failed", reason=problem)

    def on_connection_change(self, connected: bool) -> None:
        self._connected = connected

    def _source_state(self) -> str:
        if self._connected is False:
            return "lost"
        if self._pipeline.stale:
            return "stale"
        return "flowing" if self._pipeline.account.samples else "waiting"

    def _look(self, now: float) -> None:
        engine = self._pipeline.engine
        if engine.lost and not self._lost_said:
            self._lost_said = True
            self._pipeline.account.engine_losses += 1
            self._pipeline.emit_event("engine_lost", reason=engine.lost, engine=engine.name)
            self._say(f"engine lost ({engine.lost}); {engine.name} took over")
        self._live.facts.engine = engine.name
        self._tell_of_outlet()
        if self._adaptive is not None:
            self._adapt(self._adaptive, now)
        if now >= self._status_at:
            self._status_at = now + STATUS_S
            status = self._live.status()
            self._notifier.status(
                f"{status.samples} samples ({status.samples_per_s:.0f} a second), {status.decisions} decisions, "
                f"{sum(status.dropped.values())} dropped, source {status.source_state}"
            )

    def _tell_of_outlet(self) -> None:
        """A dead reader, once, and its return."""
        sink = self._live.sink
        problem = sink.problem if sink is not None else ""
        if problem != self._outlet_problem and sink is not None:
            self._say(f"{problem}; decisions wait, {sink.size} at most" if problem else f"{sink.name}: delivers again")
            self._outlet_problem = problem

    def _reload(self, reloader: Reloader) -> None:
        if self._stop.hangups != self._hangups:
            self._hangups = self._stop.hangups
            self._notifier.reloading()
            reloader.ask()
        result = reloader.poll()
        if result is None:
            return
        if isinstance(result, str):
            self._refused(result)
        elif result.digest == (self._adaptive.members[0] if self._adaptive else self.running).digest:
            self._notifier.ready("the model is the same")
            self._pipeline.emit_event("reloaded", model=result.path, digest=result.digest[:12], changed=False)
        else:
            self._adopt(result)

    def _refused(self, why: str) -> None:
        self._notifier.ready(f"a new model was refused: {why}")
        self._say(f"reload failed, the old model goes on: {why}")
        self._pipeline.account.reload_failures += 1
        self._pipeline.emit_event("reload_failed", reason=why)

    def _adopt(self, new: LoadedModel) -> None:
        """A reloaded model: at the end of the open window where windows do not overlap, so that no window is lost."""
        pipeline = self._pipeline
        same = same_windows(pipeline.engine.network, new.network)
        try:
            windows = None if same and pipeline.windows.lanes == new.engine.lanes else self._make_windows(new.network)
        except EdgeSSMError as error:  # a hop that is longer than the new window
            self._refused(str(error))
            return

        def replace_engine() -> None:
            if windows is None:
                self._hand_over(new)
            else:
                pipeline.replace_engine(new.engine, windows)
                self._live.adopt(new.network)
            pipeline.account.reloads += 1
            self._now_runs(new)
            self._lead_family(new)
            pipeline.emit_event("reloaded", model=new.path, digest=new.digest[:12], changed=True)
            self._say(f"{new.path}: reloaded, digest {new.digest[:12]}, engine {new.why}")
            self._notifier.ready(f"runs {new.path}, digest {new.digest[:12]}")

        if pipeline.windows.carry or pipeline.windows.lanes > 1:
            replace_engine()
        else:
            self._say(f"{new.path}: ready, digest {new.digest[:12]}; taken over when the open window ends")
            self._notifier.ready(f"{new.path} is taken over when the open window ends")
            pipeline.call_when_idle(replace_engine)

    def _lead_family(self, new: LoadedModel) -> None:
        """A reloaded model takes the place of the largest member, if the others can follow it."""
        adaptive = self._adaptive
        if adaptive is None:
            return
        if all(same_windows(member.network, new.network) for member in adaptive.members[1:]):
            adaptive.members[0] = new
            adaptive.ladder.rung = 0
        else:
            self._adaptive = None
            self._say(f"{new.path}: its windows or labels are not those of the smaller members; no moves any more")

    def _hand_over(self, new: LoadedModel) -> None:
        old = self._pipeline.engine.snapshot()
        state = transfer_state(self._pipeline.engine.network, old.state, new.network)
        new.engine.restore(Snapshot(new.engine.fingerprint, state))
        self._pipeline.replace_engine(new.engine)

    def _now_runs(self, new: LoadedModel) -> None:
        self.running = new
        self._checkpointer.artifact = new.artifact
        facts = self._live.facts
        facts.model, facts.model_digest, facts.engine = new.path, new.digest, new.engine.name

    def take(self, digest: str) -> bool:
        """Run the artifact of a snapshot, where it is the one that runs or a member of its family."""
        if digest == self.running.artifact:
            return True
        for rung, member in enumerate(self._adaptive.members if self._adaptive else []):
            if member.artifact == digest and self._adaptive is not None:
                self._adaptive.ladder.rung = rung
                self._pipeline.replace_engine(member.engine)
                self._now_runs(member)
                return True
        return False

    def _adapt(self, adaptive: Adaptation, now: float) -> None:
        account = self._pipeline.account
        decisions, misses = account.decisions - self._before[0], account.deadline_misses - self._before[1]
        celsius = max(machine.temperatures().values(), default=None)
        before = adaptive.ladder.rung
        why = adaptive.ladder.look(Measurements(decisions, misses, self._live.facts.power_w, celsius), now)
        if decisions and now - self._counted_at >= adaptive.ladder.settle_s:
            self._before, self._counted_at = (account.decisions, account.deadline_misses), now
        if not why:
            return
        self._before, self._counted_at = (account.decisions, account.deadline_misses), now
        member = adaptive.members[adaptive.ladder.rung]
        self._hand_over(member)
        account.moves += 1
        self._now_runs(member)
        direction = "smaller" if adaptive.ladder.rung > before else "larger"
        self._pipeline.emit_event("adapted", to=member.path, direction=direction, reason=why)
        self._say(f"moved to the {direction} {member.path}: {why}")

    _counted_at = 0.0
