"""The stream's promises: exact windows, stated gaps, and an account in which every sample stands."""

import io
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import convolution
from support.networks import random_network, samples_for
from support.streams import Stream, logits

from edge_ssm.engines.registry import create
from edge_ssm.errors import RunFailed, UsageError
from edge_ssm.histogram import LatencyHistogram
from edge_ssm.io.messages import Malformed
from edge_ssm.io.sinks.formats import CsvFormatter
from edge_ssm.runtime.decisions import decide
from edge_ssm.runtime.windows import ClosedWindow, Windows


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("hop", [None, 1, 7, 20])
def test_every_window_is_exactly_its_offline_result(pooling, hop):
    network = random_network(pooling=pooling, window=20)
    samples = samples_for(network, 0, 65)
    decisions = Stream(network, hop).feed(samples).decisions
    starts = list(range(0, 65 - 20 + 1, hop or 20))
    assert [(d["index"], d["start"], d["end"]) for d in decisions] == [(i, s, s + 20) for i, s in enumerate(starts)]
    for d in decisions:
        assert np.allclose(logits(d), convolution.pooled(network, samples[d["start"] : d["end"]]), atol=1e-9)
        assert d["label"] == f"class {logits(d).argmax()}"
        weights = np.exp(logits(d) - logits(d).max())
        assert d["score"] == pytest.approx(weights.max() / weights.sum())
        assert d["time"] == d["end"] - 1


@pytest.mark.parametrize("hop", [None, 6])
def test_carry_keeps_the_state_and_pools_within_each_window(hop):
    network = random_network(window=20)
    samples = samples_for(network, 0, 65)
    whole = convolution.outputs(network, samples)
    decisions = Stream(network, hop, carry=True).feed(samples).decisions
    assert [d["start"] for d in decisions] == list(range(0, 46, hop or 20))
    for d in decisions:
        assert np.allclose(logits(d), whole[d["start"] : d["end"]].mean(axis=0), atol=1e-9)


@pytest.mark.parametrize("hop", [None, 1, 5])
def test_without_pooling_every_sample_has_an_output(hop):
    network = random_network(pooling="none")
    samples = samples_for(network, 0, 23)
    whole = convolution.outputs(network, samples)
    decisions = Stream(network, hop).feed(samples).decisions
    assert [d["end"] for d in decisions] == list(range(hop or 1, 24, hop or 1))
    for d in decisions:
        assert np.allclose(logits(d), whole[d["end"] - 1], atol=1e-9)


def test_the_cpu_engine_streams_the_same_overlapping_windows():
    network = random_network(window=20)
    samples = samples_for(network, 0, 65)
    expected = Stream(network, 3).feed(samples).decisions
    found = Stream(network, 3, engine="cpu").feed(samples).decisions
    assert [d["label"] for d in found] == [d["label"] for d in expected]
    assert all(np.allclose(logits(a), logits(b), atol=1e-4) for a, b in zip(found, expected, strict=True))


def test_more_overlap_than_there_are_lanes_for_is_refused():
    with pytest.raises(UsageError, match="make 100000 windows overlap"):
        Windows(random_network(window=100_000), 1)


@pytest.mark.parametrize("hop", [0, -3, 21])
def test_a_hop_outside_the_window_is_refused(hop):
    with pytest.raises(UsageError, match="hop"):
        Windows(random_network(window=20), hop)


def gapped(network, missing, length=40):
    samples = samples_for(network, 0, length)
    holed = samples.copy()
    holed[missing] = np.nan
    return samples, holed


def test_hold_repeats_the_last_sample():
    network = random_network(window=20)
    samples, holed = gapped(network, [5, 6, 7, 30])
    filled = samples.copy()
    filled[5:8], filled[30] = samples[4], samples[29]
    stream = Stream(network, gap_policy="hold").feed(holed)
    assert stream.decisions[0]["gaps"] == 3
    assert stream.counters.gaps == {"missing": 4}
    for d in stream.decisions:
        assert np.allclose(logits(d), convolution.pooled(network, filled[d["start"] : d["end"]]), atol=1e-9)


def test_hold_fills_only_the_channel_that_is_missing():
    network = random_network(window=20)
    samples = samples_for(network, 0, 20)
    holed, filled = samples.copy(), samples.copy()
    holed[8, 1] = np.inf
    filled[8, 1] = samples[7, 1]
    stream = Stream(network, gap_policy="hold").feed(holed)
    assert np.allclose(logits(stream.decisions[0]), convolution.pooled(network, filled), atol=1e-9)
    assert stream.counters.gaps == {"out_of_range": 1}


