"""From a window's pooled outputs to a decision."""

from __future__ import annotations

import numpy as np

from edge_ssm.io.messages import Decision
from edge_ssm.model.network import Array, Network
from edge_ssm.runtime.windows import ClosedWindow


def decide(network: Network, index: int, window: ClosedWindow, outputs: Array, time: float | str | None) -> Decision:
    """Return the decision of a window.

    ``outputs`` are its pooled outputs, which must be finite; ``time`` is the time stamp of its last sample. The label
    is that of the largest output; the score is its softmax probability.
    """
    label = score = None
    if network.task == "classification":
        best = int(outputs.argmax())
        label = network.labelled[best]
        score = float(1 / np.exp(outputs - outputs[best]).sum())
    return Decision(index, window.start, window.end, outputs, label, score, time, window.truth, window.gaps)
