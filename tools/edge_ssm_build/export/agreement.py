"""Comparison of an engine's stream with the torch network's convolution mode, computed in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_ssm.engines.registry import create
from edge_ssm.model.network import Array, InputSpec, Network
from edge_ssm_build.training.network import SSMNetwork
from edge_ssm_build.training.scoring import as_input, predict_exactly


@dataclass(frozen=True)
class Agreement:
    """Agreement of an engine's stream with the torch network, window by window."""

    windows: int
    labels_differing: int
    """Number of windows with different labels, not counting ties."""
    ties: int
    """Number of windows whose two largest logits in float64 are closer than twice ``bound``: either label is right."""
    ties_differing: int
    """Number of ties for which the stream decides differently, in favour of a logit that is also that close."""
    max_error: float
    """Largest absolute error of a logit."""
    bound: float
    """Largest error that passes: the network's tolerance."""

    def passes(self) -> bool:
        """Return True if no label differs and no logit is off by more than the bound."""
        return not self.labels_differing and self.max_error <= self.bound

    def summary(self) -> str:
        """Return the comparison as one line of text."""
        labels = f"{self.labels_differing} labels differ" if self.labels_differing else "every label equal"
        if self.ties:
            labels += " but for ties" if self.ties_differing and not self.labels_differing else ""
            labels += f", {self.ties} ties (two largest logits within {2 * self.bound:.1e})"
            labels += f" of which {self.ties_differing} decided otherwise" if self.ties_differing else ""
        return f"{self.windows} windows, {labels}, largest error of a logit {self.max_error:.1e}"


def stream_windows(network: Network, engine: str, x: Array) -> Array:
    """Stream windows through an engine, each from a zero state.

    Parameters
    ----------
    network
        The network to step.
    engine
        Name of the engine.
    x
        Windows in the sensor's units, shape (n, window, d_input).

    Returns
    -------
    Array
        Pooled logits, shape (n, d_output), float64.
    """
    runner = create(engine, network, lanes=1)
    logits = []
    for window in x:
        runner.reset()
        outputs = runner.chunk(window).astype(np.float64)
        logits.append(outputs.mean(axis=0) if network.pooling == "mean" else outputs[-1])
    return np.stack(logits)


def convolve_windows(model: SSMNetwork, spec: InputSpec, x: Array) -> Array:
    """Return the logits (n, d_output) of the same windows from the torch network in convolution mode, in float64."""
    logits = predict_exactly(model, as_input(x, spec, np.float64)).numpy()
    return logits[:, -1] if model.config.pooling == "none" else logits


def compare_logits(expected: Array, actual: Array, bound: float) -> Agreement:
    """Compare two arrays of logits, each (n, d_output) float64.

    ``expected`` decides what is a tie: logits that are right to within ``bound`` can change places only if they are
    less than twice that apart.
    """
    rows = np.arange(len(expected))
    ranked = np.sort(expected, axis=1)
    ties = ranked[:, -1] - ranked[:, -2] < 2 * bound if expected.shape[1] > 1 else np.zeros(len(rows), bool)
    labels = actual.argmax(axis=1)
    differs = labels != expected.argmax(axis=1)
    is_error = differs & ~(ranked[:, -1] - expected[rows, labels] < 2 * bound)
    return Agreement(
        windows=len(rows),
        labels_differing=int(is_error.sum()),
        ties=int(ties.sum()),
        ties_differing=int((differs & ~is_error).sum()),
        max_error=float(np.abs(expected - actual).max()),
        bound=bound,
    )


def compare_engine(model: SSMNetwork, network: Network, engine: str, x: Array) -> Agreement:
    """Compare the torch network in float64 with an engine's stream of the same windows (n, window, d_input)."""
    expected = convolve_windows(model, network.input, x)
    return compare_logits(expected, stream_windows(network, engine, x), network.tolerance)
