"""The options with which engines are created. Importing this module loads no engine, Numba or CUDA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from edge_ssm.formats.exported import Graph

Synchronization = Literal["spin", "yield", "block"]
"""How the CPU waits for a GPU: in a busy loop, yielding its time slice to other threads, or asleep until an interrupt.
The first has the lowest latency, the last the lowest power."""


@dataclass(frozen=True)
class EngineOptions:
    """What an engine needs to know besides its network. An engine ignores the options of other kinds of engines."""

    lanes: int = 1
    """Number of independent streams, at least 1."""
    synchronization: Synchronization = "spin"
    """GPU engines: how the CPU waits for the GPU (``gpu_waits`` in a firmware profile)."""
    graph: Graph | None = None
    """Engines that run exported graphs: the graph of the model file. None if the model is an artifact; the graph is
    then built from the network."""
    threads: int | None = None
    """Engines that run exported graphs: number of threads of their runtime. None is 1."""


DEFAULT_OPTIONS = EngineOptions()
