"""A run as a service: its configuration, its snapshots, the networks it moves between."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import networks, random_network, samples_for
from support import commands
from support.streams import Stream
from support.waiting import catches, until

from edge_ssm.engines.registry import create
from edge_ssm.engines.state_transfer import transfer_state
from edge_ssm.errors import SnapshotError, UsageError
from edge_ssm.formats import artifact
from edge_ssm.model.network import SSM
from edge_ssm.service import settings_file
from edge_ssm.service import snapshot as service_snapshot
from edge_ssm.service.adaptation import AdaptationPolicy, Limits, Measurements
from edge_ssm.service.settings import merge

ROOT = Path(__file__).parent.parent
EDGE_SSM = [sys.executable, "-c", "from edge_ssm.cli.app import main; main()"]
READS_ALL = ["--input", "s.csv"]


# Configuration


def load(path, options=None):
    return merge(settings_file.read(str(path)), options or {})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "model.path is missing"),
        ("[model]\npath = 3\n", "line 2: model.path: '3', expected str, got int"),
        ("[model]\npath = 'm'\n\n[source]\ninputt = 'x'\n", "line 5: source.inputt is unknown; expected input"),
        ("[modell]\n", "line 1: 'modell' is unknown; expected a section model"),
        ("model = 'm'\n", "line 1: 'model' is a section"),
        ("[model]\npath = 'm'\n[window]\nhop = 2.5\n", "line 4: window.hop: '2.5', expected int"),
        ("[model]\npath = 'm'\n[gap]\npolicy = 'guess'\n", "line 4: gap.policy: 'guess'"),
        ("[model]\npath = 'm'\n[sink]\nqueue = 0\n", "line 4: sink.queue: '0', expected int >= 1"),
        ("[model]\npath = 'm'\n[state]\ninterval = nan\n", "line 4: state.interval: nan"),
        ("[model]\npath = 'm'\nx = \n", "line 3: not TOML"),
        ("[model]\npath = 'm'\n[metrics]\nprometheus = true\n", "needs metrics.listen"),
        ("\xff", "byte 0: not UTF-8"),
    ],
)
def test_a_configuration_that_is_wrong_says_where(tmp_path, text, problem):
    path = tmp_path / "c.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError) as error:
        load(path)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_flags_come_before_the_file_and_paths_start_at_its_folder(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[model]\npath = 'm.safetensors'\n[window]\nhop = 5\ncarry = true\n")
    made = load(path, {"hop": 7})
    assert (made.model, made.hop, made.carry) == (str(tmp_path / "m.safetensors"), 7, True)


@given(st.binary(max_size=300))
def test_no_configuration_breaks_the_reader(content):
    try:
        settings_file.parse(content, "c.toml")
    except UsageError as error:
        assert "\n" not in str(error)


# Snapshots


def snapshot_bytes(network, cut=27, engine="reference"):
    samples = samples_for(network, 0, 60)
    pipeline = Stream(network, engine=engine).feed(samples[:cut]).pipeline
    state, snapshot = pipeline.state()
    shapes = [(len(x), x.shape[1]) for x in snapshot.state]
    document = service_snapshot.Document("d" * 64, snapshot.fingerprint, shapes, state, "s", {"offset": 5}, {}, 1e9)
    return service_snapshot.to_bytes(document, snapshot), document, snapshot


@given(networks())
def test_a_snapshot_comes_back_as_it_was(network):
    content, document, snapshot = snapshot_bytes(network)
    found, state = service_snapshot.from_bytes(content)
    assert found == document
    assert all((a == b).all() for a, b in zip(state.state, snapshot.state, strict=True))


def test_a_snapshot_that_is_damaged_anywhere_is_refused():
    content, _, _ = snapshot_bytes(random_network())
    rng = np.random.default_rng(0)
    for _ in range(300):
        place = int(rng.integers(len(content)))
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(SnapshotError):
            service_snapshot.from_bytes(bytes(changed))
    for length in range(0, len(content), 13):
        with pytest.raises(SnapshotError):
            service_snapshot.from_bytes(content[:length])


@given(st.data())
def test_a_snapshot_made_up_with_a_right_checksum_breaks_nothing(data):
    """Whoever can write the file can compute its checksum."""
    import hashlib
    import struct

    content, document, _ = snapshot_bytes(random_network())
    plain = json.loads(msgspec.json.encode(document))
    pipeline = plain["loop"]
    where = data.draw(st.sampled_from([plain, pipeline, pipeline["windows"]]))
    key = data.draw(st.sampled_from(sorted(where)))
    where[key] = data.draw(
        st.recursive(
            st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
            max_leaves=4,
        )
    )
    head = json.dumps(plain).encode()
    body = struct.pack("<Q", len(head)) + head + content[40:][8 + struct.unpack_from("<Q", content, 40)[0] :]
    forged = service_snapshot.MAGIC + hashlib.sha256(body).digest() + body
    stream = Stream(random_network())
    try:
        found, state = service_snapshot.from_bytes(forged)
        stream.pipeline.restore(found.loop, state)
    except SnapshotError:
        return
    stream.feed(samples_for(random_network(), 1, 30))


# The state that two networks share


def shrunk(ssm, keep):
    """The SSM without all channels but ``keep`` (positions)."""
    states = np.concatenate([np.arange(ssm.pairs[:k].sum(), ssm.pairs[: k + 1].sum()) for k in keep]).astype(int)
    return SSM(
        ssm.active[keep], ssm.pairs[keep], ssm.A[states], ssm.B[states], ssm.C[states], ssm.D, ssm.dt[keep], None
    )


def smaller(network, keep):
    return replace(network, blocks=tuple(replace(b, ssm=shrunk(b.ssm, np.array(keep))) for b in network.blocks))


def test_a_channel_that_both_have_keeps_its_state():
    network = random_network(ragged=True)
    member = smaller(network, [0, 2, 5])
    big, small = create("reference", network), create("reference", member)
    samples = samples_for(network, 0, 50)
    big.chunk(samples)
    state = big.snapshot().state
    handed = transfer_state(network, state, member)
    for x, y, block in zip(handed, state, network.blocks, strict=True):
        owner = block.ssm.owner
        assert (x == y[:, np.isin(owner, [0, 2, 5])]).all()
    small.restore(replace(small.snapshot(), state=handed))
    # And back: what only the larger one has begins at zero.
    back = transfer_state(member, handed, network)
    for x, y, block in zip(back, state, network.blocks, strict=True):
        shared = np.isin(block.ssm.owner, [0, 2, 5])
        assert (x[:, shared] == y[:, shared]).all()
        assert (x[:, ~shared] == 0).all()


def test_a_channel_with_other_poles_begins_at_zero():
    network = random_network()
    block = network.blocks[0]
    moved = replace(network, blocks=(replace(block, ssm=replace(block.ssm, A=2 * block.ssm.A)), network.blocks[1]))
    engine = create("reference", network)
    engine.chunk(samples_for(network, 0, 50))
    state = engine.snapshot().state
    first, second = transfer_state(network, state, moved)
    assert (first == 0).all()
    assert (second == state[1]).all()


def test_a_swap_between_two_samples_goes_on_with_the_shared_state():
    network = random_network(window=20)
    same = replace(network)
    samples = samples_for(network, 0, 40)
    stream = Stream(network).feed(samples[:13])
    engine = create("reference", same)
    engine.restore(stream.pipeline.engine.snapshot())
    stream.pipeline.replace_engine(engine)
    stream.feed(samples[13:])
    plain = Stream(network).feed(samples)
    assert [d["logits"] for d in stream.decisions] == [d["logits"] for d in plain.decisions]


# Budgets


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


# Whole runs


def start(*arguments, **options):
    return commands.Process(
        [*EDGE_SSM, "run", *map(str, arguments)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    )


def decisions(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if "event" not in line], [line for line in lines if "event" in line]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two models of one family and one of other labels, and a recording."""
    folder = tmp_path_factory.mktemp("small")
    network = random_network(h=8, window=10, rate=1000.0)
    artifact.save(folder / "m.safetensors", network, {})
    artifact.save(folder / "s.safetensors", smaller(network, [0, 3, 4]), {})
    artifact.save(folder / "other.safetensors", random_network(1, h=8, window=25, rate=1000.0, d_output=2), {})
    artifact.save(folder / "wide.safetensors", random_network(d_input=4), {})
    rows = samples_for(network, 0, 20_000)
    (folder / "s.csv").write_text("c0,c1\n" + "".join(f"{a!r},{b!r}\n" for a, b in rows.tolist()))
    return folder


