"""Power meters: what a board's sensors say of its rails, in watts.

``open_meter`` finds one that reads; a meter is read from a process of its own (``monitor.sampler``), so that neither
its work nor a service that hangs is in the way of what is measured.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge_ssm.errors import EdgeSSMError

SYS = Path("/sys")
FASTEST_S = 0.02
"""Between readings. Sensors of boards average over milliseconds; asking more often costs more than it tells."""
WHOLE_BOARD = ("VDD_IN", "POM_5V_IN", "VIN", "VDD_RTC_IN")
"""Rails that feed all the others."""
INA3221_STEP_V = 40e-6
"""Of the shunt's voltage, a count of the converter (Texas Instruments INA3221 data sheet, SBOS576B, 7.3)."""
DEFAULT_SHUNT_OHM = 0.005
"""Of NVIDIA's Orin modules, where the driver does not tell."""


class MeterUnavailable(EdgeSSMError):
    """No such sensor here, or it can't be read; the text says why."""


class MeterLost(EdgeSSMError):
    """It read and does not any more."""


class Rail(msgspec.Struct, frozen=True):
    name: str
    resolution_w: float
    """The smallest difference that a reading can show, at the voltage seen first."""


@dataclass(frozen=True)
class Reading:
    time_s: float
    """CLOCK_MONOTONIC, when the values were taken."""
    watts: tuple[float, ...]
    """In the order of the meter's rails."""


class Meter(ABC):
    name: str
    rails: tuple[Rail, ...]
    total: tuple[str, ...]
    """The rails whose sum is what the board (RAPL: the processor) takes."""
    covers: str
    """What ``total`` is, for people."""
    period_s: float
    """Between readings that differ."""

    @property
    def poll_s(self) -> float:
        """How often to look."""
        return self.period_s

    @abstractmethod
    def read(self) -> Reading | None:
        """Now; None if nothing new is there yet. Raises MeterLost."""

    def total_w(self, reading: Reading) -> float:
        """What the board (RAPL: the processor) takes, by one of its readings."""
        return sum(w for rail, w in zip(self.rails, reading.watts, strict=True) if rail.name in self.total)

    def close(self) -> None:  # noqa: B027  most have nothing to close
        """Nothing is held by the meters that are files."""


def _read(path: Path) -> str:
    return path.read_text().strip()


def _number(path: Path, otherwise: float) -> float:
    try:
        return float(_read(path))
    except (OSError, ValueError):
        return otherwise


def _total(names: list[str]) -> tuple[str, ...]:
    whole = [name for name in names if name in WHOLE_BOARD]
    return tuple(whole[:1] or names)


class HwmonMeter(Meter):
    """INA3221 converters through the kernel's hwmon files: millivolts times milliamperes (kernel: hwmon/ina3221)."""

    name = "hwmon"

    def __init__(self, sys: Path = SYS) -> None:
        found: list[tuple[Rail, Path, Path]] = []
        refused, period = "", FASTEST_S
        for folder in sorted((sys / "class/hwmon").glob("hwmon*")):
            try:
                if not _read(folder / "name").startswith("ina3221"):
                    continue
            except OSError:
                continue
            period = max(period, _number(folder / "update_interval", 0) / 1e3)
            for channel in (1, 2, 3):
                voltage, current = folder / f"in{channel}_input", folder / f"curr{channel}_input"
                if not voltage.exists() or _number(folder / f"in{channel}_enable", 1) == 0:
                    continue
                try:
                    name = _read(folder / f"in{channel}_label")
                except OSError:
                    name = f"{folder.name}-{channel}"
                if name == "NC":  # not connected
                    continue
                shunt = _number(folder / f"shunt{channel}_resistor", 0) * 1e-6 or DEFAULT_SHUNT_OHM
                try:
                    volts = float(_read(voltage)) * 1e-3
                    float(_read(current))
                except (OSError, ValueError) as error:
                    refused = f"{current}: {error}"
                    continue
                found.append((Rail(name, INA3221_STEP_V / shunt * volts), voltage, current))
        if not found:
            raise MeterUnavailable(f"hwmon: {refused or f'no INA3221 under {sys}/class/hwmon'}")
        self.rails = tuple(rail for rail, _, _ in found)
        self.total = _total([rail.name for rail in self.rails])
        self.covers = "the board" if self.total[0] in WHOLE_BOARD else "the rails that are measured"
        self.period_s = period
        self._files = [(voltage, current) for _, voltage, current in found]

    def read(self) -> Reading | None:
        try:
            before = time.monotonic()
            watts = tuple(float(_read(v)) * float(_read(c)) * 1e-6 for v, c in self._files)
            return Reading((before + time.monotonic()) / 2, watts)
        except (OSError, ValueError) as error:
            raise MeterLost(f"hwmon: {error}") from None


