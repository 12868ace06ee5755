"""Replace an engine that fails in mid-stream by another one that continues from the same state.

A GPU's memory is lost with its context. A snapshot is therefore taken every few hundred samples, and the samples since
are kept. When the engine fails, its replacement restores the snapshot, steps through the kept samples and continues: no
decision is missing, and none is made twice.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_ssm.engines.base import Engine, Snapshot
from edge_ssm.engines.options import EngineOptions
from edge_ssm.errors import RunFailed
from edge_ssm.model.network import Array

SNAPSHOT_EVERY = 256
"""Number of samples from one snapshot to the next."""


class FallbackEngine(Engine):
    """Runs ``primary`` until one of its calls fails, and from then on the engine that ``create_secondary`` returns.

    ``lost`` then holds the message of the failure. A failure of the second engine is raised.
    """

    def __init__(self, primary: Engine, create_secondary: Callable[[], Engine]) -> None:
        super().__init__(primary.network, EngineOptions(lanes=primary.lanes))
        self._engine, self._create_secondary = primary, create_secondary
        self.dtype = primary.dtype  # type: ignore[misc]
        self._snapshot = primary.snapshot()
        self._samples_since: list[Array] = []

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the engine that runs now."""
        return self._engine.name

    def _run(self, samples: Array, outputs: Array) -> None:
        try:
            self._engine.chunk(samples, outputs)
        except RunFailed as failure:
            if self.lost:
                raise
            self._take_over(str(failure))
            self._engine.chunk(samples, outputs)
        if not self.lost:
            self._samples_since.append(samples.copy())
            if sum(len(chunk) for chunk in self._samples_since) >= SNAPSHOT_EVERY:
                self._take_snapshot()

    def _take_snapshot(self) -> None:
        try:
            self._snapshot, self._samples_since = self._engine.snapshot(), []
        except RunFailed as failure:
            self._take_over(str(failure))

    def _take_over(self, reason: str) -> None:
        self.lost = reason
        self._engine = self._create_secondary()
        self._engine.restore(self._snapshot)
        for samples in self._samples_since:
            self._engine.chunk(samples)
        self._samples_since = []

    def _change_state(self, change: Callable[[Engine], None]) -> None:
        """Change the state other than by samples, and take a snapshot of the result."""
        try:
            change(self._engine)
        except RunFailed as failure:
            if self.lost:
                raise
            self._take_over(str(failure))
            change(self._engine)
        if not self.lost:
            self._take_snapshot()

    def reset(self, lane: int | None = None) -> None:
        """Set the state of one lane, or of all lanes, to zero."""
        self._change_state(lambda engine: engine.reset(lane))

    def skip(self, k: int = 1, lane: int | None = None) -> None:
        """Let every state decay as over ``k`` samples without input."""
        self._change_state(lambda engine: engine.skip(k, lane))

    def _state(self) -> tuple[Array, ...]:
        if not self.lost:
            self._take_snapshot()
        return self._engine.snapshot().state if self.lost else self._snapshot.state

    def _set_state(self, state: tuple[Array, ...]) -> None:
        self._change_state(lambda engine: engine.restore(Snapshot(self.fingerprint, state)))
