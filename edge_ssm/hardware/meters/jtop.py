"""The power that jetson-stats' service reports. The one place that imports its client, and only in the sampler's
process (jetson-stats is AGPL-3.0 and an optional extra).

Of what a sample holds only ``power`` is used, in milliwatts: ``avg`` is no mean. The rail that feeds the board lies
apart, in ``tot``.
"""

from __future__ import annotations

import time
from typing import Any

from edge_ssm.errors import MeterLost, MeterUnavailable
from edge_ssm.hardware.meters.base import WHOLE_BOARD, Meter, Rail, Reading

INTERVAL_S = 0.05
STALE_S = 5.0
"""Without a new sample for so long the service is taken for dead."""


class JtopMeter(Meter):
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
        except Exception as error:  # JtopException, and what a socket raises
            raise MeterUnavailable(f"jtop: {_line(error)}") from None
        self._last_uptime: float | None = None
        self._last_new = time.monotonic()
        try:
            power = self._client.power
        except Exception as error:
            raise MeterUnavailable(f"jtop: {_line(error)}") from None
        whole = power.get("tot") or {}
        self._rails = list(power.get("rail") or {})
        # A sum that the service made is made of the rails; a rail of its own is one more.
        self._own_total = str(whole.get("name", "")) if whole.get("name") in WHOLE_BOARD else ""
        names = ([self._own_total] if self._own_total else []) + self._rails
        if not names:
            self._client.close()
            raise MeterUnavailable("jtop: its service sees no power sensor here")
        self.rails = tuple(Rail(name, self._resolution(power, name)) for name in names)
        self.total = (self._own_total,) if self._own_total else tuple(self._rails)
        self.covers = "the board" if self._own_total else "the rails that are measured"
        # Whoever came first set it.
        self.period_s = float(self._client.interval)

    def _resolution(self, power: Any, name: str) -> float:
        rail = power["tot"] if name == self._own_total else power["rail"][name]
        return 8e-3 * float(rail.get("volt", 5000)) * 1e-3  # 8 mA: 40 uV over 5 milliohm

    @property
    def poll_s(self) -> float:
        return self.period_s / 2  # its clock is not ours

    def read(self) -> Reading | None:
        try:
            if not self._client.ok(spin=True):
                raise MeterLost("jtop: its service has stopped")
            power, uptime = self._client.power, self._client.uptime
        except self._error as error:
            raise MeterLost(f"jtop: {_line(error)}") from None
        now = time.monotonic()
        taken = uptime.total_seconds() if hasattr(uptime, "total_seconds") else float(uptime)
        if taken == self._last_uptime:
            if now - self._last_new > STALE_S:
                raise MeterLost(f"jtop: no new sample for {STALE_S:g} s")
            return None
        self._last_uptime, self._last_new = taken, now
        try:
            watts = [power["tot"]["power"]] if self._own_total else []
            watts += [power["rail"][name]["power"] for name in self._rails]
        except (KeyError, TypeError) as error:
            raise MeterLost(f"jtop: rail {error} is gone") from None
        # Uptime counts from the boot, sleep included.
        asleep = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
        return Reading(taken - asleep, tuple(milliwatts * 1e-3 for milliwatts in watts))

    def close(self) -> None:
        self._client.close()


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
