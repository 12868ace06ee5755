"""When to move to a smaller member of a family, and back: deadlines missed, power, temperature, with hysteresis."""

from __future__ import annotations

from dataclasses import dataclass

BACK = 0.9
"""A measure must stay under this share of its limit before a larger member is tried again."""
COOLER_C = 5.0
"""And a temperature so far under it."""
PATIENCE = 3.0
"""Going back takes so many times the settling time; doubled whenever going back turned out to be too early."""
LONGEST_PATIENCE = 64.0


@dataclass(frozen=True)
class Limits:
    misses: float
    """Share of decisions that may be late."""
    power_w: float | None
    temperature_c: float | None
    settle_s: float
    """Between a move and the next look: a move shows its effect only after a while."""


@dataclass(frozen=True)
class Measurements:
    """Since the last move, or over the last ``settle_s``."""

    decisions: int
    misses: int
    power_w: float | None
    temperature_c: float | None


class AdaptationPolicy:
    """Members 0 (the largest) to ``rungs`` - 1. ``look`` says where to stand, and why."""

    def __init__(self, rungs: int, limits: Limits, now: float) -> None:
        self._rungs, self._limits = rungs, limits
        self.rung = 0
        self._since = now
        self._well_since = now
        self._patience = PATIENCE
        self._went_up_at: float | None = None

    @property
    def settle_s(self) -> float:
        return self._limits.settle_s

    def look(self, measures: Measurements, now: float) -> str:
        """Why ``rung`` was changed just now; empty if it was not."""
        over = self._over(measures)
        if over or not self._well(measures):
            self._well_since = now
        if now - self._since < self._limits.settle_s:
            return ""
        if over and self.rung + 1 < self._rungs:
            if self._went_up_at is not None and now - self._went_up_at < 4 * self._limits.settle_s:
                self._patience = min(2 * self._patience, LONGEST_PATIENCE)
            self._went_up_at = None
            self._move(self.rung + 1, now)
            return over
        if self.rung and now - self._well_since >= self._patience * self._limits.settle_s:
            self._went_up_at = now
            self._move(self.rung - 1, now)
            return "within all budgets again"
        return ""

    def _move(self, rung: int, now: float) -> None:
        self.rung, self._since, self._well_since = rung, now, now

    def _over(self, m: Measurements) -> str:
        limits = self._limits
        if m.decisions and m.misses / m.decisions > limits.misses:
            return f"{m.misses} of {m.decisions} decisions late"
        if limits.power_w is not None and m.power_w is not None and m.power_w > limits.power_w:
            return f"{m.power_w:.2f} W, budget {limits.power_w:g} W"
        if limits.temperature_c is not None and m.temperature_c is not None and m.temperature_c > limits.temperature_c:
            return f"{m.temperature_c:.1f} C, limit {limits.temperature_c:g} C"
        return ""

    def _well(self, m: Measurements) -> bool:
        limits = self._limits
        return (
            m.misses == 0
            and (limits.power_w is None or m.power_w is None or m.power_w < BACK * limits.power_w)
            and (
                limits.temperature_c is None
                or m.temperature_c is None
                or m.temperature_c < limits.temperature_c - COOLER_C
            )
        )
