"""The power meter of the jetson-stats service.

This is the only module that imports the client of jetson-stats, an optional package under AGPL-3.0, and only the
sampler's process imports this module.

Of a rail's values only ``power`` (milliwatts) is used: ``avg`` is not a mean. The rail that feeds the board is reported
separately, as ``tot``.
"""

from __future__ import annotations

import time
from typing import Any

from edge_ssm.errors import MeterLost, MeterUnavailable
from edge_ssm.hardware.meters.base import INPUT_RAILS, Meter, Rail, Reading

INTERVAL_S = 0.05
STALE_S = 5.0
"""Time in seconds without a new sample after which the service is considered dead."""
STEP_A = 8e-3
"""Resolution of a current: 40 microvolts over 5 milliohm."""


class JtopMeter(Meter):
    """Board power as the jetson-stats service reports it."""

    name = "jtop"

    def __init__(self) -> None:
        try:
            from jtop import JtopException, jtop
        except ImportError:
            raise MeterUnavailable("jtop: jetson-stats is not installed; pip install 'edge-ssm[jetson]'") from None
        self._error: Any = JtopException
        self._client: Any = jtop(interval=INTERVAL_S)
        try:
            self._client.start()
            power = self._client.power
        except Exception as error:  # JtopException, and whatever a socket raises
            raise MeterUnavailable(f"jtop: {_one_line(error)}") from None
        self._last_uptime: float | None = None
        self._last_new = time.monotonic()
        total = power.get("tot") or {}
        self._rails = list(power.get("rail") or {})
        # The service's total is either an input rail, which is measured separately, or the sum of the other rails.
        self._input_rail = str(total.get("name", "")) if total.get("name") in INPUT_RAILS else ""
        names = ([self._input_rail] if self._input_rail else []) + self._rails
        if not names:
            self._client.close()
            raise MeterUnavailable("jtop: its service sees no power sensor here")
        self.rails = tuple(Rail(name, self._resolution(power, name)) for name in names)
        self.total = (self._input_rail,) if self._input_rail else tuple(self._rails)
        self.covers = "the board" if self._input_rail else "the rails that are measured"
        # The first client of the service sets the interval for all.
        self.period_s = float(self._client.interval)

    def _resolution(self, power: Any, name: str) -> float:
        rail = power["tot"] if name == self._input_rail else power["rail"][name]
        return STEP_A * float(rail.get("volt", 5000)) * 1e-3

    @property
    def poll_s(self) -> float:
        """Half the service's interval, whose phase is unknown."""
        return self.period_s / 2

    def read(self) -> Reading | None:
        """Return the service's latest sample, or None if it was read before."""
        try:
            if not self._client.ok(spin=True):
                raise MeterLost("jtop: its service has stopped")
            power, uptime = self._client.power, self._client.uptime
        except self._error as error:
            raise MeterLost(f"jtop: {_one_line(error)}") from None
        now = time.monotonic()
        uptime_s = uptime.total_seconds() if hasattr(uptime, "total_seconds") else float(uptime)
        if uptime_s == self._last_uptime:
            if now - self._last_new > STALE_S:
                raise MeterLost(f"jtop: no new sample for {STALE_S:g} s")
            return None
        self._last_uptime, self._last_new = uptime_s, now
        try:
            watts = [power["tot"]["power"]] if self._input_rail else []
            watts += [power["rail"][name]["power"] for name in self._rails]
        except (KeyError, TypeError) as error:
            raise MeterLost(f"jtop: rail {error} is gone") from None
        # The uptime includes the time asleep, CLOCK_MONOTONIC does not.
        asleep_s = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
        return Reading(uptime_s - asleep_s, tuple(milliwatts * 1e-3 for milliwatts in watts))

    def close(self) -> None:
        """Close the connection to the service."""
        self._client.close()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
