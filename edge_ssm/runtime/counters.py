"""The counters of a run: one declaration each, from which everything that shows or keeps a counter is derived.

A counter is a field of ``Counters`` that ``counter`` or ``counter_by_reason`` declares, as in

    reloads: int = counter("Artifacts taken in while running.", row="reloads", summary=Phrase("reloads", "{}"))

Nothing else has to be written for a new one: the snapshot (``Counters.kept``), the status (``telemetry.status``), the
metrics (``telemetry.prometheus``), the summary (``telemetry.summary``), ``edge-ssm top`` and the status page read
``DECLARATIONS``. The pipeline increments plain attributes, so a declaration costs nothing per sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import msgspec

from edge_ssm.histogram import LatencyHistogram


class Phrase(msgspec.Struct, frozen=True):
    """How a counter appears in the summary of a run."""

    line: str
    """First word of the line that the phrase is part of. A new word starts a new line."""
    text: str
    """``{}`` stands for the count, or for the counts by reason. Phrases of a line follow one another directly."""
    zero: str = "0"
    """Stands for the counts by reason if there are none."""
    is_optional: bool = False
    """Whether the phrase is left out while the count is 0."""


class Declaration(msgspec.Struct, frozen=True):
    """What is known about a counter apart from its value."""

    help: str
    """What is counted, as a sentence: the help text of the metric."""
    name: str = ""
    """Attribute of ``Counters``, field of ``Status``, and the metric's name without ``edge_ssm_`` and ``_total``."""
    row: str = ""
    """Name of the row on the status page and in ``edge-ssm top``; empty if there is none."""
    reasons: tuple[str, ...] | None = None
    """None for a single number; otherwise the reasons that the metric shows from the start, as 0. (Prometheus does not
    see the first increase of a series that appears later.)"""
    prefix: str = ""
    """Precedes a reason in the snapshot (``prefix.reason``) and on the status page (``prefix: reason``)."""
    reason_of: str = ""
    """Name of the counter by reason that the status and the metrics show this one under; its reason is ``name``."""
    is_published: bool = True
    """Whether the status and the metrics contain it."""
    is_kept: bool = True
    """Whether a snapshot keeps it, so that it goes on counting after a restart."""
    summary: Phrase | None = None


def counter(
    help: str,
    *,
    row: str = "",
    reason_of: str = "",
    published: bool = True,
    kept: bool = True,
    summary: Phrase | None = None,
) -> Any:
    """Declare a single number (see ``Declaration``)."""
    declaration = Declaration(help, row=row, reason_of=reason_of, is_published=published, is_kept=kept, summary=summary)
    return field(default=0, metadata={"declaration": declaration})


def counter_by_reason(help: str, *, row: str, prefix: str, reasons: tuple[str, ...], summary: Phrase) -> Any:
    """Declare a number for each of several reasons (see ``Declaration``); always published and kept."""
    declaration = Declaration(help, row=row, reasons=reasons, prefix=prefix, summary=summary)
    return field(default_factory=Counter, metadata={"declaration": declaration})


