"""The power meter of a battery that discharges."""

from __future__ import annotations

import time
from pathlib import Path

from edge_ssm.errors import MeterLost, MeterUnavailable
from edge_ssm.hardware.meters.base import Meter, Rail, Reading
from edge_ssm.hardware.sysfs import SYS, read_number, read_text


class BatteryMeter(Meter):
    """Power that a laptop draws from its battery (Linux documentation, ABI/testing/sysfs-class-power)."""

    name = "battery"
    covers = "the whole machine, from its battery"
    period_s = 1.0

    def __init__(self, sys: Path = SYS) -> None:
        self._files: list[tuple[Path, ...]] = []
        rails, problem = [], f"no battery under {sys}/class/power_supply"
        for supply in sorted((sys / "class/power_supply").glob("*")):
            try:
                if read_text(supply / "type") != "Battery":
                    continue
                if read_text(supply / "status") != "Discharging":
                    problem = f"{supply.name} is not discharging; unplug the mains to measure"
                    continue
            except OSError:
                continue
            power, voltage_and_current = (supply / "power_now",), (supply / "voltage_now", supply / "current_now")
            for files in (power, voltage_and_current):
                if all(path.exists() for path in files):
                    self._files.append(files)
                    rails.append(Rail(supply.name, 1e-3))
                    break
        if not rails:
            raise MeterUnavailable(f"battery: {problem}")
        self.rails, self.total = tuple(rails), tuple(rail.name for rail in rails)

    def read(self) -> Reading | None:
        """Return the current power of every battery that was discharging when the meter was opened."""
        try:
            watts = []
            for files in self._files:
                values = [read_number(path) * 1e-6 for path in files]  # microwatts, or microvolts and microamperes
                watts.append(abs(values[0] if len(values) == 1 else values[0] * values[1]))
            return Reading(time.monotonic(), tuple(watts))
        except (OSError, ValueError) as error:
            raise MeterLost(f"battery: {error}") from None
