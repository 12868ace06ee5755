"""The registry of engines and the choice among them. An engine's module is imported only when it is asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from edge_ssm.engines.base import Engine, Snapshot
from edge_ssm.engines.wheels import note
from edge_ssm.errors import EngineUnavailable, UsageError
from edge_ssm.model.network import Network

if TYPE_CHECKING:
    from edge_ssm.formats.exported import Graph

__all__ = ["ENGINES", "Engine", "EngineEntry", "Snapshot", "available", "candidates", "create", "left_out", "missing"]


@dataclass(frozen=True)
class EngineEntry:
    module: str
    cls: str
    requires: tuple[str, ...]
    """Packages that must be installed for it; of several with | between them, one."""
    hint: str
    """The command that adds them."""
    nodes: tuple[str, ...] = ()
    """Device files, one of which is there where its hardware is."""
    chosen: bool = True
    """Whether "auto" may choose it."""
    graphs: bool = False
    """Whether it runs exported graphs, and takes a number of threads."""


GPU_NODES = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvgpu")
"""Of a card's driver, and of a Jetson's."""

ENGINES: dict[str, EngineEntry] = {
    "cpu": EngineEntry("edge_ssm.engines.cpu.engine", "CpuEngine", (), ""),
    "cpu-float32": EngineEntry("edge_ssm.engines.cpu.engine", "WideCpuEngine", (), ""),
    "cuda": EngineEntry(
        "edge_ssm.engines.cuda.engine", "CudaEngine", ("cuda.bindings",), "pip install 'edge-ssm[cuda]'", GPU_NODES
    ),
    "cuda-persistent": EngineEntry(
        "edge_ssm.engines.cuda.persistent",
        "PersistentCudaEngine",
        ("cuda.bindings",),
        "pip install 'edge-ssm[cuda]'",
        GPU_NODES,
        chosen=False,
    ),
    "onnx": EngineEntry(
        "edge_ssm.engines.graph.onnx",
        "OnnxEngine",
        ("onnxruntime",),
        "pip install 'edge-ssm[onnx]'",
        chosen=False,
        graphs=True,
    ),
    "tflite": EngineEntry(
        "edge_ssm.engines.graph.tflite",
        "TfliteEngine",
        ("ai_edge_litert|tflite_runtime",),
        "pip install 'edge-ssm[tflite]'",
        chosen=False,
        graphs=True,
    ),
    "reference": EngineEntry("edge_ssm.engines.reference", "ReferenceEngine", (), ""),
}


def candidates(network: Network, allowed: Sequence[str] | None = None) -> list[str]:
    """The engines that are there, are ``allowed`` and differ for this network (without small weights there is nothing
    to widen)."""
    small = any(block.mixing.dtype != "float32" for block in network.blocks)
    names = [name for name in allowed or ENGINES if name in ENGINES and ENGINES[name].chosen and installed(name)]
    return [name for name in names if small or name != "cpu-float32"]


def available(network: Network, every: bool = False, graph: Graph | None = None) -> list[str]:
    """The engines that load here and differ for this network: those that "auto" may choose, or ``every`` one."""
    absent = left_out(network, graph)
    return [name for name, entry in ENGINES.items() if name not in absent and (every or entry.chosen)]


def left_out(network: Network, graph: Graph | None = None) -> dict[str, str]:
    """Of all engines those that ``available`` leaves out, each with the reason in one line."""
    here = candidates(network)
    found = {}
    for name, entry in ENGINES.items():
        if why := missing(name):
            found[name] = why
        elif not installed(name):
            found[name] = f"engine {name!r}: none of its hardware is here ({', '.join(entry.nodes)})"
        elif entry.chosen and name not in here:
            found[name] = f"engine {name!r}: the model has no small weights, so it is the same as cpu"
        else:
            try:
                create(name, network, graph=graph)
            except EngineUnavailable as error:
                found[name] = str(error)
    return found


def create(
    name: str,
    network: Network,
    lanes: int = 1,
    gpu_waits: str = "spin",
    graph: Graph | None = None,
    threads: int | None = None,
) -> Engine:
    """An engine for ``lanes`` streams, all states zero; "auto" is the fastest here, by trial (``choice``).

    ``gpu_waits``: how the CPU waits for a GPU: spin, yield or block. ``graph``: an exported file's, for the engines
    that run graphs (one for another engine or sample rate is made anew from the network). ``threads``: of those, 1.

    Raises UsageError for an unknown name, EngineUnavailable if its package is missing or does not load.
    """
    if name == "auto":
        if threads is not None:
            raise UsageError(f"--threads: goes with --engine {' or '.join(_graph_engines())}")
        from edge_ssm.engines.selection import choose

        return choose(network, lanes, gpu_waits)[0]
    if name not in ENGINES:
        raise UsageError(f"engine {name!r}: unknown, expected auto, {', '.join(ENGINES)}")
    if threads is not None and not ENGINES[name].graphs:
        raise UsageError(f"--threads: the engine {name} has one; only {', '.join(_graph_engines())} take more")
    cls = _load(name)
    if ENGINES[name].graphs:
        return cls(network, lanes, graph=graph, threads=threads or 1)  # type: ignore[call-arg]
    return cls(network, lanes, waits=gpu_waits) if ENGINES[name].nodes else cls(network, lanes)  # type: ignore[call-arg]


def _graph_engines() -> list[str]:
    return [name for name, entry in ENGINES.items() if entry.graphs]


def installed(name: str) -> bool:
    """Whether the packages and the hardware that an engine needs are there; it may still not load."""
    entry = ENGINES[name]
    return not _absent(entry) and (not entry.nodes or any(os.path.exists(node) for node in entry.nodes))


def _absent(entry: EngineEntry) -> list[str]:
    def there(package: str) -> bool:
        try:
            return find_spec(package) is not None
        except ModuleNotFoundError:  # the package that it would be a part of
            return False

    return [package for package in entry.requires if not any(there(one) for one in package.split("|"))]


def missing(name: str) -> str:
    """Which package an engine lacks, and the command that adds it; empty if it lacks none."""
    entry = ENGINES[name]
    absent = _absent(entry)
    if not absent:
        return ""
    packages = absent[0].replace("|", " or ")
    wheels = f" ({note(name)})" if entry.graphs else ""
    return f"engine {name!r}: package {packages} is missing; {entry.hint}{wheels}"


def _load(name: str) -> type[Engine]:
    entry = ENGINES[name]
    if why := missing(name):
        raise EngineUnavailable(why)
    try:
        cls: type[Engine] = getattr(import_module(entry.module), entry.cls)
    except ImportError as error:
        raise EngineUnavailable(f"engine {name!r}: does not load ({error}); {entry.hint}") from None
    return cls
