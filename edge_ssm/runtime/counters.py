"""The counters of a run: every sample that arrives is counted once, by what became of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from edge_ssm.histogram import LatencyHistogram


@dataclass
class Counters:
    """Everything that came in, by what became of it. Nothing is lost without standing here."""

    samples: int = 0
    """Frames accepted, each with a sample number; gaps are among them."""
    decisions: int = 0
    gaps: Counter[str] = field(default_factory=Counter)
    """Samples that the engine could not be given as they were, by reason: missing, out_of_range, lost (the sender's
    sequence numbers or time stamps skip them), stopped (this program did not run)."""
    malformed: int = 0
    """Rows or trailing bytes that are no frame; they get no sample number."""
    resets: int = 0
    discarded: int = 0
    """Accepted samples of windows that a reset gave up, and those between a reset and the next good sample."""
    undecided: int = 0
    """Windows that ended without a decision: all skipped, or outputs not finite."""
    dropped: Counter[str] = field(default_factory=Counter)
    """What got no sample number, by reason. Frames: repeated (already taken in), late (overtaken by a newer one).
    Datagrams: unread (the system threw them away, since they came faster than they were read)."""
    deadline_misses: int = 0
    """Decisions later than the sample period times the budget after their last sample came."""
    reconnects: int = 0
    reloads: int = 0
    reload_failures: int = 0
    moves: int = 0
    """Of the network: to a new artifact, one that was refused, and between members of a family."""
    engine_losses: int = 0
    """Engines that failed in mid-stream; another one took over."""
    labelled: int = 0
    correct: int = 0
    """Decisions with a true label, and those of them that are right."""
    unfinished: int = 0
    """Samples of the window that was open at the end."""
    earlier: int = 0
    """Samples of earlier runs, whose state this one took over."""
    seconds: float = 0.0
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)
    """Of the engine, one entry a step, or a chunk."""
    ended_by: str = "end of input"


_COUNTS = (
    "samples",
    "decisions",
    "malformed",
    "resets",
    "discarded",
    "undecided",
    "deadline_misses",
    "reconnects",
    "reloads",
    "reload_failures",
    "moves",
    "engine_losses",
    "labelled",
    "correct",
)
