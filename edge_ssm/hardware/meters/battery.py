"""The power meter of a battery that discharges."""

from __future__ import annotations

import time
from pathlib import Path

from edge_ssm.errors import MeterLost, MeterUnavailable
from edge_ssm.hardware.meters.base import SYS, Meter, Rail, Reading, _read


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
