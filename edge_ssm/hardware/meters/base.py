"""Power meters: what a board's sensors say of its rails, in watts.

``open_meter`` finds one that reads; a meter is read from a process of its own (``monitor.sampler``), so that neither
its work nor a service that hangs is in the way of what is measured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import msgspec

SYS = Path("/sys")
FASTEST_S = 0.02
"""Between readings. Sensors of boards average over milliseconds; asking more often costs more than it tells."""
WHOLE_BOARD = ("VDD_IN", "POM_5V_IN", "VIN", "VDD_RTC_IN")
"""Rails that feed all the others."""


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
