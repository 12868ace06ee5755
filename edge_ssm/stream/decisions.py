"""From a window's pooled outputs to a decision, and the events that stand beside decisions in the output."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge_ssm.network import Array, Network
from edge_ssm.stream.windows import Closed


@dataclass(frozen=True, slots=True)
class Decision:
    index: int
    start: int
    end: int
    """Samples [start, end) of the stream."""
    outputs: Array
    """(d_output,) float64: logits, or the regression's values."""
    label: str | None
    """None for a regression."""
    score: float | None
    """Softmax probability of the label; None for a regression."""
    time: float | str | None = None
    """Time stamp of the last sample, where the source has one."""
    truth: str | None = None
    gaps: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a reader of decisions must know: a reset, a window without a decision."""

    event: str
    sample: int
    details: dict[str, Any] = field(default_factory=dict)


def decide(network: Network, index: int, window: Closed, outputs: Array, time: float | str | None) -> Decision:
    """The decision of a window; ``outputs`` is its (finite) pooled output."""
    label = score = None
    if network.task == "classification":
        best = int(outputs.argmax())
        label = network.labelled[best]
        score = float(1 / np.exp(outputs - outputs[best]).sum())
    return Decision(index, window.start, window.end, outputs, label, score, time, window.truth, window.gaps)
