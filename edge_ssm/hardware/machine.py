"""The machine that a measurement is made on, and what about it may change while it runs."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import msgspec
import numpy as np
import psutil

from edge_ssm.hardware.boards import board_name, power_mode

TEGRA_RELEASE = Path("/etc/nv_tegra_release")
JETPACK = {"35": "JetPack 5", "36": "JetPack 6", "38": "JetPack 7", "39": "JetPack 7"}
"""By the major release of Jetson Linux (L4T)."""
SYS = Path("/sys")


class Machine(msgspec.Struct, frozen=True):
    """What stays as it is."""

    board: str
    processor: str
    cores: int
    kernel: str
    python: str
    jetpack: str | None
    power_mode: str | None
    """By nvpmodel's name."""
    governor: str | None
    memory_mib: int


class State(msgspec.Struct, frozen=True):
    """At one moment."""

    power_mode: str | None
    governor: str | None
    max_mhz: list[float]
    """Of each online core, the highest clock that is allowed now."""
    gpu_mhz: float | None
    temperature_c: dict[str, float]
    throttle_alerts: int
    """That stand (Jetson: cooling devices ``*-throttle-alert``)."""
    throttle_count: int
    """Of times so far (x86: ``thermal_throttle``)."""
    fan_rpm: float | None


def _text(path: Path) -> str | None:
    try:
        return path.read_bytes().decode(errors="replace").strip("\0\n ") or None
    except OSError:
        return None


def _value(path: Path) -> float | None:
    try:
        return float(_text(path) or "")
    except ValueError:
        return None


def _processor() -> str:
    for line in (_text(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.machine()


def jetpack() -> str | None:
    """ "JetPack 6 (L4T R36.4.3)", or None where there is no Jetson Linux."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", _text(TEGRA_RELEASE) or "")
    if found is None:
        return None
    return f"{JETPACK.get(found[1], 'JetPack ?')} (L4T R{found[1]}.{found[2]})"


def describe(sys: Path = SYS) -> Machine:
    model = _text(Path("/proc/device-tree/model")) or _text(sys / "class/dmi/id/product_name") or platform.machine()
    board = board_name()
    return Machine(
        board=f"{model} ({board})" if board else model,
        processor=_processor(),
        cores=os.cpu_count() or 1,
        kernel=platform.release(),
        python=platform.python_version(),
        jetpack=jetpack(),
        power_mode=power_mode(),
        governor=_text(sys / "devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        memory_mib=psutil.virtual_memory().total >> 20,
    )


def temperatures(sys: Path = SYS) -> dict[str, float]:
    """Of each zone that reads, in Celsius; a zone that is off line is left out."""
    found = {}
    for zone in sorted((sys / "class/thermal").glob("thermal_zone*")):
        name, millis = _text(zone / "type"), _value(zone / "temp")
        if name and millis is not None and millis > 0:
            found[name.removesuffix("-thermal")] = millis / 1e3
    return found


def state(sys: Path = SYS) -> State:
    cpus = sorted((sys / "devices/system/cpu").glob("cpu[0-9]*"))
    clocks = [_value(cpu / "cpufreq/scaling_max_freq") for cpu in cpus]
    devices = (sys / "class/thermal").glob("cooling_device*")
    alerts = [_value(alert / "cur_state") for alert in devices if "throttle-alert" in (_text(alert / "type") or "")]
    counts = [_value(path) for path in (sys / "devices/system/cpu").glob("cpu*/thermal_throttle/*_throttle_count")]
    gpu = next(iter((sys / "class/devfreq").glob("*gpu*/cur_freq")), None)
    fan = next(iter(sorted((sys / "class/hwmon").glob("hwmon*/rpm"))), None) or next(
        iter(sorted((sys / "class/hwmon").glob("hwmon*/fan1_input"))), None
    )
    gpu_hz = _value(gpu) if gpu else None
    return State(
        power_mode=power_mode(),
        governor=_text(sys / "devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        max_mhz=[khz / 1e3 for khz in clocks if khz is not None],
        gpu_mhz=None if gpu_hz is None else gpu_hz / 1e6,
        temperature_c=temperatures(sys),
        throttle_alerts=sum(bool(alert) for alert in alerts),
        throttle_count=int(sum(count or 0 for count in counts)),
        fan_rpm=_value(fan) if fan else None,
    )


def changes(first: State, last: State) -> list[str]:
    """What differs in a way that makes a measurement between the two invalid; in words."""
    found = []
    if first.power_mode != last.power_mode:
        found.append(f"the power mode changed from {first.power_mode} to {last.power_mode}")
    if first.governor != last.governor:
        found.append(f"the governor changed from {first.governor} to {last.governor}")
    if first.max_mhz != last.max_mhz:
        found.append(f"the allowed clocks changed from {first.max_mhz} to {last.max_mhz} MHz")
    if first.throttle_alerts or last.throttle_alerts or last.throttle_count > first.throttle_count:
        found.append("the machine throttled")
    return found


def resident_mib() -> float:
    return float(psutil.Process().memory_info().rss / 2**20)


def level(temperatures_c: list[float], within_c: float) -> bool:
    """Whether the last readings stay within ``within_c`` of each other."""
    return len(temperatures_c) < 2 or float(np.ptp(temperatures_c)) <= within_c