def test_a_killed_run_goes_on_and_no_decision_differs(small, tmp_path):
    whole = tmp_path / "whole"
    assert start(small / "m.safetensors", "--input", small / "s.csv", "--output", whole).wait(60) == 0
    out = tmp_path / "out"
    common = ["--input", small / "s.csv", "--state", tmp_path / "state", "--snapshot-interval", "0.1", "--output", out]
    for _ in range(3):
        run = start(small / "m.safetensors", *common, "--pace")
        size = out.stat().st_size if out.exists() else 0
        until(lambda size=size: out.exists() and out.stat().st_size > size + 8000)
        run.send_signal(signal.SIGKILL)
        run.communicate()
    assert start(small / "m.safetensors", *common).wait(60) == 0
    expected, _ = decisions(whole)
    found, events = decisions(out)
    assert [e["event"] for e in events] == ["resumed"] * 3
    by_index = {}
    for d in found:
        assert by_index.setdefault(d["index"], d) == d  # a repeat says the same
    assert [by_index[i] for i in sorted(by_index)] == expected
    assert len(found) - len(expected) < 3 * 40  # an interval of decisions, at 100 a second, each time


@pytest.mark.parametrize("end", ["closed", "full", "strict", "paced"])
def test_a_run_that_ends_within_a_block_loses_nothing(small, tmp_path, end):
    recording, whole = tmp_path / "s.csv", tmp_path / "whole"
    lines = (small / "s.csv").read_text().splitlines(keepends=True)
    lines.insert(3005, "no row\n")
    recording.write_text("".join(lines))
    model = small / "m.safetensors"
    assert start(model, "--input", recording, "--output", whole).wait(60) == 0
    common = [model, "--input", recording, "--state", tmp_path / "state"]
    outputs = [tmp_path / "out"] * 2
    if end == "closed":
        outputs[0] = "-"
    if end == "full":
        outputs[0] = "/dev/full"
    more = {"strict": ["--strict"], "paced": ["--pace"]}.get(end, [])
    run = start(*common, *more, "--output", outputs[0])
    said = ""
    if end == "closed":
        run.stdout.readline()
        run.stdout.close()
    if end == "paced":
        until(lambda: outputs[0].exists() and outputs[0].stat().st_size > 8000)
        run.terminate()
    said = run.stderr.read()
    assert run.wait(60) == {"closed": 0, "paced": 0}.get(end, 1), said
    assert start(*common, "--output", outputs[1]).wait(60) == 0
    assert {d["index"]: d for d in decisions(outputs[1])[0]} == {d["index"]: d for d in decisions(whole)[0]}
    if end == "paced":
        (resumed,) = decisions(outputs[1])[1]
        assert (resumed["event"], resumed["skipped"]) == ("resumed", 0)


