"""The fault campaign of benchmarks/faults in small: the same service, the same faults, fewer of them."""

import shutil
import signal

import pytest
from support import benchmarks

pytest.importorskip("paho.mqtt.client", reason="paho-mqtt is not installed")
campaign = benchmarks.load("faults/run.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")), reason="mosquitto is missing"
    ),
]


def nothing_is_lost(row):
    assert row["accepted"] == row["sent"]
    assert (row["missing"], row["wrong"]) == (0, 0), row
    return row


def test_kills_at_any_moment_lose_no_decision(tmp_path):
    row = nothing_is_lost(campaign.sigkill(tmp_path, 4))
    assert row["gaps"] == "0"


def test_a_broker_that_goes_and_comes_back_loses_none(tmp_path):
    nothing_is_lost(campaign.broker_fault(tmp_path, 2, signal.SIGTERM))


def test_garbage_between_checked_samples_costs_none(tmp_path):
    row = nothing_is_lost(campaign.sensor_fault(tmp_path, 1, "garbage"))
    assert row["malformed"] > 0


def test_a_silent_sensor_is_told_of(tmp_path):
    row = nothing_is_lost(campaign.sensor_fault(tmp_path, 1, "silent"))
    assert (row["events"]["stale"], row["events"]["flowing"]) == (1, 1)


def test_reloads_under_load_lose_none(tmp_path):
    row = nothing_is_lost(campaign.reloads(tmp_path, 5))
    assert row["reloaded"] == 5
    assert row["repeated"] == 0


def test_a_damaged_snapshot_is_refused_and_the_run_goes_on(tmp_path):
    row = campaign.corrupt_snapshot(tmp_path, 2)
    assert (row["refused"], row["missing"]) == (2, 0)
