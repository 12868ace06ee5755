"""The target of a search: bounds on latency, accuracy and size, and the member that meets them best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from edge_ssm.errors import UsageError
from edge_ssm_build.pruning.family import Member


@dataclass(frozen=True)
class Target:
    """Bounds that the chosen member must meet. Without any, the search makes the member of every rate."""

    latency_us: float | None = None
    """Largest duration of a step, in microseconds."""
    accuracy_loss: float | None = None
    """Largest loss of balanced accuracy on the validation split against the unpruned network, in percentage points."""
    size_bytes: int | None = None
    """Largest size of the artifact file, in bytes."""

    def __post_init__(self) -> None:
        """Raise UsageError for a bound that is not finite."""
        for name, value in (("--target-latency", self.latency_us), ("--max-accuracy-loss", self.accuracy_loss)):
            if value is not None and not math.isfinite(value):
                raise UsageError(f"{name} {value}: expected a finite number")

    def is_set(self) -> bool:
        """Return True if there is any bound."""
        return (self.latency_us, self.accuracy_loss, self.size_bytes) != (None, None, None)

    def limits_cost(self) -> bool:
        """Return True if there is a bound on latency or size."""
        return self.latency_us is not None or self.size_bytes is not None

    def meets_cost(self, member: Member) -> bool:
        """Return True if the member's latency and size are within the bounds."""
        is_fast = self.latency_us is None or member.step_us <= self.latency_us
        return is_fast and (self.size_bytes is None or member.file_bytes <= self.size_bytes)

    def meets_accuracy(self, member: Member, base: Member) -> bool:
        """Return True if the member's loss of accuracy is within the bound."""
        return self.accuracy_loss is None or accuracy_loss(member, base) <= self.accuracy_loss


def accuracy_loss(member: Member, base: Member) -> float:
    """Return the loss of balanced validation accuracy, in percentage points."""
    return 100 * (base.validation.balanced_accuracy - member.validation.balanced_accuracy)


def is_last_rate(members: Sequence[Member], target: Target) -> bool:
    """Return True if no larger rate is worth trying: the network is small enough, or too much accuracy is lost."""
    last = members[-1]
    return not target.meets_accuracy(last, members[0]) or (target.limits_cost() and target.meets_cost(last))


def choose_member(members: Sequence[Member], target: Target) -> Member | None:
    """Return the best member within the target, or None.

    Within a bound on latency or size, that is the most accurate one; with a bound on accuracy alone, the fastest.
    Members that could not be written are not considered. ``members[0]`` is the unpruned network.
    """
    within = [m for m in members if m.failure is None and target.meets_cost(m) and target.meets_accuracy(m, members[0])]
    if not within:
        return None
    if not target.limits_cost():
        return min(within, key=lambda m: m.step_us)
    return max(within, key=lambda m: m.validation.rank)


def replaced_member(chosen: Member, members: Sequence[Member], target: Target) -> Member | None:
    """Return the member that would have been chosen if it could have been written, or None if that is ``chosen``."""
    best = choose_member([replace(m, failure=None) for m in members], target)
    return None if best is None or best.rate == chosen.rate else best


def describe_miss(members: Sequence[Member]) -> str:
    """Return how close the family came to a target that no member meets, as text."""
    last = next((m for m in reversed(members) if m.failure is None), members[-1])
    return (
        f"target: no member meets it; the smallest, rate {last.rate:g}, has step {last.step_us:.2f} us, "
        f"{last.file_bytes} bytes and loses {accuracy_loss(last, members[0]):.1f} points"
    )
