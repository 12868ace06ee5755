"""The registry of power meters."""

from __future__ import annotations

from collections.abc import Callable

from edge_ssm.hardware.meters.base import Meter
from edge_ssm.hardware.meters.battery import BatteryMeter
from edge_ssm.hardware.meters.hwmon import HwmonMeter
from edge_ssm.hardware.meters.rapl import RaplMeter


def _jtop() -> Meter:
    from edge_ssm.hardware.meters.jtop import JtopMeter

    return JtopMeter()


METERS: dict[str, Callable[[], Meter]] = {
    "hwmon": HwmonMeter,
    "jtop": _jtop,
    "rapl": RaplMeter,
    "battery": BatteryMeter,
}
"""By name, in the order in which they are tried."""
