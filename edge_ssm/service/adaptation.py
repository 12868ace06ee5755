"""Adaptation: when to move to a smaller model of a family, and back.

A run moves down when decisions are late, or power or temperature exceed their limits. It moves back up after everything
has been within limits for a while (hysteresis); the while doubles whenever moving up turned out to be too early.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_ssm.service.models import LoadedModel

RETURN_SHARE = 0.9
"""Share of the power limit that must not be exceeded before a larger member is tried again."""
RETURN_MARGIN_C = 5.0
"""How far below its limit the temperature must be by then."""
PATIENCE = 3.0
"""Cooldowns within limits before a larger member is tried."""
MAX_PATIENCE = 64.0


@dataclass(frozen=True)
class Limits:
    """What makes a run move to a smaller member."""

    miss_share: float
    """Share of decisions that may be late."""
    power_w: float | None
    temperature_c: float | None
    cooldown_s: float
    """Time between two moves: a move shows its effect only after a while."""


@dataclass(frozen=True)
class Measurements:
    """What is compared with the limits, since the last move or over the last cooldown."""

    decisions: int
    misses: int
    power_w: float | None
    temperature_c: float | None


class AdaptationPolicy:
    """Chooses among members 0 (the largest) to ``levels`` - 1. ``now`` is ``time.monotonic()`` throughout."""

    def __init__(self, levels: int, limits: Limits, now: float) -> None:
        self.level = 0
        """Number of the member that is to run."""
        self._levels, self._limits = levels, limits
        self._moved_at = now
        self._within_limits_since = now
        self._patience = PATIENCE
        self._moved_up_at: float | None = None

    @property
    def cooldown_s(self) -> float:
        """Time between two moves, in seconds."""
        return self._limits.cooldown_s

    def start_at(self, level: int) -> None:
        """Take ``level`` as the member that runs, whatever the measurements are."""
        self.level = level

    def update(self, measurements: Measurements, now: float) -> str:
        """Change ``level`` if the measurements call for it. Return why it was changed; empty if it was not."""
        excess = self._excess(measurements)
        if excess or not self._is_well_within(measurements):
            self._within_limits_since = now
        cooldown_s = self._limits.cooldown_s
        if now - self._moved_at < cooldown_s:
            return ""
        if excess and self.level + 1 < self._levels:
            if self._moved_up_at is not None and now - self._moved_up_at < 4 * cooldown_s:
                self._patience = min(2 * self._patience, MAX_PATIENCE)
            self._moved_up_at = None
            self._move(self.level + 1, now)
            return excess
        if self.level and now - self._within_limits_since >= self._patience * cooldown_s:
            self._moved_up_at = now
            self._move(self.level - 1, now)
            return "within all budgets again"
        return ""

    def _move(self, level: int, now: float) -> None:
        self.level, self._moved_at, self._within_limits_since = level, now, now

    def _excess(self, m: Measurements) -> str:
        """Return which limit is exceeded; empty if none is."""
        limits = self._limits
        if m.decisions and m.misses / m.decisions > limits.miss_share:
            return f"{m.misses} of {m.decisions} decisions late"
        if limits.power_w is not None and m.power_w is not None and m.power_w > limits.power_w:
            return f"{m.power_w:.2f} W, budget {limits.power_w:g} W"
        if limits.temperature_c is not None and m.temperature_c is not None and m.temperature_c > limits.temperature_c:
            return f"{m.temperature_c:.1f} C, limit {limits.temperature_c:g} C"
        return ""

    def _is_well_within(self, m: Measurements) -> bool:
        """Return whether a larger member may be tried."""
        limits = self._limits
        return (
            m.misses == 0
            and (limits.power_w is None or m.power_w is None or m.power_w < RETURN_SHARE * limits.power_w)
            and (
                limits.temperature_c is None
                or m.temperature_c is None
                or m.temperature_c < limits.temperature_c - RETURN_MARGIN_C
            )
        )


@dataclass
class Adaptation:
    """A family of models, and the policy that chooses among them."""

    policy: AdaptationPolicy
    members: list[LoadedModel]
    """The largest first; member 0 is the run's own model."""