def test_numbers_of_a_table_are_known_after_a_restart(small, tmp_path):
    rows = (small / "s.csv").read_text().splitlines()[1:401]
    numbered = [f"{i},{row}\n" for i, row in enumerate(rows)]
    recording = tmp_path / "s.csv"
    common = [
        small / "m.safetensors",
        "--input",
        recording,
        "--state",
        tmp_path / "state",
        "--output",
        "/dev/null",
    ]
    recording.write_text("".join(["seq,c0,c1\n", *numbered[:200]]))
    assert start(*common).wait(60) == 0
    recording.write_text("".join(["seq,c0,c1\n", *numbered[:200], *numbered[190:200], *numbered[250:]]))
    run = start(*common)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 0
    assert "samples   400, gaps 50 lost" in said
    assert "10 repeated" in said


def test_a_table_that_is_added_to_has_one_header(small, tmp_path):
    out = tmp_path / "out.csv"
    for _ in range(2):
        run = start(small / "m.safetensors", "--input", small / "s.csv", "--append", "--output", out)
        assert run.wait(60) == 0
    assert out.read_text().count("index,") == 1
    assert len(out.read_text().splitlines()) == 4001


def test_what_is_wrong_is_said_before_the_output_is_emptied(small, tmp_path):
    out = tmp_path / "out"
    out.write_text("kept\n")
    for flags in (["--chunk", "auto"], ["--member", "nope"], ["--latency-budget", "1"], ["--listen", ":1x"]):
        run = start(small / "m.safetensors", "--input", small / "s.csv", "--output", out, *flags)
        run.communicate(timeout=60)
        assert run.returncode == 2
        assert out.read_text() == "kept\n"


def test_the_rate_is_of_this_run_alone():
    stream = Stream(random_network(window=10), 10)
    stream.feed(samples_for(stream.pipeline.engine.network, 0, 30))
    again = Stream(random_network(window=10), 10)
    again.pipeline.restore(*stream.pipeline.state())
    again.feed(samples_for(stream.pipeline.engine.network, 0, 20))
    counters = again.pipeline.counters
    assert counters.samples - counters.earlier == 20


