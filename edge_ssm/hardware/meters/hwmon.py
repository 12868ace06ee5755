"""The power meter of Jetson boards: INA3221 converters, read through the kernel's hwmon files."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from edge_ssm.errors import MeterLost, MeterUnavailable
from edge_ssm.hardware.meters.base import FASTEST_S, INPUT_RAILS, Meter, Rail, Reading, total_rails
from edge_ssm.hardware.sysfs import SYS, find_number, find_text, read_number

INA3221_STEP_V = 40e-6
"""Shunt voltage of one count of the converter (Texas Instruments INA3221 data sheet, SBOS576B, section 7.3)."""
DEFAULT_SHUNT_OHM = 0.005
"""Shunt resistance on NVIDIA's Orin modules, used where the driver does not report it."""


class HwmonMeter(Meter):
    """Board power as the product of the rails' voltages and currents (Linux documentation, hwmon/ina3221)."""

    name = "hwmon"

    def __init__(self, sys: Path = SYS) -> None:
        channels: list[tuple[Rail, Path, Path]] = []
        problem, self.period_s = "", FASTEST_S
        for folder in sorted((sys / "class/hwmon").glob("hwmon*")):
            if not (find_text(folder / "name") or "").startswith("ina3221"):
                continue
            self.period_s = max(self.period_s, (find_number(folder / "update_interval") or 0.0) / 1e3)
            for name, number in _connected(folder):
                voltage, current = folder / f"in{number}_input", folder / f"curr{number}_input"
                shunt_ohm = (find_number(folder / f"shunt{number}_resistor") or 0.0) * 1e-6 or DEFAULT_SHUNT_OHM
                try:
                    volts = read_number(voltage) * 1e-3
                    read_number(current)
                except (OSError, ValueError) as error:
                    problem = f"{current}: {error}"
                    continue
                channels.append((Rail(name, INA3221_STEP_V / shunt_ohm * volts), voltage, current))
        if not channels:
            raise MeterUnavailable(f"hwmon: {problem or f'no INA3221 under {sys}/class/hwmon'}")
        self.rails = tuple(rail for rail, _, _ in channels)
        self.total = total_rails([rail.name for rail in self.rails])
        self.covers = "the board" if self.total[0] in INPUT_RAILS else "the rails that are measured"
        self._files = [(voltage, current) for _, voltage, current in channels]

    def read(self) -> Reading | None:
        """Return the current power of every rail."""
        try:
            before = time.monotonic()
            watts = tuple(read_number(v) * read_number(c) * 1e-6 for v, c in self._files)  # mV times mA
            return Reading((before + time.monotonic()) / 2, watts)
        except (OSError, ValueError) as error:
            raise MeterLost(f"hwmon: {error}") from None


def _connected(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield the rail's name and the number of each enabled channel; "NC" marks one that is not connected."""
    for number in (1, 2, 3):
        if (folder / f"in{number}_input").exists() and find_number(folder / f"in{number}_enable") != 0:
            name = find_text(folder / f"in{number}_label") or f"{folder.name}-{number}"
            if name != "NC":
                yield name, number
