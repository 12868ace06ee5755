"""A model made ready beside the one that runs: loaded, verified, on an engine that was held to the reference."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_ssm.engines import verification
from edge_ssm.engines.registry import Engine
from edge_ssm.errors import EdgeSSMError, InputRefused
from edge_ssm.formats import loading
from edge_ssm.model.network import Network
from edge_ssm.model.transforms import at_sample_rate

LOOK_S = 1.0


@dataclass(frozen=True)
class LoadedModel:
    path: str
    digest: str
    artifact: str
    """Digest of the artifact: an exported file's is that which it was exported from. Snapshots belong to it."""
    network: Network
    """At the stream's sample rate."""
    engine: Engine
    why: str
    """Of the engine: its name, and the trial that chose it."""
    off_by: float = 0.0
    """What an exported file's exporter says that its outputs were off by; the self-test believes little of it."""


def load(path: str, sample_rate: float | None, keys: list[str]) -> tuple[loading.Model, Network]:
    """A model, and its network at the stream's rate; with ``keys``, only what one of them signed.

    Raises EdgeSSMError.
    """
    if keys:
        from edge_ssm.formats import signatures

        found = signatures.load(path, [Path(key) for key in keys])
    else:
        found = loading.load(path)
    network = found.network if sample_rate is None else at_sample_rate(found.network, sample_rate)
    return found, network


def same_windows(a: Network, b: Network) -> bool:
    """Whether windows that are open under ``a`` mean the same under ``b``."""
    return (a.window, a.pooling, a.task, a.labels, a.d_output) == (b.window, b.pooling, b.task, b.labels, b.d_output)


def check_channels(path: str, network: Network, running: Network) -> None:
    """Raises InputRefused unless both read the same channels."""
    channels = network.input.channels
    if channels != running.input.channels:
        raise InputRefused(f"{path}: reads {', '.join(channels)}; the stream has {', '.join(running.input.channels)}")


def check_beside(candidate: LoadedModel, running: Network) -> None:
    """Raises EdgeSSMError unless the candidate can take the running stream over and computes what it should."""
    check_channels(candidate.path, candidate.network, running)
    check_outputs(candidate)


def check_outputs(candidate: LoadedModel, stopped: Callable[[], bool] = lambda: False) -> None:
    """Raises InputRefused unless the engine computes what the artifact says, within reasonable time."""
    verification.verify_with_timeout(candidate.path, candidate.engine, candidate.off_by, stopped)


class Reloader:
    """Prepares a model in a thread when its file changes or when asked, and hands it over when it is ready."""

    def __init__(self, path: str, prepare: Callable[[], LoadedModel]) -> None:
        self._path, self._prepare = path, prepare
        self._seen = self._stamp()
        self._changing: tuple[int, int, int] | None = None
        self._look_at = time.monotonic() + LOOK_S
        self._thread: threading.Thread | None = None
        self._result: LoadedModel | str | None = None
        self._asked = False

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size

    def ask(self) -> None:
        """Load the file again, changed or not."""
        self._asked = True

    def poll(self) -> LoadedModel | str | None:
        """From the loop: what was prepared, or why it could not be; None while there is nothing."""
        if self._thread is not None:
            if self._thread.is_alive():
                return None
            self._thread = None
            result, self._result = self._result, None
            return result
        if self._asked or self._changed():
            self._asked, self._seen = False, self._stamp()
            self._thread = threading.Thread(target=self._run, name="reload", daemon=True)
            self._thread.start()
        return None

    def _changed(self) -> bool:
        """Whether the file is another one than before, and has been the same for two looks: not half copied."""
        if time.monotonic() < self._look_at:
            return False
        self._look_at = time.monotonic() + LOOK_S
        now = self._stamp()
        if now is None or now == self._seen:
            self._changing = None
            return False
        acknowledged, self._changing = now == self._changing, now
        return acknowledged

    def _run(self) -> None:
        try:
            self._result = self._prepare()
        except EdgeSSMError as error:
            self._result = str(error)
        except MemoryError:
            self._result = f"{self._path}: does not fit into memory beside the one that runs"
