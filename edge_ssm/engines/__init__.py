"""The registry of engines and the choice among them. An engine's module is imported only when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from edge_ssm.engines.base import Engine, Snapshot
from edge_ssm.errors import EngineUnavailable, UsageError
from edge_ssm.network import Network

__all__ = ["ENGINES", "Engine", "EngineEntry", "Snapshot", "choose", "create"]


@dataclass(frozen=True)
class EngineEntry:
    module: str
    cls: str
    requires: tuple[str, ...]
    """Packages that must be installed for it."""
    hint: str
    """The command that adds them."""


# In the order of preference of "auto".
ENGINES: dict[str, EngineEntry] = {
    "cpu": EngineEntry("edge_ssm.engines.cpu", "CpuEngine", ("numba",), "pip install numba"),
    "reference": EngineEntry("edge_ssm.engines.reference", "ReferenceEngine", (), ""),
}


def missing(name: str) -> list[str]:
    """Packages that the engine needs and this Python lacks."""
    return [package for package in ENGINES[name].requires if find_spec(package) is None]


def choose(name: str) -> str:
    """The engine that ``name`` stands for here: itself, or for "auto" the first whose packages are installed."""
    if name == "auto":
        return next(candidate for candidate in ENGINES if not missing(candidate))
    if name not in ENGINES:
        raise UsageError(f"engine {name!r}: unknown, expected auto, {', '.join(ENGINES)}")
    return name


def create(name: str, network: Network, lanes: int = 1) -> Engine:
    """An engine for ``lanes`` streams, all states zero.

    Raises UsageError for an unknown name, EngineUnavailable if its package is missing or does not load.
    """
    chosen = choose(name)
    entry = ENGINES[chosen]
    if absent := missing(chosen):
        raise EngineUnavailable(f"engine {chosen!r}: package {absent[0]} is missing; {entry.hint}")
    try:
        cls: type[Engine] = getattr(import_module(entry.module), entry.cls)
    except ImportError as error:
        raise EngineUnavailable(f"engine {chosen!r}: does not load ({error}); {entry.hint}") from None
    return cls(network, lanes)
