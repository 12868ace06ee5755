"""The registry of power meters. A meter's module is imported only when the meter is opened."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from edge_ssm.errors import MeterUnavailable
from edge_ssm.hardware.meters.base import Meter


@dataclass(frozen=True)
class MeterEntry:
    """Where to find a meter's class."""

    module: str
    cls: str
    may_hang: bool = False
    """Whether the meter asks a service that may never answer; open such a meter only in the sampler's process."""


METERS: dict[str, MeterEntry] = {
    "hwmon": MeterEntry("edge_ssm.hardware.meters.hwmon", "HwmonMeter"),
    "jtop": MeterEntry("edge_ssm.hardware.meters.jtop", "JtopMeter", may_hang=True),
    "rapl": MeterEntry("edge_ssm.hardware.meters.rapl", "RaplMeter"),
    "battery": MeterEntry("edge_ssm.hardware.meters.battery", "BatteryMeter"),
}
"""All meters by name, in the order in which ``--meter auto`` tries them."""


def open_meter(name: str) -> Meter:
    """Open the meter of the registry with this name. Raises MeterUnavailable if it cannot be read."""
    entry = METERS[name]
    meter: Meter = getattr(import_module(entry.module), entry.cls)()
    return meter


def open_file_meter() -> Meter | None:
    """Open the first meter that is read from files and cannot hang; None if there is none."""
    for name, entry in METERS.items():
        if not entry.may_hang:
            try:
                return open_meter(name)
            except MeterUnavailable:
                continue
    return None