class RaplMeter(Meter):
    """Intel's and AMD's energy counters (kernel: power/powercap): mean power between two readings."""

    name = "rapl"

    def __init__(self, sys: Path = SYS) -> None:
        self._zones: list[tuple[Path, float]] = []
        rails, why = [], f"no counters under {sys}/class/powercap"
        self.period_s = 0.05
        for zone in sorted((sys / "class/powercap").glob("intel-rapl:*")):
            # Zones within a zone count what that one counts too; memory is by itself.
            try:
                name = _read(zone / "name")
                float(_read(zone / "energy_uj"))
            except PermissionError:
                why = f"{zone / 'energy_uj'} is readable by root only; run as root, or chmod a+r it"
                continue
            except (OSError, ValueError):
                continue
            top = zone.name.count(":") == 1
            if name == "psys" or not (top or name == "dram"):
                continue
            rails.append(Rail(f"{name} {zone.name.removeprefix('intel-rapl:')}", 61e-6 / self.period_s))
            self._zones.append((zone / "energy_uj", _number(zone / "max_energy_range_uj", 2**32)))
        if not rails:
            raise MeterUnavailable(f"rapl: {why}")
        self.rails = tuple(rails)
        self.total = tuple(rail.name for rail in rails)
        self.covers = "the processor package and its memory, not the board"
        self._last = self._counters()

    def _counters(self) -> tuple[float, list[float]]:
        try:
            return time.monotonic(), [float(_read(path)) for path, _ in self._zones]
        except (OSError, ValueError) as error:
            raise MeterLost(f"rapl: {error}") from None

    def read(self) -> Reading | None:
        (before, old), (now, new) = self._last, self._counters()
        if now - before < self.period_s / 2:
            return None
        self._last = now, new
        watts = [
            ((b - a) % span) * 1e-6 / (now - before) for a, b, (_, span) in zip(old, new, self._zones, strict=True)
        ]
        return Reading((before + now) / 2, tuple(watts))


class BatteryMeter(Meter):
    """A battery that gives off power (kernel: power_supply): of the whole machine."""

    name = "battery"
    covers = "the whole machine, from its battery"
    period_s = 1.0

    def __init__(self, sys: Path = SYS) -> None:
        self._files: list[tuple[Path, ...]] = []
        rails, why = [], f"no battery under {sys}/class/power_supply"
        for supply in sorted((sys / "class/power_supply").glob("*")):
            try:
                if _read(supply / "type") != "Battery":
                    continue
                if _read(supply / "status") != "Discharging":
                    why = f"{supply.name} is not discharging; unplug the mains to measure"
                    continue
            except OSError:
                continue
            direct, parts = (supply / "power_now",), (supply / "voltage_now", supply / "current_now")
            for files in (direct, parts):
                if all(path.exists() for path in files):
                    self._files.append(files)
                    rails.append(Rail(supply.name, 1e-3))
                    break
        if not rails:
            raise MeterUnavailable(f"battery: {why}")
        self.rails, self.total = tuple(rails), tuple(rail.name for rail in rails)

    def read(self) -> Reading | None:
        try:
            watts = []
            for files in self._files:
                values = [float(_read(path)) * 1e-6 for path in files]
                watts.append(abs(values[0] if len(values) == 1 else values[0] * values[1]))
            return Reading(time.monotonic(), tuple(watts))
        except (OSError, ValueError) as error:
            raise MeterLost(f"battery: {error}") from None


def _jtop() -> Meter:
    from edge_ssm.monitor.jtop_meter import JtopMeter

    return JtopMeter()


METERS: dict[str, Callable[[], Meter]] = {
    "hwmon": HwmonMeter,
    "jtop": _jtop,
    "rapl": RaplMeter,
    "battery": BatteryMeter,
}
"""By name, in the order in which they are tried."""
