"""``edge-ssm doctor``: examine what this machine has for edge-ssm, and what is missing.

The examination imports nothing heavy and touches nothing that could hang: packages are looked up but not imported, and
devices are read from /dev and /sys.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import psutil

import edge_ssm
from edge_ssm.engines.cpu import cache as kernel_cache
from edge_ssm.engines.registry import ENGINES, GPU_NODES
from edge_ssm.hardware.boards import board_name, profiles_of

OLDEST, NEWEST = (3, 10), (3, 14)


@dataclass(frozen=True)
class Finding:
    """What the examination found out about one part of the machine."""

    name: str
    ok: bool
    found: str
    add: str = ""
    """Command that adds a missing part; empty if there is none."""


def _package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _first_package(label: str, names: tuple[str, ...], add: str) -> Finding:
    for name in names:
        if installed := _package(name):
            return Finding(label, True, f"{name} {installed}")
    return Finding(label, False, "not installed", add)


def _python() -> Finding:
    running = platform.python_version()
    ok = OLDEST <= sys.version_info[:2] <= NEWEST
    return Finding("python", ok, f"{running} on {platform.machine()}", "" if ok else "use Python 3.10 to 3.14")


def _board() -> Finding:
    board = board_name()
    if board is None:
        return Finding("board", False, "not a Jetson (no device tree)")
    profiles = ", ".join(p.name for p in profiles_of(board))
    return Finding("board", True, f"{board}; profiles: {profiles or 'none'}")


def _kernel() -> Finding:
    kernel = kernel_cache.best()
    if kernel is not None:
        return Finding("engine cpu", True, f"kernel compiled for {kernel.header.target}, in {kernel_cache.folder()}")
    return Finding("engine cpu", False, f"no compiled kernel in {kernel_cache.folder()} yet", "edge-ssm compile")


def _cuda_driver() -> Finding:
    nodes = [node for node in GPU_NODES if os.path.exists(node)]
    add = "" if nodes else "a GPU and its driver (JetPack on a Jetson)"
    return Finding("cuda driver", bool(nodes), ", ".join(nodes) or "no device node", add)


def _onnx_runtime() -> Finding:
    name = "onnx runtime"
    plain, gpu = _package("onnxruntime"), _package("onnxruntime-gpu")
    if plain and gpu:
        both = f"onnxruntime {plain} and onnxruntime-gpu {gpu}, which overwrite each other"
        return Finding(name, False, both, "pip uninstall both, then pip install one of them")
    if not plain and not gpu:
        return Finding(name, False, "not installed", ENGINES["onnx"].hint)
    package = f"onnxruntime-gpu {gpu}" if gpu else f"onnxruntime {plain}"
    if gpu and not any(os.path.exists(node) for node in GPU_NODES):
        package += "; no GPU here, so the engine onnx runs on the CPU"
    return Finding(name, True, f"{package}; {_graph_writer('onnx')}")


def _litert() -> Finding:
    name = "litert"
    current, older = _package("ai-edge-litert"), _package("tflite-runtime")
    if current:
        return Finding(name, True, f"ai-edge-litert {current}; {_graph_writer('flatbuffers')}")
    if not older:
        return Finding(name, False, "not installed", ENGINES["tflite"].hint)
    numpy = _package("numpy") or "0"
    if int(numpy.partition(".")[0]) >= 2:
        return Finding(name, False, f"tflite-runtime {older} does not run with numpy {numpy}", "pip install 'numpy<2'")
    return Finding(name, True, f"tflite-runtime {older}; only exported files run")


def _graph_writer(package: str) -> str:
    installed = _package(package)
    if installed:
        return f"artifacts run too ({package} {installed})"
    return f"only exported files run; artifacts too after pip install {package}"


def _power_sensors() -> Finding:
    sensors = []
    for path in sorted(Path("/sys/class/hwmon").glob("hwmon*/name")):
        if _read(path).startswith("ina3221"):
            sensors.append(f"INA3221 ({path.parent.name})")
    for path in sorted(Path("/sys/class/powercap").glob("intel-rapl:?")):
        readable = os.access(path / "energy_uj", os.R_OK)
        sensors.append(f"RAPL {_read(path / 'name')}{'' if readable else ' (not readable: needs root)'}")
    for path in sorted(Path("/sys/class/power_supply").glob("*/power_now")):
        sensors.append(f"battery {path.parent.name}")
    return Finding("power sensors", bool(sensors), ", ".join(sensors) or "none: power cannot be measured here")


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
    """Return a finding for each part, edge-ssm itself first."""
    return [Finding("edge-ssm", True, edge_ssm.__version__), *(check() for check in _CHECKS)]


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """Return the findings as a JSON document."""
    return {"version": 1, "findings": [asdict(finding) for finding in findings]}


def render(findings: list[Finding]) -> str:
    """Return the findings as lines of text."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        remedy = f"\n{'':>{width + 6}}add: {finding.add}" if finding.add else ""
        lines.append(f"{'ok' if finding.ok else '--':>3} {finding.name:<{width}}  {finding.found}{remedy}")
    return "\n".join(lines)


@click.command("doctor")
@click.option("--json", "is_json", is_flag=True, help="Print JSON, for programs.")
def doctor(is_json: bool) -> None:
    """Show what this machine has for edge-ssm, what is missing, and the command that adds it."""
    findings = examine()
    click.echo(json.dumps(as_json(findings), indent=1) if is_json else render(findings))
