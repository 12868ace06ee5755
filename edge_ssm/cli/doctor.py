"""What this machine has for edge-ssm, what is missing, and the command that adds it.

Imports nothing heavy and probes nothing that could hang: packages are looked up, not imported, and devices are read
from /dev and /sys.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

import edge_ssm
from edge_ssm.engines.cpu import cache as kernel_cache
from edge_ssm.engines.registry import ENGINES, GPU_NODES
from edge_ssm.hardware.boards import board_name, profiles_of

OLDEST, NEWEST = (3, 10), (3, 12)


@dataclass(frozen=True)
class Finding:
    name: str
    ok: bool
    found: str
    add: str = ""
    """What adds it, where it is missing; empty where nothing does."""


def _package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _first_package(label: str, names: tuple[str, ...], add: str) -> Finding:
    for name in names:
        if found := _package(name):
            return Finding(label, True, f"{name} {found}")
    return Finding(label, False, "not installed", add)


def _python() -> Finding:
    found = platform.python_version()
    ok = OLDEST <= sys.version_info[:2] <= NEWEST
    return Finding("python", ok, f"{found} on {platform.machine()}", "" if ok else "use Python 3.10, 3.11 or 3.12")


def _board() -> Finding:
    board = board_name()
    if board is None:
        return Finding("board", False, "not a Jetson (no device tree)")
    profiles = ", ".join(p.name for p in profiles_of(board))
    return Finding("board", True, f"{board}; profiles: {profiles or 'none'}")


def _kernel() -> Finding:
    kept = kernel_cache.best()
    if kept is not None:
        return Finding("engine cpu", True, f"kernel compiled for {kept.header.target}, in {kernel_cache.folder()}")
    return Finding("engine cpu", False, f"no compiled kernel in {kernel_cache.folder()} yet", "edge-ssm compile")


def _cuda_driver() -> Finding:
    nodes = [node for node in GPU_NODES if os.path.exists(node)]
    add = "" if nodes else "a GPU and its driver (JetPack on a Jetson)"
    return Finding("cuda driver", bool(nodes), ", ".join(nodes) or "no device node", add)


def _onnx_runtime() -> Finding:
    name = "onnx runtime"
    plain, gpu = _package("onnxruntime"), _package("onnxruntime-gpu")
    if plain and gpu:
        found = f"onnxruntime {plain} and onnxruntime-gpu {gpu}, which overwrite each other"
        return Finding(name, False, found, "pip uninstall both, then pip install one of them")
    if not plain and not gpu:
        return Finding(name, False, "not installed", ENGINES["onnx"].hint)
    found = f"onnxruntime-gpu {gpu}" if gpu else f"onnxruntime {plain}"
    if gpu and not any(os.path.exists(node) for node in GPU_NODES):
        found += "; no GPU here, so the engine onnx runs on the CPU"
    return Finding(name, True, f"{found}; {_makes_graphs('onnx')}")


def _litert() -> Finding:
    name = "litert"
    current, older = _package("ai-edge-litert"), _package("tflite-runtime")
    if current:
        return Finding(name, True, f"ai-edge-litert {current}; {_makes_graphs('flatbuffers')}")
    if not older:
        return Finding(name, False, "not installed", ENGINES["tflite"].hint)
    numpy = _package("numpy") or "0"
    if int(numpy.partition(".")[0]) >= 2:
        return Finding(name, False, f"tflite-runtime {older} does not run with numpy {numpy}", "pip install 'numpy<2'")
    return Finding(name, True, f"tflite-runtime {older}; only exported files run")


def _makes_graphs(package: str) -> str:
    found = _package(package)
    if found:
        return f"artifacts run too ({package} {found})"
    return f"only exported files run; artifacts too after pip install {package}"


def _power_sensors() -> Finding:
    found = []
    for path in sorted(Path("/sys/class/hwmon").glob("hwmon*/name")):
        if _read(path).startswith("ina3221"):
            found.append(f"INA3221 ({path.parent.name})")
    for path in sorted(Path("/sys/class/powercap").glob("intel-rapl:?")):
        readable = os.access(path / "energy_uj", os.R_OK)
        found.append(f"RAPL {_read(path / 'name')}{'' if readable else ' (not readable: needs root)'}")
    for path in sorted(Path("/sys/class/power_supply").glob("*/power_now")):
        found.append(f"battery {path.parent.name}")
    return Finding("power sensors", bool(found), ", ".join(found) or "none: power can't be measured here")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _jtop() -> Finding:
    installed, socket = _package("jetson-stats"), os.path.exists("/run/jtop.sock")
    if not installed:
        return Finding("jtop", False, "not installed", "pip install 'edge-ssm[jetson]'")
    if not socket:
        return Finding("jtop", False, f"jetson-stats {installed}, service not running", "sudo systemctl start jtop")
    return Finding("jtop", True, f"jetson-stats {installed}, service running")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return Finding(
        "cpu and memory", True, f"{cores} cores, {memory.total / 2**30:.1f} GiB ({memory.available / 2**30:.1f} free)"
    )


_CHECKS: tuple[Callable[[], Finding], ...] = (
    _python,
    _board,
    _memory,
    _kernel,
    lambda: _first_package("numba (compiles it)", ("numba",), "pip install numba"),
    _cuda_driver,
    lambda: _first_package("numba-cuda", ("numba-cuda",), "pip install 'edge-ssm[cuda]'"),
    lambda: _first_package("cryptography", ("cryptography",), "pip install 'edge-ssm[signing]' (for signed models)"),
    _onnx_runtime,
    _litert,
    _jtop,
    _power_sensors,
    lambda: _first_package("torch (host tool)", ("torch",), "pip install 'edge-ssm[host]' (on the workstation only)"),
)


def examine() -> list[Finding]:
    return [Finding("edge-ssm", True, edge_ssm.__version__), *(check() for check in _CHECKS)]


def as_json(findings: list[Finding]) -> dict[str, Any]:
    return {"version": 1, "findings": [asdict(finding) for finding in findings]}


def render(findings: list[Finding]) -> str:
    width = max(len(f.name) for f in findings)
    lines = []
    for f in findings:
        add = f"\n{'':>{width + 6}}add: {f.add}" if f.add else ""
        lines.append(f"{'ok' if f.ok else '--':>3} {f.name:<{width}}  {f.found}{add}")
    return "\n".join(lines)
