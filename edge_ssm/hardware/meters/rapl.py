"""The processor power meter read from Intel and AMD RAPL counters."""

from __future__ import annotations

import time
from pathlib import Path

from edge_ssm.errors import MeterLost, MeterUnavailable
from edge_ssm.hardware.meters.base import SYS, Meter, Rail, Reading, _number, _read


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
