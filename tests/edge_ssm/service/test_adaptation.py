"""Moves within a family of models, by budgets of latency, power and temperature."""

import signal

import numpy as np
from support.service_runs import decisions, start
from support.waiting import until

from edge_ssm.service.adaptation import AdaptationPolicy, Limits, Measurements


def measures(misses=0, power=None, celsius=None):
    return Measurements(100, misses, power, celsius)


def test_the_ladder_goes_down_when_late_and_back_when_well_for_long():
    policy = AdaptationPolicy(3, Limits(0.01, None, None, 10.0), 0.0)
    moves = []
    for t in range(200):
        late = 10 if t < 25 else 0
        if policy.update(measures(late), float(t)):
            moves.append((t, policy.level))
    assert moves == [(10, 1), (20, 2), (54, 1), (84, 0)]


def test_the_ladder_heeds_power_and_temperature_with_hysteresis():
    policy = AdaptationPolicy(2, Limits(0.01, 10.0, 80.0, 1.0), 0.0)
    assert policy.update(measures(power=9.9, celsius=79.0), 5.0) == ""
    assert "10.50 W" in policy.update(measures(power=10.5), 6.0)
    for t in range(7, 40):
        assert policy.update(measures(power=9.5), float(t)) == ""  # under the budget, not under nine tenths of it
    assert any(policy.update(measures(power=8.0), float(t)) for t in range(40, 50))
    assert "85.0 C" in policy.update(measures(celsius=85.0), 60.0)


def test_going_back_too_early_takes_longer_each_time():
    policy = AdaptationPolicy(2, Limits(0.01, None, None, 1.0), 0.0)
    ups = []
    for t in range(400):
        late = 50 if policy.level == 0 else 0
        if policy.update(measures(late), float(t)) and policy.level == 0:
            ups.append(t)
    gaps = np.diff(ups)
    assert (np.diff(gaps) > 0).sum() >= 4
    assert len(ups) < 12


def test_a_family_moves_when_decisions_are_late(small, tmp_path):
    out = tmp_path / "out"
    run = start(
        small / "m.safetensors", "--input", small / "s.csv", "--pace", "--member", small / "s.safetensors",
        "--deadline", "0.0001", "--settle", "1", "--output", out,
    )  # fmt: skip
    until(lambda: out.exists() and any(e["event"] == "adapted" for e in decisions(out)[1]))
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=30)
    assert "moved to the smaller" in said
    found, events = decisions(out)
    assert "decisions late" in events[0]["reason"]
    assert [d["index"] for d in found] == list(range(len(found)))
    assert [d["start"] for d in found] == [10 * i for i in range(len(found))]
