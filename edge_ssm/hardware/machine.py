"""The machine that a measurement runs on, and the parts of its state that can change during the measurement."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import msgspec
import numpy as np
import psutil

from edge_ssm.hardware.boards import board_name, power_mode
from edge_ssm.hardware.sysfs import SYS, find_number, find_text

TEGRA_RELEASE = Path("/etc/nv_tegra_release")
JETPACK = {"35": "JetPack 5", "36": "JetPack 6", "38": "JetPack 7", "39": "JetPack 7"}
"""JetPack by the major release of Jetson Linux (L4T)."""


class Machine(msgspec.Struct, frozen=True):
    """The properties of a machine that stay the same during a measurement."""

    board: str
    processor: str
    cores: int
    kernel: str
    python: str
    jetpack: str | None
    power_mode: str | None
    """Power mode, by nvpmodel's name."""
    governor: str | None
    memory_mib: int


class State(msgspec.Struct, frozen=True):
    """The state of a machine at one moment."""

    power_mode: str | None
    governor: str | None
    max_mhz: list[float]
    """Highest clock that is allowed now, for each online core."""
    gpu_mhz: float | None
    temperature_c: dict[str, float]
    """Temperature of each thermal zone, in degrees Celsius."""
    throttle_alerts: int
    """Number of active alerts (Jetson: cooling devices ``*-throttle-alert``)."""
    throttle_count: int
    """Number of throttling events since the boot (x86: ``thermal_throttle``)."""
    fan_rpm: float | None


def _processor() -> str:
    for line in (find_text(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.machine()


def jetpack() -> str | None:
    """Return a text such as "JetPack 6 (L4T R36.4.3)", or None on a machine without Jetson Linux."""
    release = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", find_text(TEGRA_RELEASE) or "")
    if release is None:
        return None
    return f"{JETPACK.get(release[1], 'JetPack ?')} (L4T R{release[1]}.{release[2]})"


def describe(sys: Path = SYS) -> Machine:
    """Describe this machine."""
    model = (
        find_text(Path("/proc/device-tree/model")) or find_text(sys / "class/dmi/id/product_name") or platform.machine()
    )
    board = board_name()
    return Machine(
        board=f"{model} ({board})" if board else model,
        processor=_processor(),
        cores=os.cpu_count() or 1,
        kernel=platform.release(),
        python=platform.python_version(),
        jetpack=jetpack(),
        power_mode=power_mode(),
        governor=_governor(sys),
        memory_mib=psutil.virtual_memory().total >> 20,
    )


def _governor(sys: Path) -> str | None:
    return find_text(sys / "devices/system/cpu/cpu0/cpufreq/scaling_governor")


def temperatures(sys: Path = SYS) -> dict[str, float]:
    """Return the temperature of each thermal zone in degrees Celsius. A zone that is off line is left out."""
    celsius = {}
    for zone in sorted((sys / "class/thermal").glob("thermal_zone*")):
        name, millicelsius = find_text(zone / "type"), find_number(zone / "temp")
        if name and millicelsius is not None and millicelsius > 0:
            celsius[name.removesuffix("-thermal")] = millicelsius / 1e3
    return celsius


def state(sys: Path = SYS) -> State:
    """Return the machine's current state."""
    cpus = sorted((sys / "devices/system/cpu").glob("cpu[0-9]*"))
    clocks_khz = [find_number(cpu / "cpufreq/scaling_max_freq") for cpu in cpus]
    devices = (sys / "class/thermal").glob("cooling_device*")
    alerts = [find_number(d / "cur_state") for d in devices if "throttle-alert" in (find_text(d / "type") or "")]
    counts = [find_number(path) for path in (sys / "devices/system/cpu").glob("cpu*/thermal_throttle/*_throttle_count")]
    gpu = next((sys / "class/devfreq").glob("*gpu*/cur_freq"), None)
    gpu_hz = find_number(gpu) if gpu else None
    hwmon = sys / "class/hwmon"
    fan = next(iter(sorted(hwmon.glob("hwmon*/rpm")) + sorted(hwmon.glob("hwmon*/fan1_input"))), None)
    return State(
        power_mode=power_mode(),
        governor=_governor(sys),
        max_mhz=[khz / 1e3 for khz in clocks_khz if khz is not None],
        gpu_mhz=None if gpu_hz is None else gpu_hz / 1e6,
        temperature_c=temperatures(sys),
        throttle_alerts=sum(bool(alert) for alert in alerts),
        throttle_count=int(sum(count or 0 for count in counts)),
        fan_rpm=find_number(fan) if fan else None,
    )


def changes(first: State, last: State) -> list[str]:
    """Describe the differences that make a measurement between two states invalid, one text for each."""
    texts = []
    if first.power_mode != last.power_mode:
        texts.append(f"the power mode changed from {first.power_mode} to {last.power_mode}")
    if first.governor != last.governor:
        texts.append(f"the governor changed from {first.governor} to {last.governor}")
    if first.max_mhz != last.max_mhz:
        texts.append(f"the allowed clocks changed from {first.max_mhz} to {last.max_mhz} MHz")
    if first.throttle_alerts or last.throttle_alerts or last.throttle_count > first.throttle_count:
        texts.append("the machine throttled")
    return texts


def resident_mib() -> float:
    """Return the resident memory of this process in MiB."""
    return float(psutil.Process().memory_info().rss / 2**20)


def is_level(temperatures_c: list[float], within_c: float) -> bool:
    """Return whether all temperatures lie within ``within_c`` degrees of each other."""
    return len(temperatures_c) < 2 or float(np.ptp(temperatures_c)) <= within_c