def test_a_damaged_snapshot_is_set_aside_and_said(small, tmp_path):
    (tmp_path / "snapshot").write_bytes(b"EDGESSM\x01" + bytes(100))
    run = start(small / "m.safetensors", "--input", small / "s.csv", "--state", tmp_path, "--output", tmp_path / "o")
    _, said = run.communicate(timeout=60)
    assert run.returncode == 0
    assert "snapshot: damaged (its checksum differs)" in said
    assert (tmp_path / "snapshot.refused").exists()
    assert len(decisions(tmp_path / "o")[0]) == 2000


def test_a_snapshot_of_another_model_is_refused(small, tmp_path):
    for model in ("m", "other"):
        run = start(
            small / f"{model}.safetensors", "--input", small / "s.csv", "--state", tmp_path, "--output", "/dev/null"
        )
        _, said = run.communicate(timeout=60)
    assert "snapshot: of artifact" in said


def test_a_new_model_is_taken_over_and_a_bad_one_is_not(small, tmp_path):
    model, fifo, out = tmp_path / "m.safetensors", tmp_path / "fifo", tmp_path / "out"
    model.write_bytes((small / "m.safetensors").read_bytes())
    os.mkfifo(fifo)
    run = commands.Process(
        [*EDGE_SSM, "run", model, "--input", fifo, "--follow", "--output", out, "--reload"],
        stderr=(tmp_path / "log").open("wb"),
    )
    rows = (small / "s.csv").read_text().splitlines()[1:]
    writer = fifo.open("w")

    def feed(count):
        for row in [rows.pop(0) for _ in range(count)]:
            writer.write(row + "\n")
        writer.flush()

    def events():
        return decisions(out)[1] if out.exists() else []

    feed(105)
    until(lambda: len(decisions(out)[0]) == 10)
    model.write_bytes((small / "wide.safetensors").read_bytes())
    run.send_signal(signal.SIGHUP)
    until(lambda: [e["event"] for e in events()] == ["reload_failed"])
    assert "reads c0, c1, c2, c3; the stream has c0, c1" in events()[0]["reason"]
    model.write_bytes((small / "s.safetensors").read_bytes())
    run.send_signal(signal.SIGHUP)
    until(lambda: (tmp_path / "log").read_text().count("ready, digest") == 1)
    feed(100)  # the window that was open is decided by the old model
    until(lambda: len(events()) == 2)
    assert (events()[1]["event"], events()[1]["sample"], events()[1]["changed"]) == ("reloaded", 110, True)
    model.write_bytes((small / "other.safetensors").read_bytes())  # noticed without a signal
    until(lambda: (tmp_path / "log").read_text().count("ready, digest") == 2)
    feed(100)
    until(lambda: len(events()) == 3)
    feed(100)
    until(lambda: [d["end"] - d["start"] for d in decisions(out)[0]].count(25) >= 6)
    writer.close()
    run.send_signal(signal.SIGTERM)
    assert run.wait(30) == 0
    found, _ = decisions(out)
    ends = [(d["start"], d["end"]) for d in found]
    assert ends[:11] == [(10 * i, 10 * i + 10) for i in range(11)]
    assert {b - a for a, b in ends[-4:]} == {25}
    # Before and after the first change, each is what the model says alone.
    for name, first, last in (("m", 0, 110), ("s", 110, 200)):
        samples = np.array(
            [[float(v) for v in row.split(",")] for row in (small / "s.csv").read_text().splitlines()[1:]]
        )
        alone = Stream(artifact.load(small / f"{name}.safetensors").network).feed(samples[first:last]).decisions
        there = [d for d in found if first <= d["start"] and d["end"] <= last]
        assert [d["label"] for d in there] == [d["label"] for d in alone]


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


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--member", "other.safetensors"], "its windows or labels are not those of"),
        (["--affinity", "4000"], "no such core"),
        (["--state", "/proc/none"], "snapshots cannot be kept there"),
        (["--fifo", "99"], "--fifo: '99', expected int <= 98"),
        (["--prometheus"], "needs metrics.listen"),
        (["--rotate-bytes", "5"], "only for a file"),
        (["--follow"], "standard input ends where it ends"),
        (["--queue", "0"], "--queue: '0', expected int >= 1"),
        (["--settle", "nan"], "--settle: nan"),
        (["--input", "tcp://x"], "expected tcp://HOST:PORT"),
        (["--output", "gopher://x"], "'gopher' is unknown"),
    ],
)
def test_wrong_use_is_one_line(small, arguments, problem):
    run = start(small / "m.safetensors", *arguments, cwd=small, stdin=subprocess.DEVNULL)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 2
    (line,) = said.splitlines()
    assert problem in line


