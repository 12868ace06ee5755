"""Compare an engine with the float64 reference before its outputs are used.

An exported graph is somebody else's program, which may never return. ``verify_with_timeout`` therefore runs the test
in a thread that can be abandoned.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from edge_ssm.engines.base import Engine
from edge_ssm.engines.options import EngineOptions
from edge_ssm.engines.reference import ReferenceEngine
from edge_ssm.errors import EdgeSSMError, InputRefused
from edge_ssm.model.input_range import input_range
from edge_ssm.model.network import Array, MixingDtype, Network

LIMIT_S = 30.0
"""Time limit of ``verify_with_timeout``, seconds."""
THREAD = "self-test"
"""Name of the thread that runs a self-test."""
STEPS = 100
"""Number of samples that are compared."""
ORDINARY = 10.0
"""Magnitude of the outputs up to which a network's tolerance is absolute. It grows in proportion beyond that."""
OTHER_SAMPLES = 4.0
"""Allowance for the self-test's samples not being those that the exporter measured its error on."""
SMALLER_WEIGHTS: dict[MixingDtype, float] = {"float32": 0.0, "float16": 0.01, "int8": 0.25}
"""Largest error that a graph's weights may cause, as a share of the largest output.

Measured on 42 random networks of up to 6 layers: float16 causes at most 0.0004. int8 in ONNX, which quantises the
inputs of the mixing too, causes at most 0.10. On the demo network: 0.0002 and 0.05."""


def random_samples(network: Network, lanes: int) -> Array:
    """Return STEPS random samples in the units of the sensor, (STEPS, lanes, d_input), or (STEPS, d_input) for one."""
    rng = np.random.default_rng(0)
    limits, shape = input_range(network), (STEPS, *((lanes,) if lanes > 1 else ()), network.d_input)
    samples: Array
    if limits.whole:
        samples = rng.integers(0, int(limits.high[0]) + 1, shape).astype(np.float64)
    else:
        samples = network.input.mean + network.input.std * rng.standard_normal(shape)
    return samples


def exact_outputs(network: Network, samples: Array, lanes: int) -> Array:
    """Return the outputs of the float64 reference for ``samples``, starting from zero state."""
    return ReferenceEngine(network, EngineOptions(lanes=lanes)).chunk(samples)


def inaccuracy(engine: Engine, samples: Array, exact: Array, allowed_error: float = 0.0) -> str:
    """Return what is wrong with an engine's outputs for ``samples``; an empty string if nothing is.

    The outputs may differ from ``exact`` by the network's tolerance or by ``allowed_error`` (absolute), whichever is
    larger.
    """
    outputs, tolerance = engine.chunk(samples), engine.network.tolerance
    error = float(np.abs(outputs - exact).max())
    # A random network may amplify its input: large outputs are compared in proportion to their size.
    bound = max(tolerance * max(1.0, float(np.abs(exact).max()) / ORDINARY), allowed_error)
    if error <= bound:
        return ""
    return f"its outputs are off by {error:.1e}, more than {bound:.1e}"


def self_test(engine: Engine, stated_error: float = 0.0) -> str:
    """Return what is wrong with an engine, compared with the reference on random samples; empty if nothing is.

    The engine's state is zero afterwards.

    ``stated_error`` is the largest error that the exporter of the engine's graph has measured. Since anybody can write
    any number into a file, it counts only for graphs with smaller weights than the artifact's, and only up to the
    error that such weights can cause.
    """
    samples = random_samples(engine.network, engine.lanes)
    exact = exact_outputs(engine.network, samples, engine.lanes)
    size = float(np.abs(exact).max())
    stated_error = OTHER_SAMPLES * stated_error * max(1.0, size / ORDINARY)
    problem = inaccuracy(engine, samples, exact, min(stated_error, SMALLER_WEIGHTS[engine.graph_weights] * size))
    engine.reset()
    return problem


def verify_with_timeout(
    path: str, engine: Engine, stated_error: float = 0.0, is_stopped: Callable[[], bool] = lambda: False
) -> None:
    """Run ``self_test`` with a time limit of LIMIT_S.

    Parameters
    ----------
    path
        File of the model, for the message.
    engine
        The engine to test. Its state is zero afterwards.
    stated_error
        As for ``self_test``.
    is_stopped
        Polled while the test runs; the test is abandoned once it returns True.

    Raises
    ------
    InputRefused
        The outputs are wrong, or the test did not end in time.
    """
    outcome: list[str] = []

    def test() -> None:
        try:
            outcome.append(self_test(engine, stated_error))
        except EdgeSSMError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=test, name=THREAD, daemon=True)
    thread.start()
    end = time.monotonic() + LIMIT_S
    while thread.is_alive() and time.monotonic() < end and not is_stopped():
        thread.join(0.05)
    if not outcome:
        raise InputRefused(f"{path}: self-test failed, no answer within {LIMIT_S:g} s; export it again")
    if outcome[0]:
        raise InputRefused(f"{path}: self-test failed, {outcome[0]}")


def left_running() -> bool:
    """Return whether an abandoned self-test still runs. The process must then exit without joining its threads."""
    return any(thread.name == THREAD for thread in threading.enumerate())