def test_skip_decays_the_state_and_does_not_pool():
    network = random_network(window=20)
    samples, holed = gapped(network, [5, 6, 7], 20)
    engine = create("reference", network)
    outputs = list(engine.chunk(samples[:5]))
    engine.skip(3)
    outputs += list(engine.chunk(samples[8:]))
    stream = Stream(network, gap_policy="skip").feed(holed)
    assert np.allclose(logits(stream.decisions[0]), np.mean(outputs, axis=0), atol=1e-9)


def test_reset_gives_the_window_up_and_starts_with_the_next_good_sample():
    network = random_network(window=20)
    samples, holed = gapped(network, [5, 6], 40)
    stream = Stream(network, gap_policy="reset").feed(holed)
    (event,) = stream.events
    assert (event["event"], event["sample"], event["discarded"]) == ("reset", 5, 5)
    (decision,) = stream.decisions
    assert (decision["start"], decision["end"]) == (7, 27)
    assert np.allclose(logits(decision), convolution.pooled(network, samples[7:27]), atol=1e-9)
    assert stream.counters.discarded == 7


@pytest.mark.parametrize("policy", ["hold", "skip"])
def test_a_gap_longer_than_allowed_resets_once(policy):
    network = random_network(window=20)
    samples, holed = gapped(network, list(range(3, 12)), 40)
    stream = Stream(network, gap_policy=policy, max_gap=4).feed(holed)
    (event,) = stream.events
    assert (event["event"], event["sample"], event["gap_samples"], event["discarded"]) == ("reset", 7, 5, 7)
    (decision,) = stream.decisions
    assert decision["start"] == 12
    assert "gaps" not in decision
    assert np.allclose(logits(decision), convolution.pooled(network, samples[12:32]), atol=1e-9)
    assert stream.counters.discarded == 12


def test_without_pooling_a_short_gap_is_bridged():
    network = random_network(pooling="none")
    samples, holed = gapped(network, [3, 4, 5], 12)
    filled = samples.copy()
    filled[3:6] = samples[2]
    stream = Stream(network).feed(holed)
    assert stream.events == []
    expected = convolution.outputs(network, filled)
    assert all(np.allclose(logits(d), expected[d["end"] - 1], atol=1e-9) for d in stream.decisions)


def test_before_the_first_good_sample_there_is_nothing_to_hold():
    network = random_network(window=20)
    samples, holed = gapped(network, [0, 1], 20)
    stream = Stream(network, gap_policy="hold").feed(holed)
    expected = create("reference", network).chunk(samples[2:]).mean(axis=0)
    assert np.allclose(logits(stream.decisions[0]), expected, atol=1e-9)
    assert stream.decisions[0]["gaps"] == 2


def test_a_window_of_nothing_has_no_decision_and_says_so():
    network = random_network(window=4)
    stream = Stream(network, gap_policy="skip", max_gap=100).feed(np.full((8, 2), np.nan))
    assert stream.decisions == []
    assert [(e["event"], e["start"], e["sample"]) for e in stream.events] == [
        ("no_decision", 0, 4),
        ("no_decision", 4, 8),
    ]
    assert stream.counters.undecided == 2


def test_outputs_that_are_not_finite_reset_the_stream():
    network = random_network(window=4, norm=None)
    network.decoder.weight[:] = 3e38
    stream = Stream(network, engine="cpu").feed(samples_for(network, 0, 8))
    assert stream.decisions == []
    assert {e["reason"] for e in stream.events} == {"outputs are not finite"}
    assert stream.counters.undecided == 2


