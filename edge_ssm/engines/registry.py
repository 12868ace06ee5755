"""The engines by name: create one, or list those that are available on this machine."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edge_ssm.engines.base import Engine, Snapshot
from edge_ssm.engines.entries import (
    ENGINES,
    GPU_NODES,
    EngineEntry,
    candidates,
    graph_engines,
    installed,
    instantiate,
    missing,
)
from edge_ssm.engines.options import DEFAULT_OPTIONS, EngineOptions
from edge_ssm.engines.selection import select_engine
from edge_ssm.errors import EngineUnavailable, UsageError
from edge_ssm.model.network import Network

if TYPE_CHECKING:
    from edge_ssm.formats.exported import Graph

__all__ = ["ENGINES", "GPU_NODES", "Engine", "EngineEntry", "EngineOptions", "Snapshot", "available", "create"]
__all__ += ["candidates", "left_out", "missing"]


def create(
    name: str, network: Network, options: EngineOptions = DEFAULT_OPTIONS, *, lanes: int | None = None
) -> Engine:
    """Create an engine with all states zero.

    Parameters
    ----------
    name
        A key of ``ENGINES``, or "auto" for the engine that is the fastest on this machine (``selection``).
    network
        The network that the engine runs.
    options
        Lanes, threads and the like.
    lanes
        Shorthand for ``EngineOptions(lanes=lanes)``; takes precedence over ``options.lanes``.

    Raises
    ------
    UsageError
        The name is unknown, or an option does not apply to the engine.
    EngineUnavailable
        A package or the hardware is missing, or the engine does not load.
    """
    if lanes is not None:
        options = replace(options, lanes=lanes)
    if name != "auto":
        return instantiate(name, network, options)
    if options.threads is not None:
        raise UsageError(f"--threads: requires --engine {' or '.join(graph_engines())}")
    return select_engine(network, options)[0]


def available(network: Network, every: bool = False, graph: Graph | None = None) -> list[str]:
    """Return the engines that load on this machine: those that "auto" may select, or with ``every`` all of them."""
    unavailable = left_out(network, graph)
    return [name for name, entry in ENGINES.items() if name not in unavailable and (every or entry.selectable)]


def left_out(network: Network, graph: Graph | None = None) -> dict[str, str]:
    """Return the engines that cannot run a network on this machine, or that equal another engine, with the reason."""
    reasons = {}
    names = candidates(network)
    for name, entry in ENGINES.items():
        if problem := missing(name):
            reasons[name] = problem
        elif not installed(name):
            reasons[name] = f"engine {name!r}: its hardware is missing (none of {', '.join(entry.nodes)} exists)"
        elif entry.selectable and name not in names:
            reasons[name] = f"engine {name!r}: all weights are float32, so that it would be the same as cpu"
        else:
            try:
                instantiate(name, network, EngineOptions(graph=graph))
            except EngineUnavailable as error:
                reasons[name] = str(error)
    return reasons
