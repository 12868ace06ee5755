"""The table of engines: where each is implemented and what it requires.

An engine's module is imported only when the engine is instantiated, so that its packages may be missing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from edge_ssm.engines.base import Engine
from edge_ssm.engines.options import EngineOptions
from edge_ssm.errors import EngineUnavailable, UsageError
from edge_ssm.model.network import Network


@dataclass(frozen=True)
class EngineEntry:
    """One engine of the table."""

    module: str
    """Module that implements the engine."""
    cls: str
    """Name of the engine's class in ``module``; called with a network and ``EngineOptions``."""
    requires: tuple[str, ...]
    """Packages that must be importable. ``a|b`` means that either package will do."""
    hint: str
    """Command that installs the required packages."""
    nodes: tuple[str, ...] = ()
    """Device files of the required hardware, of which one must exist. Empty if no special hardware is required."""
    selectable: bool = True
    """Whether "auto" may select the engine."""
    graphs: bool = False
    """Whether the engine runs exported graphs, and therefore accepts a number of threads."""


GPU_NODES = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvgpu")
"""Device files of NVIDIA's driver: of a graphics card, and of a Jetson's integrated GPU."""

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
        selectable=False,
    ),
    "onnx": EngineEntry(
        "edge_ssm.engines.graph.onnx",
        "OnnxEngine",
        ("onnxruntime",),
        "pip install 'edge-ssm[onnx]'",
        selectable=False,
        graphs=True,
    ),
    "tflite": EngineEntry(
        "edge_ssm.engines.graph.tflite",
        "TfliteEngine",
        ("ai_edge_litert|tflite_runtime",),
        "pip install 'edge-ssm[tflite]'",
        selectable=False,
        graphs=True,
    ),
    "reference": EngineEntry("edge_ssm.engines.reference", "ReferenceEngine", (), ""),
}


def candidates(network: Network, allowed: Sequence[str] | None = None) -> list[str]:
    """Return the names of the installed engines that "auto" may select for a network.

    ``allowed`` restricts the names; None allows all. ``cpu-float32`` is left out where all mixing weights are float32
    already: it would be the same as ``cpu``.
    """
    has_small_weights = any(block.mixing.dtype != "float32" for block in network.blocks)
    names = [name for name in allowed or ENGINES if name in ENGINES and ENGINES[name].selectable and installed(name)]
    return [name for name in names if has_small_weights or name != "cpu-float32"]


def installed(name: str) -> bool:
    """Return whether an engine's packages and hardware are present. The engine may still fail to load."""
    entry = ENGINES[name]
    return not _missing_packages(entry) and (not entry.nodes or any(os.path.exists(node) for node in entry.nodes))


def _missing_packages(entry: EngineEntry) -> list[str]:
    def is_present(package: str) -> bool:
        try:
            return find_spec(package) is not None
        except ModuleNotFoundError:  # the parent package is missing
            return False

    return [package for package in entry.requires if not any(is_present(name) for name in package.split("|"))]


def missing(name: str) -> str:
    """Return which package an engine lacks, and the command that installs it; an empty string if none is missing."""
    entry = ENGINES[name]
    packages = _missing_packages(entry)
    if not packages:
        return ""
    return f"engine {name!r}: package {packages[0].replace('|', ' or ')} is missing; {entry.hint}"


def instantiate(name: str, network: Network, options: EngineOptions) -> Engine:
    """Create the engine of that name. "auto" is not a name here: ``registry.create`` resolves it.

    Raises
    ------
    UsageError
        The name is unknown, or ``options.threads`` is set for an engine that has one thread.
    EngineUnavailable
        A package or the hardware is missing, or the engine does not load.
    """
    if name not in ENGINES:
        raise UsageError(f"engine {name!r}: unknown, expected auto, {', '.join(ENGINES)}")
    if options.threads is not None and not ENGINES[name].graphs:
        raise UsageError(f"--threads: engine {name} has one thread; only {', '.join(graph_engines())} accept more")
    return _load(name)(network, options)


def graph_engines() -> list[str]:
    """Return the names of the engines that run exported graphs."""
    return [name for name, entry in ENGINES.items() if entry.graphs]


def _load(name: str) -> type[Engine]:
    entry = ENGINES[name]
    if problem := missing(name):
        raise EngineUnavailable(problem)
    try:
        cls: type[Engine] = getattr(import_module(entry.module), entry.cls)
    except ImportError as error:
        raise EngineUnavailable(f"engine {name!r}: does not load ({error}); {entry.hint}") from None
    return cls
