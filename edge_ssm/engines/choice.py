"""Which engine "auto" is: the one whose steps of this network are the shortest on this machine, by a short trial.

The trial's figures are kept in the folder of compiled kernels, so that later starts only read them.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from edge_ssm import atomic
from edge_ssm.engines import compiled
from edge_ssm.engines.base import Engine
from edge_ssm.engines.image import processor_features, sources_digest
from edge_ssm.errors import EngineUnavailable
from edge_ssm.network import Array, Network, fingerprint

ROUNDS = 5
STEPS = 20
SUFFIX = ".trial"


class Trial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    step_us: dict[str, float]
    """Of each engine that loads here."""
    unavailable: dict[str, str]
    """Why the others do not."""

    @property
    def winner(self) -> str:
        return min(self.step_us, key=self.step_us.__getitem__)

    def why(self) -> str:
        """The figures in words, the winner's first."""
        order = sorted(self.step_us.items(), key=lambda item: item[1])
        return ", ".join(f"{name} {step_us:.4g} us" for name, step_us in order) + " a step"


def measure(engines: Sequence[Engine], samples: Sequence[Array], rounds: int) -> list[float]:
    """Median microseconds of a step of each engine.

    The engines take turns, so that what else the machine does meets all of them; a round's figure is the mean of its
    steps over ``samples``, the result the median of rounds.
    """
    found: list[list[float]] = [[] for _ in engines]
    for _ in range(rounds + 1):
        for engine, times in zip(engines, found, strict=True):
            begin = time.perf_counter_ns()
            for sample in samples:
                engine.step(sample)
            times.append((time.perf_counter_ns() - begin) / 1000 / len(samples))
    # The first round warms caches and branch predictors.
    return [statistics.median(times[1:]) for times in found]


def choose(network: Network, lanes: int) -> tuple[Engine, Trial]:
    """The fastest engine for ``lanes`` streams, and the trial that says so. Raises EngineUnavailable if none loads."""
    path = compiled.folder() / f"{_key(network, lanes)}{SUFFIX}"
    trial = _kept(path)
    if trial is not None:
        try:
            return _create(trial.winner, network, lanes), trial
        except EngineUnavailable:
            pass  # It was there once; try again what is.
    trial = _tried(network, lanes)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, msgspec.json.encode(trial))
    except OSError:
        pass  # Tried again at the next start.
    return _create(trial.winner, network, lanes), trial


def _create(name: str, network: Network, lanes: int) -> Engine:
    from edge_ssm.engines import create

    return create(name, network, lanes)


def _key(network: Network, lanes: int) -> str:
    parts: list[Any] = [fingerprint(network), lanes, sources_digest(), *sorted(processor_features())]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _kept(path: Any) -> Trial | None:
    from edge_ssm.engines import ENGINES

    try:
        trial = msgspec.json.decode(path.read_bytes(), type=Trial)
    except (OSError, msgspec.DecodeError):
        return None
    # An engine that was added since deserves its trial.
    return trial if trial.step_us and {*trial.step_us, *trial.unavailable} == set(ENGINES) else None


def _tried(network: Network, lanes: int) -> Trial:
    from edge_ssm.engines import ENGINES

    made: dict[str, Engine] = {}
    unavailable: dict[str, str] = {}
    for name in ENGINES:
        try:
            made[name] = _create(name, network, lanes)
        except EngineUnavailable as error:
            unavailable[name] = str(error)
    if not made:
        raise EngineUnavailable("; ".join(unavailable.values()))
    sample = np.tile(np.asarray(network.input.mean, dtype=np.float64), (lanes, 1))
    samples = [sample[0] if lanes == 1 else sample] * STEPS
    return Trial(dict(zip(made, measure(list(made.values()), samples, ROUNDS), strict=True)), unavailable)
