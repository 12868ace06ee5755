"""The power meter of Intel and AMD processors, read from their RAPL energy counters."""

from __future__ import annotations

import time
from pathlib import Path

from edge_ssm.errors import MeterLost, MeterUnavailable
from edge_ssm.hardware.meters.base import Meter, Rail, Reading
from edge_ssm.hardware.sysfs import SYS, find_number, read_number, read_text

UNIT_J = 61e-6
"""Energy of one count, 2^-14 joules: the usual energy status unit (Intel SDM, volume 3B, MSR_RAPL_POWER_UNIT)."""


class RaplMeter(Meter):
    """Mean power between two readings of the energy counters (Linux documentation, power/powercap)."""

    name = "rapl"
    covers = "the processor package and its memory, not the board"
    period_s = 0.05

    def __init__(self, sys: Path = SYS) -> None:
        self._zones: list[tuple[Path, float]] = []
        rails, problem = [], f"no counters under {sys}/class/powercap"
        for zone in sorted((sys / "class/powercap").glob("intel-rapl:*")):
            try:
                name = read_text(zone / "name")
                read_number(zone / "energy_uj")
            except PermissionError:
                problem = f"{zone / 'energy_uj'} is readable by root only; run as root, or chmod a+r it"
                continue
            except (OSError, ValueError):
                continue
            # A zone inside another one is part of the outer zone's energy, except for the memory.
            is_package = zone.name.count(":") == 1
            if name == "psys" or not (is_package or name == "dram"):
                continue
            rails.append(Rail(f"{name} {zone.name.removeprefix('intel-rapl:')}", UNIT_J / self.period_s))
            self._zones.append((zone / "energy_uj", find_number(zone / "max_energy_range_uj") or 2**32))
        if not rails:
            raise MeterUnavailable(f"rapl: {problem}")
        self.rails = tuple(rails)
        self.total = tuple(rail.name for rail in rails)
        self._last = self._counters()

    def _counters(self) -> tuple[float, list[float]]:
        """Return the time in seconds of CLOCK_MONOTONIC and the energy of each zone in microjoules."""
        try:
            return time.monotonic(), [read_number(path) for path, _ in self._zones]
        except (OSError, ValueError) as error:
            raise MeterLost(f"rapl: {error}") from None

    def read(self) -> Reading | None:
        """Return the mean power since the last reading, or None if that is less than half a period ago."""
        (before, old), (now, new) = self._last, self._counters()
        if now - before < self.period_s / 2:
            return None
        self._last = now, new
        watts = [
            ((b - a) % span) * 1e-6 / (now - before) for a, b, (_, span) in zip(old, new, self._zones, strict=True)
        ]
        return Reading((before + now) / 2, tuple(watts))