@given(data=st.data())
@pytest.mark.parametrize("policy", ["hold", "skip", "reset"])
def test_every_accepted_sample_is_accounted_for(policy, data):
    network = random_network(window=6, h=2, layers=1)
    bad = data.draw(st.lists(st.booleans(), min_size=1, max_size=60))
    samples = samples_for(network, 0, len(bad))
    samples[np.array(bad)] = np.nan
    stream = Stream(network, gap_policy=policy, max_gap=data.draw(st.integers(0, 8))).feed(samples)
    counters, windows = stream.counters, stream.pipeline.windows
    assert counters.samples == len(bad) == windows.sample
    assert sum(counters.gaps.values()) == sum(bad)
    decided = 6 * (counters.decisions + counters.undecided)
    assert decided + counters.discarded + windows.unfinished == len(bad)
    assert counters.resets == len([e for e in stream.events if e["event"] == "reset"])
    ends = [d["end"] for d in stream.decisions]
    assert ends == sorted(set(ends))


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@given(
    seed=st.integers(0, 1000),
    chunk=st.integers(2, 30),
    policy=st.sampled_from(["hold", "skip", "reset"]),
    pooling=st.sampled_from(["mean", "last", "none"]),
    hop=st.sampled_from([None, 1, 3, 7]),
    carry=st.booleans(),
    bad=st.lists(st.integers(0, 59), max_size=12),
)
def test_chunks_change_nothing_but_the_time(engine, seed, chunk, policy, pooling, hop, carry, bad):
    network = random_network(seed, window=8, pooling=pooling)
    samples = samples_for(network, seed, 60)
    samples[bad, 0] = np.nan
    labels = ["x"] * 30 + ["y"] * 30
    options = {"gap_policy": policy, "max_gap": 3, "engine": engine}
    one, many = (Stream(network, hop, carry, chunk=size, **options).feed(samples, labels) for size in (1, chunk))
    many.pipeline.flush()
    assert many.lines == one.lines
    del one.counters.latency, many.counters.latency
    assert vars(many.counters) == vars(one.counters)


def test_truth_is_the_commonest_label_and_never_an_input():
    network = random_network(window=4)
    samples = samples_for(network, 0, 8)
    stream = Stream(network).feed(samples, labels=["a", "b", "b", None, "class 0", "class 1", "class 2", "class 2"])
    assert [d["truth"] for d in stream.decisions] == ["b", "class 2"]
    assert [logits(d).tolist() for d in stream.decisions] == [
        logits(d).tolist() for d in Stream(network).feed(samples).decisions
    ]
    assert stream.counters.labelled == 2
    assert stream.counters.correct == sum(d["label"] == d["truth"] for d in stream.decisions)


def test_regression_yields_values():
    network = random_network(window=5, task="regression")
    samples = samples_for(network, 0, 5)
    (line,) = Stream(network).feed(samples).lines
    assert "label" not in line
    assert "score" not in line
    assert np.allclose(line["value"], convolution.pooled(network, samples), atol=1e-9)


def test_malformed_rows_are_logged_counted_and_fatal_only_when_strict(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "edge_ssm")
    monkeypatch.setattr(logging.getLogger("edge_ssm"), "propagate", True)  # caplog listens at the root
    stream = Stream(random_network(), source="tty")
    stream.pipeline.process(Malformed("line 3", "1 fields, expected 2"))
    assert stream.counters.malformed == 1
    assert caplog.messages == ["tty, line 3: 1 fields, expected 2; left out"]
    strict = Stream(random_network(), strict=True)
    with pytest.raises(RunFailed, match="line 3: 1 fields"):
        strict.pipeline.process(Malformed("line 3", "1 fields, expected 2"))


@given(
    durations=st.lists(st.integers(0, 1 << 44), min_size=1, max_size=300), percent=st.sampled_from([0, 50, 90, 99, 100])
)
def test_percentiles_are_off_by_a_sixty_fourth_at_most(durations, percent):
    histogram = LatencyHistogram()
    for ns in durations:
        histogram.record(ns)
    exact = np.percentile(durations, percent, method="inverted_cdf")
    found = histogram.percentile_ns(percent)
    assert histogram.max_ns == max(durations)
    if exact < 1 << 41:
        assert exact <= found <= exact * (1 + 1 / 64) + 1


def test_a_table_has_another_header_where_another_network_has_other_columns():
    first, second = random_network(window=10), random_network(1, window=10, d_output=2)
    file = io.StringIO()
    formatter = CsvFormatter(file, first, logits=True, truth=False)
    for network in (first, first, second, second):
        formatter.adopt(network)
        outputs = np.zeros(network.d_output)
        formatter.decision(decide(network, 0, ClosedWindow(0, 10, outputs, 0, None), outputs, None))
    widths = [len(line.split(",")) for line in file.getvalue().splitlines()]
    assert widths == [6 + first.d_output + 1] * 3 + [6 + second.d_output + 1] * 3
    assert [line.startswith("index") for line in file.getvalue().splitlines()] == [True, False, False] * 2