def test_a_reloaded_model_leads_its_family(small, tmp_path):
    """After a reload the way back from a smaller member ends at the new model, not at the one that was replaced."""
    model, out = tmp_path / "m.safetensors", tmp_path / "out"
    model.write_bytes((small / "m.safetensors").read_bytes())
    with (tmp_path / "log").open("wb") as log:
        run = commands.Process(
            [
                *EDGE_SSM,
                "run",
                model,
                "--input",
                small / "s.csv",
                "--pace",
                "--reload",
                "--member",
                small / "s.safetensors",
                "--deadline",
                "0.0001",
                "--settle",
                "1",
                "--output",
                out,
            ],
            stderr=log,
        )
    said = (tmp_path / "log").read_text
    until(lambda: "moved to the smaller" in said())
    run.send_signal(signal.SIGHUP)  # the model's file is the same, whatever member runs
    until(lambda: any(e.get("changed") is False for e in decisions(out)[1]))
    assert "reloaded, digest" not in said()
    fresh = tmp_path / "fresh"
    artifact.save(fresh, artifact.load(small / "m.safetensors").network, {"another": True})
    digest = artifact.load(fresh).digest[:12]
    fresh.replace(model)
    run.send_signal(signal.SIGHUP)
    until(lambda: f"reloaded, digest {digest}" in said())
    until(lambda: said().count("moved to the smaller") == 2)
    run.send_signal(signal.SIGTERM)
    assert run.wait(30) == 0


# What a tester found


def test_what_no_reader_took_stands_in_the_account_and_is_a_failure(small, tmp_path):
    run = start(small / "m.safetensors", "--input", small / "s.csv", "--output", "tcp://127.0.0.1:1", "--queue", "4096")
    _, said = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "2000 output_unsent" in said
    assert "Connection refused; 2000 decisions and events were not delivered" in said.splitlines()[-1]


def test_a_dead_reader_is_told_of_once(small, tmp_path):
    with (tmp_path / "log").open("wb") as log:
        run = commands.Process(
            [*EDGE_SSM, "run", small / "m.safetensors", "--pace", *READS_ALL, "--output", "tcp://127.0.0.1:1"],
            stderr=log,
            cwd=small,
        )
    said = (tmp_path / "log").read_text
    until(lambda: "Connection refused; decisions wait" in said())
    time.sleep(1.5)
    run.send_signal(signal.SIGTERM)
    assert run.wait(30) == 0
    assert said().count("decisions wait") == 1
    assert "ended by signal" in said()
    assert "output_unsent" in said()


def test_a_dead_reader_s_decisions_are_made_again_where_state_is_kept(small, tmp_path):
    common = [small / "m.safetensors", "--input", small / "s.csv", "--state", tmp_path / "state", "--queue", "4096"]
    assert start(*common, "--output", "tcp://127.0.0.1:1").wait(60) == 1
    assert start(*common, "--output", tmp_path / "out").wait(60) == 0
    assert [d["index"] for d in decisions(tmp_path / "out")[0]] == list(range(2000))


@pytest.mark.parametrize("kind", ["input", "output"])
def test_a_signal_ends_the_wait_for_a_pipe(small, tmp_path, kind):
    os.mkfifo(tmp_path / "fifo")
    other = ["--input", small / "s.csv"] if kind == "output" else ["--output", tmp_path / "out"]
    run = start(small / "m.safetensors", *other, f"--{kind}", tmp_path / "fifo")
    until(lambda: catches(run.pid, signal.SIGTERM))
    time.sleep(0.5)
    assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=30)
    assert "ended by " in said


def test_the_run_does_not_write_over_what_it_reads(small, tmp_path):
    for name in ("s.csv", "m.safetensors"):
        content = (small / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tmp_path / name)
        run = start(tmp_path / "m.safetensors" if name[0] == "m" else small / "m.safetensors",
                    "--input", tmp_path / "s.csv", "--output", tmp_path / "link")  # fmt: skip
        _, said = run.communicate(timeout=60)
        assert run.returncode == 2
        assert "the run reads it" in said
        assert (tmp_path / name).read_bytes() == content


