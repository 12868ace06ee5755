"""An engine held to the reference before anything believes its outputs, and within a time.

A graph is somebody's program, which may never end: it is tried in a thread that can be left behind.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from edge_ssm.engines import selection
from edge_ssm.engines.base import Engine
from edge_ssm.errors import EdgeSSMError, InputRefused

LIMIT_S = 30.0
THREAD = "self-test"


def hold(path: str, engine: Engine, off_by: float = 0.0, stopped: Callable[[], bool] = lambda: False) -> None:
    """Raises InputRefused unless the engine computes what the model at ``path`` says, within LIMIT_S.

    ``off_by``: what its exporter says that its outputs were off by (``choice.self_test``).
    """
    outcome: list[str] = []

    def test() -> None:
        try:
            outcome.append(selection.self_test(engine, off_by))
        except EdgeSSMError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=test, name=THREAD, daemon=True)
    thread.start()
    end = time.monotonic() + LIMIT_S
    while thread.is_alive() and time.monotonic() < end and not stopped():
        thread.join(0.05)
    if not outcome:
        raise InputRefused(f"{path}: self-test failed, no answer within {LIMIT_S:g} s; export it again")
    if outcome[0]:
        raise InputRefused(f"{path}: self-test failed, {outcome[0]}")


def left_running() -> bool:
    """Whether a graph that was given up still runs here: the process can't end in the ordinary way then."""
    return any(thread.name == THREAD for thread in threading.enumerate())
