"""The interface of a power meter, and what several meters share.

``edge_ssm.hardware.meters.registry.open_meter`` opens a meter by name. The profiler reads it in a separate process
(``edge_ssm.profiler.sampler``), so that neither the meter's own work nor a service that hangs disturbs a measurement.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

FASTEST_S = 0.02
"""Shortest time between readings, in seconds. Board sensors average over milliseconds, so reading more often costs
processor time without adding information."""
INPUT_RAILS = ("VDD_IN", "POM_5V_IN", "VIN", "VDD_RTC_IN")
"""Names of the rails that feed all the others on a Jetson."""


class Rail(msgspec.Struct, frozen=True):
    """A supply rail that a meter measures."""

    name: str
    resolution_w: float
    """Smallest difference between two readings, in watts, at the voltage of the first reading."""


@dataclass(frozen=True)
class Reading:
    """The power of every rail at one moment."""

    time_s: float
    """Time at which the values were taken, in seconds of CLOCK_MONOTONIC."""
    watts: tuple[float, ...]
    """Power of each rail, in the order of ``Meter.rails``."""


class Meter(ABC):
    """A power meter.

    The constructor raises MeterUnavailable if the sensor does not exist or cannot be read.
    """

    name: str
    rails: tuple[Rail, ...]
    total: tuple[str, ...]
    """Names of the rails whose sum is the power of the whole board (RAPL: of the processor)."""
    covers: str
    """What the sum of the ``total`` rails covers, for display."""
    period_s: float
    """Time after which a new value is available, in seconds."""

    @property
    def poll_s(self) -> float:
        """Interval at which to call ``read``, in seconds."""
        return self.period_s

    @abstractmethod
    def read(self) -> Reading | None:
        """Return the current reading, or None if there is no new one yet. Raises MeterLost."""

    def total_w(self, reading: Reading) -> float:
        """Return the power in watts of the whole board (RAPL: of the processor) in one of the meter's readings."""
        return sum(w for rail, w in zip(self.rails, reading.watts, strict=True) if rail.name in self.total)

    def close(self) -> None:  # noqa: B027  most meters hold nothing that must be released
        """Release the meter's resources."""


def total_rails(names: Sequence[str]) -> tuple[str, ...]:
    """Return the rails that add up to the whole board: the input rail if it is measured, else all rails."""
    return tuple([name for name in names if name in INPUT_RAILS][:1] or names)