def test_the_run_does_not_write_over_its_configuration_and_signatures(small, tmp_path):
    shutil.copy(small / "m.safetensors", tmp_path)
    (tmp_path / "m.safetensors.sig").write_text("signed")
    own = tmp_path / "own.toml"
    own.write_text('[model]\npath = "m.safetensors"\n')
    for path in (own, tmp_path / "m.safetensors.sig"):
        content = path.read_bytes()
        run = start("--config", own, "--input", small / "s.csv", "--output", path)
        _, said = run.communicate(timeout=60)
        assert (run.returncode, said.count("\n")) == (2, 1)
        assert f"--output {path}: the run reads it" in said
        assert path.read_bytes() == content


def test_two_runs_share_neither_state_nor_output(small, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_SSM_RUN", str(tmp_path / "run"))
    os.mkfifo(tmp_path / "fifo")
    first = start(small / "m.safetensors", "--input", tmp_path / "fifo", "--follow",
                  "--state", tmp_path / "state", "--output", tmp_path / "out")  # fmt: skip
    until(lambda: list((tmp_path / "run").glob("*.status")))
    for option, place, problem in (
        ("--state", "state", "another run keeps its snapshots there"),
        ("--output", "out", "another run writes it"),
    ):
        second = start(small / "m.safetensors", "--input", small / "s.csv", option, tmp_path / place)
        _, said = second.communicate(timeout=60)
        assert second.returncode == 2
        assert problem in said
    first.send_signal(signal.SIGTERM)
    assert first.wait(30) == 0


def test_a_full_disk_ends_with_an_account(small):
    run = start(small / "m.safetensors", "--input", small / "s.csv", "--output", "/dev/full")
    _, said = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "ended by failure" in said
    assert "No space left on device" in said.splitlines()[-1]


def test_a_name_that_is_no_text_can_be_kept(small, tmp_path):
    odd = os.fsencode(tmp_path) + b"/x\xff.csv"
    Path(os.fsdecode(odd)).write_bytes((small / "s.csv").read_bytes())
    done = commands.run(
        [*EDGE_SSM, "run", small / "m.safetensors", "--input", odd, "--state", tmp_path / "state"],
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "state" / "snapshot").exists()


@pytest.mark.parametrize(
    ("closed", "problem"), [("<&-", "standard input is closed"), (">&-", "standard output is closed")]
)
def test_a_closed_stream_is_said(small, closed, problem):
    other = f"--input {small}/s.csv" if ">" in closed else ""
    command = (
        f"{sys.executable} -c 'from edge_ssm.cli.app import main; main()' run {small}/m.safetensors {other} {closed}"
    )
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert problem in done.stderr


def test_a_log_that_was_rotated_while_nobody_read_is_read_to_its_end(small, tmp_path):
    rows = (small / "s.csv").read_text().splitlines(keepends=True)[1:]
    log = tmp_path / "log"
    log.write_text("".join(rows[:1000]))
    common = [
        small / "m.safetensors",
        "--input",
        log,
        "--follow",
        "--state",
        tmp_path / "state",
        "--output",
        tmp_path / "out",
    ]
    for i in range(2):
        run = start(*common)
        until(lambda i=i: len(decisions(tmp_path / "out")[0]) == (100, 200)[i])
        if not i:
            run.send_signal(signal.SIGTERM)
            assert run.wait(30) == 0
            with log.open("a") as file:
                file.write("".join(rows[1000:1500]))
            log.rename(tmp_path / "log.1")
            log.write_text("".join(rows[1500:2000]))
    run.send_signal(signal.SIGTERM)
    assert run.wait(30) == 0
    found, events = decisions(tmp_path / "out")
    assert [d["start"] for d in found] == [10 * i for i in range(200)]
    assert [e["skipped"] for e in events if e["event"] == "resumed"] == [0]


def test_the_line_of_a_key_is_not_looked_for_within_a_string(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[source]\ninput = """\n[gap]\nmax = 1\n"""\n[model]\npath = "m"\n[gap]\nmax = -1\n')
    with pytest.raises(UsageError, match=r"c.toml, line 9: gap.max: '-1'"):
        load(path)
    path.write_text('[model]\npath = "m"\n[gap]\npolicy = "x"\n')
    with pytest.raises(UsageError, match="'x', expected hold, skip, reset"):
        load(path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="not a regular file"):
        load(tmp_path / "fifo")