@dataclass(repr=False, eq=False)  # neither is used, and both take time at start-up
class Counters:
    """Everything that arrived at a run, by what became of it, and the times of its steps."""

    samples: int = counter("Samples taken in, gaps among them.", summary=Phrase("samples", "{}"))
    decisions: int = counter("Decisions, by label; no label: values.", summary=Phrase("decisions", "{}"))
    gaps: Counter[str] = counter_by_reason(  # noqa: RUF009  it returns a dataclass field
        "Samples that had to be filled, skipped or given up.",
        row="gaps",
        prefix="gap",
        reasons=("lost", "missing", "out_of_range", "stopped"),
        summary=Phrase("samples", ", gaps {}"),
    )
    """By reason: missing and out_of_range (values), lost (the sender's sequence numbers or time stamps skip samples),
    stopped (this program did not run)."""
    malformed: int = counter(
        "Rows or trailing bytes that are not a frame; they get no sample number.",
        reason_of="dropped",
        summary=Phrase("samples", ", malformed rows {}"),
    )
    dropped: Counter[str] = counter_by_reason(  # noqa: RUF009
        "Input that was not used, or (output_*) decisions not handed on.",
        row="dropped",
        prefix="dropped",
        reasons=("discarded", "late", "malformed", "repeated", "unread"),
        summary=Phrase("dropped", "{}", zero="nothing"),
    )
    """By reason. Frames: repeated (already taken in), late (taken for lost before). Datagrams: unread (they came faster
    than they were read, and the system dropped them). Decisions: output_* (see ``Sink.dropped``)."""
    undecided: int = counter(
        "Windows that ended without a decision.",
        row="windows without a decision",
        summary=Phrase("decisions", ", windows without one {}"),
    )
    resets: int = counter(
        "Times the state was set to zero by a gap or by outputs that are not finite.",
        row="resets",
        summary=Phrase("decisions", ", resets {}"),
    )
    discarded: int = counter(
        "Samples of windows that a reset gave up, and samples between a reset and the next good one.",
        reason_of="dropped",
        summary=Phrase("decisions", " (gave up {} samples)", is_optional=True),
    )
    unfinished: int = counter(
        "Samples of the window that was open at the end of the run.",
        published=False,
        kept=False,
        summary=Phrase("decisions", ", last window unfinished with {} samples", is_optional=True),
    )
    deadline_misses: int = counter(
        "Decisions later than the budget allows.",
        row="decisions too late",
        summary=Phrase("dropped", "; late decisions {}"),
    )
    reconnects: int = counter(
        "Connections of the source made anew.", row="reconnects", summary=Phrase("dropped", ", connections {}")
    )
    reloads: int = counter("Artifacts taken in while running.", row="reloads", summary=Phrase("reloads", "{}"))
    reload_failures: int = counter(
        "Artifacts that were refused while running.", row="reloads refused", summary=Phrase("reloads", ", refused {}")
    )
    engine_losses: int = counter(
        "Engines that failed; another one took over.",
        row="engines lost",
        summary=Phrase("dropped", ", engines lost {}", is_optional=True),
    )
    moves: int = counter(
        "Changes between members of a family.",
        row="moves in the family",
        summary=Phrase("reloads", "; moves within the family {}"),
    )
    labelled: int = counter("Decisions whose window has a true label.", published=False)
    correct: int = counter("Decisions that equal the true label.", published=False)

    earlier: int = 0
    """Samples of the earlier runs whose state this one restored."""
    seconds: float = 0.0
    """Duration of the run, once it has ended."""
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)
    """Engine latency: one entry per step, or per chunk."""
    ended_by: str = "end of input"

    def kept(self) -> dict[str, int]:
        """Return the counts that a snapshot keeps; a count by reason has the key ``prefix.reason``."""
        counts: dict[str, int] = {}
        for declaration in DECLARATIONS:
            value = getattr(self, declaration.name)
            if declaration.reasons is not None:
                counts |= {f"{declaration.prefix}.{reason}": n for reason, n in value.items()}
            elif declaration.is_kept:
                counts[declaration.name] = value
        return counts

    def restore(self, counts: Mapping[str, int]) -> None:
        """Continue from the counts of ``kept``; a counter that they lack is 0, and unknown keys are ignored."""
        for declaration in DECLARATIONS:
            if declaration.reasons is not None:
                start = f"{declaration.prefix}."
                by_reason = {key[len(start) :]: n for key, n in counts.items() if key.startswith(start)}
                getattr(self, declaration.name).update(by_reason)
            elif declaration.is_kept:
                setattr(self, declaration.name, counts.get(declaration.name, 0))
        self.earlier = self.samples

    def published(self) -> dict[str, Any]:
        """Return what the status and the metrics show: by name, an int, or a dict of counts by reason without zeros.

        May be called from any thread.
        """
        values: dict[str, Any] = {}
        for declaration in PUBLISHED:
            value = getattr(self, declaration.name)
            # A copy is atomic; the pipeline may add a reason while a comprehension iterates.
            values[declaration.name] = value if declaration.reasons is None else dict(value.copy())
        for declaration in DECLARATIONS:
            if declaration.reason_of:
                values[declaration.reason_of][declaration.name] = getattr(self, declaration.name)
        return {
            name: {reason: n for reason, n in value.items() if n} if isinstance(value, dict) else value
            for name, value in values.items()
        }


DECLARATIONS: tuple[Declaration, ...] = tuple(
    msgspec.structs.replace(each.metadata["declaration"], name=each.name)
    for each in fields(Counters)
    if "declaration" in each.metadata
)
"""Every counter, in the order in which all outputs list them."""
PUBLISHED = tuple(each for each in DECLARATIONS if each.is_published and not each.reason_of)
"""Counters that are a field of the status and a metric of their own."""
