"""What the sender's numbers and time stamps say: what is missing is filled and counted, what comes twice is dropped."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import convolution
from support.networks import random_network, samples_for
from support.streams import Stream, logits

from edge_ssm.errors import SnapshotError
from edge_ssm.io.messages import Frame, Malformed
from edge_ssm.io.sources.base import Batch, Discontinuity, Source
from edge_ssm.runtime.driver import Driver
from edge_ssm.runtime.reordering import ReorderBuffer


def numbered(stream, samples, numbers):
    for number in numbers:
        stream.pipeline.process(Frame(samples[number], sequence=number))
    return stream


def test_lost_samples_are_held_numbered_and_counted():
    network = random_network(window=20)
    samples = samples_for(network, 0, 40)
    filled = samples.copy()
    filled[5:8] = samples[4]
    stream = numbered(Stream(network), samples, [*range(5), *range(8, 40)])
    assert stream.counters.gaps == {"lost": 3}
    assert stream.counters.samples == 40
    first, second = stream.decisions
    assert (first["start"], first["end"], first["gaps"]) == (0, 20, 3)
    assert np.allclose(logits(first), convolution.pooled(network, filled[:20]), atol=1e-9)
    assert np.allclose(logits(second), convolution.pooled(network, samples[20:]), atol=1e-9)


def test_a_long_loss_resets_and_keeps_the_numbers():
    network = random_network(window=20)
    samples = samples_for(network, 0, 200)
    stream = numbered(Stream(network, max_gap=10), samples, [*range(5), *range(100, 200)])
    assert stream.counters.gaps == {"lost": 95}
    assert stream.counters.samples == 200
    assert [d["start"] for d in stream.decisions] == [100, 120, 140, 160, 180]
    assert [e["event"] for e in stream.events] == ["reset"]


@pytest.mark.parametrize("reorder", [1024, 1 << 20])
def test_what_comes_again_is_dropped(reorder):
    network = random_network(window=20)
    samples = samples_for(network, 0, 40)
    stream = Stream(network, reorder=reorder)
    numbered(stream, samples, [*range(30), *range(20, 40)])
    assert stream.counters.dropped == {"repeated": 10}
    assert stream.counters.samples == 40
    assert np.allclose(logits(stream.decisions[1]), convolution.pooled(network, samples[20:]), atol=1e-9)


def test_numbers_that_begin_anew_are_a_restart_of_the_sender():
    network = random_network(window=20)
    samples = samples_for(network, 0, 40)
    stream = numbered(Stream(network), samples, [*range(10), *range(30)])
    assert [e["event"] for e in stream.events] == ["sender_restarted"]
    assert stream.counters.samples == 40
    assert not stream.counters.gaps


def test_time_stamps_that_skip_are_a_gap_only_where_asked():
    network = random_network(window=20)
    samples = samples_for(network, 0, 40)
    for hz, lost in ((None, {}), (50.0, {"lost": 3})):
        stream = Stream(network, time_stamp_hz=hz)
        for i in [*range(5), *range(8, 40)]:
            stream.pipeline.process(Frame(samples[i], 1000 + i / 50 + 0.004 * np.sin(i)))
        assert stream.counters.gaps == lost


@pytest.mark.parametrize("hop", [None, 3])
@pytest.mark.parametrize("gap", ["hold", "skip", "reset"])
@pytest.mark.parametrize("cut", [1, 7, 33, 60])
def test_a_loop_goes_on_where_its_state_was_taken(gap, hop, cut):
    network = random_network(window=20)
    samples = samples_for(network, 0, 100)
    samples[[6, 30, 31, 32, 59]] = np.nan
    whole = Stream(network, hop, gap_policy=gap).feed(samples)
    first = Stream(network, hop, gap_policy=gap).feed(samples[:cut])
    state, snapshot = first.pipeline.state()
    second = Stream(network, hop, gap_policy=gap)
    second.pipeline.restore(state, snapshot)
    for i in range(cut, 100):
        second.pipeline.process(Frame(samples[i], float(i)))
    assert first.lines + second.lines == whole.lines
    assert second.counters.gaps == whole.counters.gaps
    assert second.counters.discarded == whole.counters.discarded


def test_a_state_of_other_windows_is_refused_and_changes_nothing():
    network = random_network(window=20)
    samples = samples_for(network, 0, 40)
    state, snapshot = Stream(network, 10, carry=True).feed(samples[:15]).pipeline.state()
    stream = Stream(network, carry=True).feed(samples[:3])
    before = stream.pipeline.state()[0]
    with pytest.raises(SnapshotError, match="its windows are not those of this run"):
        stream.pipeline.restore(state, snapshot)
    assert stream.pipeline.state()[0] == before
    stream.feed(samples[3:])
    plain = Stream(network, carry=True).feed(samples)
    assert [d["logits"] for d in stream.decisions] == [d["logits"] for d in plain.decisions]


class Script(Source):
    """A source that says what a test has written down; a float is silence for so long."""

    name = "script"

    def __init__(self, *items):
        self._items = list(items)

    def read(self, stop, seconds):
        if not self._items:
            self.ended = True
            return None
        item = self._items.pop(0)
        if isinstance(item, float):
            time.sleep(item)
            return None
        return item

    def close(self):
        pass


def csv(rows):
    return "".join(",".join(repr(float(v)) for v in row) + "\n" for row in rows).encode()


def run(network, source, **options):
    from edge_ssm.io.codecs.csv import CsvDecoder
    from edge_ssm.io.shutdown import ShutdownSignal

    stream = Stream(network, **options)
    Driver(stream.pipeline, source, CsvDecoder(network.input), ShutdownSignal()).run()
    return stream


def test_a_row_that_a_lost_connection_cut_is_no_sample():
    network = random_network(window=20)
    rows = csv(samples_for(network, 0, 40))
    cut = rows[: rows.index(b"\n", 700) - 3]
    stream = run(
        network,
        Script(
            Discontinuity("connected", True),
            Batch(cut),
            Discontinuity("gone", False),
            Discontinuity("again", True),
            Batch(rows),
        ),
    )
    assert stream.counters.malformed == 1
    assert stream.counters.samples == cut.count(b"\n") + 40
    assert stream.counters.reconnects == 2
    assert [e["event"] for e in stream.events] == ["connected", "disconnected", "connected"]


def test_a_header_may_come_again_with_a_new_connection():
    network = random_network(window=20)
    rows = b"c1,c0\n" + csv(samples_for(network, 0, 20)[:, ::-1])
    stream = run(network, Script(Batch(rows), Discontinuity("again", True), Batch(rows)))
    assert stream.counters.malformed == 0
    one, two = stream.decisions
    assert one["logits"] == two["logits"]


def test_a_sensor_that_is_silent_is_reported_once_and_its_return_too():
    network = random_network(window=20)
    rows = csv(samples_for(network, 0, 20))
    stream = run(network, Script(Batch(rows), 0.06, 0.06, 0.01, Batch(rows)), stale_after_s=0.1)
    assert [e["event"] for e in stream.events] == ["stale", "flowing"]
    assert stream.events[0]["seconds"] >= 0.1


def test_late_decisions_are_counted():
    network = random_network(window=20)
    rows = csv(samples_for(network, 0, 40))
    assert run(network, Script(Batch(rows)), deadline_s=1e-9).counters.deadline_misses == 2
    assert run(network, Script(Batch(rows)), deadline_s=60).counters.deadline_misses == 0


def test_what_is_no_frame_gets_no_number():
    network = random_network(window=20)
    stream = Stream(network)
    stream.pipeline.process(Malformed("byte 7", "checksum"))
    assert (stream.counters.malformed, stream.counters.samples) == (1, 0)


def ordered(reorder, wait_s, numbers):
    buffer = ReorderBuffer(reorder, wait_s)
    return buffer, [f.sequence for n in numbers for f in buffer.add(Frame(np.zeros(2), sequence=n))]


@given(st.permutations(range(1, 40)))
def test_what_overtook_is_put_back_in_order(numbers):
    buffer, found = ordered(1 << 20, 60.0, [0, *numbers])
    assert found == list(range(40))
    assert buffer.frames == []


def test_what_is_missing_is_waited_for_and_then_lost():
    buffer, found = ordered(1024, 0.05, [0, 1, 5, 6, 9])
    assert found == [0, 1]
    time.sleep(0.06)
    assert [f.sequence for f in buffer.overdue()] == [5, 6]
    assert [f.sequence for f in buffer.overdue()] == []  # each gap has its own time
    time.sleep(0.06)
    assert [f.sequence for f in buffer.overdue()] == [9]


def test_no_more_than_so_many_are_held_back():
    buffer, found = ordered(1024, 60.0, [0, *range(2, 10_000)])
    assert found == [0, *range(2, 10_000)]
    assert buffer.frames == []


def test_a_sender_that_counts_anew_closes_what_was_open():
    _, found = ordered(100, 60.0, [5000, 5002, 3, 4])
    assert found == [5000, 5002, 3, 4]


def test_where_order_is_kept_nothing_waits():
    _, found = ordered(0, 0.0, [0, 5, 6, 2])
    assert found == [0, 5, 6, 2]


def test_what_was_held_back_is_in_the_state():
    network = random_network(window=20)
    samples = samples_for(network, 0, 40)
    options = {"reorder": 1 << 20, "reorder_wait_s": 60.0}
    first = Stream(network, **options)
    numbered(first, samples, [*range(10), 12, 13])
    state, snapshot = first.pipeline.state()
    second = Stream(network, **options)
    second.pipeline.restore(state, snapshot)
    numbered(second, samples, [10, 11, *range(14, 40)])
    assert not second.counters.gaps
    assert [d["logits"] for d in second.decisions] == [d["logits"] for d in Stream(network).feed(samples).decisions]


def test_datagrams_that_the_system_threw_away_stand_in_the_account():
    network = random_network(window=20)
    source = Script(Batch(csv(samples_for(network, 0, 20))))
    source.unread = 7
    stream = run(network, source)
    assert stream.counters.dropped == {"unread": 7}
    assert stream.counters.samples == 20


def test_repeats_and_latecomers_are_told_apart_on_a_line_too():
    network = random_network(window=20)
    samples = samples_for(network, 0, 40)
    stream = numbered(Stream(network), samples, [n for n in range(20) for _ in (0, 1)])
    assert stream.counters.dropped == {"repeated": 20}
    stream = numbered(Stream(network), samples, [*range(10), 12, 11, 10, *range(13, 40), *range(25, 40)])
    assert stream.counters.dropped == {"late": 2, "repeated": 15}
    assert stream.counters.gaps == {"lost": 2}
    assert stream.counters.samples == 40
    assert stream.events == []


def test_a_stray_time_stamp_is_no_gap():
    network = random_network(window=20)
    stream = Stream(network, time_stamp_hz=50.0)
    for i, stamp in enumerate([10.0, 10.02, -1.0, 10.04, 10.06, 3.0, 3.02, 3.04]):
        stream.pipeline.process(Frame(samples_for(network, i), stamp))
    assert not stream.counters.gaps
