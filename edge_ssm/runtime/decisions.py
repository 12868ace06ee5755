"""From a window's pooled outputs to a decision, and the events that stand beside decisions in the output."""

from __future__ import annotations

import numpy as np

from edge_ssm.io.messages import Decision
from edge_ssm.model.network import Array, Network
from edge_ssm.runtime.windows import Closed


def decide(network: Network, index: int, window: Closed, outputs: Array, time: float | str | None) -> Decision:
    """The decision of a window; ``outputs`` is its (finite) pooled output."""
    label = score = None
    if network.task == "classification":
        best = int(outputs.argmax())
        label = network.labelled[best]
        score = float(1 / np.exp(outputs - outputs[best]).sum())
    return Decision(index, window.start, window.end, outputs, label, score, time, window.truth, window.gaps)
