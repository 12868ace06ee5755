"""An engine that may be lost while it runs, a GPU's, with another one that takes over where it was.

What a GPU holds is lost with its context, so a snapshot is taken every so often, and the samples since are kept: the
other engine restores the one, steps over the others, and goes on. No decision is missing and none is made twice.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edge_ssm.engines.base import Engine, Snapshot
from edge_ssm.errors import RunFailed
from edge_ssm.model.network import Array

EVERY = 256
"""Samples from one snapshot to the next."""


class FallbackEngine(Engine):
    """``first`` until a step of it fails, then what ``make_second`` makes; ``lost`` is what was said then."""

    def __init__(self, first: Engine, make_second: Callable[[], Engine]) -> None:
        super().__init__(first.network, first.lanes)
        self._now, self._make_second = first, make_second
        self.dtype = first.dtype  # type: ignore[misc]
        self._kept = first.snapshot()
        self._since: list[Array] = []

    @property
    def name(self) -> str:  # type: ignore[override]
        return self._now.name

    def _run(self, samples: Array, outputs: Array) -> None:
        try:
            self._now._run(samples, outputs)
        except RunFailed as failure:
            if self.lost:
                raise
            self._take_over(str(failure))
            self._now._run(samples, outputs)
        if not self.lost:
            self._since.append(samples.copy())
            if sum(len(part) for part in self._since) >= EVERY:
                self._keep()

    def _keep(self) -> None:
        try:
            self._kept, self._since = self._now.snapshot(), []
        except RunFailed as failure:
            self._take_over(str(failure))

    def _take_over(self, why: str) -> None:
        self.lost = why
        self._now = self._make_second()
        self._now.restore(self._kept)
        for part in self._since:
            self._now._run(part, np.empty((*part.shape[:-1], self.network.d_output), dtype=self.dtype))
        self._since = []

    def _changed(self, change: Callable[[Engine], None]) -> None:
        """Apply what does not come from samples, and keep its outcome."""
        try:
            change(self._now)
        except RunFailed as failure:
            if self.lost:
                raise
            self._take_over(str(failure))
            change(self._now)
        if not self.lost:
            self._keep()

    def reset(self, lane: int | None = None) -> None:
        self._changed(lambda engine: engine.reset(lane))

    def skip(self, k: int = 1, lane: int | None = None) -> None:
        self._changed(lambda engine: engine.skip(k, lane))

    def _state(self) -> tuple[Array, ...]:
        if not self.lost:
            self._keep()
        return self._now._state() if self.lost else self._kept.state

    def _set_state(self, state: tuple[Array, ...]) -> None:
        self._changed(lambda engine: engine.restore(Snapshot(self.fingerprint, state)))
