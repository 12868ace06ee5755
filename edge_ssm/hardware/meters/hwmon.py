"""The board power meter read from Linux hwmon files (INA3221)."""

from __future__ import annotations

import time
from pathlib import Path

from edge_ssm.errors import MeterLost, MeterUnavailable
from edge_ssm.hardware.meters.base import FASTEST_S, SYS, WHOLE_BOARD, Meter, Rail, Reading, _number, _read, _total

INA3221_STEP_V = 40e-6
"""Of the shunt's voltage, a count of the converter (Texas Instruments INA3221 data sheet, SBOS576B, 7.3)."""
DEFAULT_SHUNT_OHM = 0.005
"""Of NVIDIA's Orin modules, where the driver does not tell."""


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
