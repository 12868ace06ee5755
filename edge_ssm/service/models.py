"""Models that are ready to run: loaded, signed if required, and on an engine that was verified."""

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

CHECK_S = 1.0
"""Time between two looks at the model's file."""


@dataclass(frozen=True)
class LoadedModel:
    """A model and the engine that runs it."""

    path: str
    digest: str
    """Digest of the file."""
    artifact_digest: str
    """Digest of the artifact, to which snapshots belong: for an exported file, the one that it was exported from."""
    network: Network
    """At the stream's sample rate."""
    engine: Engine
    engine_description: str
    """Name of the engine, and the trial that chose it."""
    stated_error: float = 0.0
    """Largest error of the outputs that an exported file states. Verification does not rely on it."""


def load(path: str, sample_rate: float | None, keys: list[str]) -> tuple[loading.Model, Network]:
    """Load a model; return it and its network at the stream's sample rate.

    ``keys`` are paths of public keys, one of which must have signed the model. Raises EdgeSSMError.
    """
    if keys:
        from edge_ssm.formats import signatures

        model = signatures.load(path, [Path(key) for key in keys])
    else:
        model = loading.load(path)
    network = model.network if sample_rate is None else at_sample_rate(model.network, sample_rate)
    return model, network


def same_windows(a: Network, b: Network) -> bool:
    """Return whether windows that were opened with network ``a`` can be continued with ``b``."""
    return (a.window, a.pooling, a.task, a.labels, a.d_output) == (b.window, b.pooling, b.task, b.labels, b.d_output)


def check_channels(path: str, network: Network, running: Network) -> None:
    """Raise InputRefused unless both networks read the same channels."""
    channels = network.input.channels
    if channels != running.input.channels:
        raise InputRefused(f"{path}: reads {', '.join(channels)}; the stream has {', '.join(running.input.channels)}")


def check_replacement(model: LoadedModel, running: Network) -> None:
    """Raise EdgeSSMError unless ``model`` can continue the stream of ``running`` and its engine computes correctly."""
    check_channels(model.path, model.network, running)
    check_outputs(model)


def check_outputs(model: LoadedModel, is_stopped: Callable[[], bool] = lambda: False) -> None:
    """Raise InputRefused unless the engine's outputs agree with the artifact's, within reasonable time."""
    verification.verify_with_timeout(model.path, model.engine, model.stated_error, is_stopped)


class Reloader:
    """Prepares a model in a thread, when its file changes or on request."""

    def __init__(self, path: str, prepare: Callable[[], LoadedModel]) -> None:
        self._path, self._prepare = path, prepare
        self._loaded = self._identity()
        self._changing: tuple[int, int, int] | None = None
        self._check_at = time.monotonic() + CHECK_S
        self._thread: threading.Thread | None = None
        self._result: LoadedModel | str | None = None
        self._is_requested = False

    def _identity(self) -> tuple[int, int, int] | None:
        """Return what changes when the file is replaced; None if there is no file."""
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size

    def request(self) -> None:
        """Load the file again, whether it has changed or not."""
        self._is_requested = True

    def poll(self) -> LoadedModel | str | None:
        """Return the model that was prepared, or why it was refused; None if there is neither. Never blocks."""
        if self._thread is not None:
            if self._thread.is_alive():
                return None
            self._thread = None
            result, self._result = self._result, None
            return result
        if self._is_requested or self._has_changed():
            self._is_requested, self._loaded = False, self._identity()
            self._thread = threading.Thread(target=self._run, name="reload", daemon=True)
            self._thread.start()
        return None

    def _has_changed(self) -> bool:
        """Return whether the file is another one, and was so at the last check too: not while it is being copied."""
        if time.monotonic() < self._check_at:
            return False
        self._check_at = time.monotonic() + CHECK_S
        identity = self._identity()
        if identity is None or identity == self._loaded:
            self._changing = None
            return False
        is_complete, self._changing = identity == self._changing, identity
        return is_complete

    def _run(self) -> None:
        try:
            self._result = self._prepare()
        except EdgeSSMError as error:
            self._result = str(error)
        except MemoryError:
            self._result = f"{self._path}: does not fit into memory beside the one that runs"
