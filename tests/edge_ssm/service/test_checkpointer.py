"""A run that ends, however it ends, goes on from its last checkpoint and loses nothing."""

import os
import signal
import sys
from pathlib import Path

import pytest
from support import commands
from support.service_runs import decisions, start
from support.waiting import until

EDGE_SSM = [sys.executable, "-c", "from edge_ssm.cli.app import main; main()"]


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


@pytest.mark.slow
def test_a_dead_reader_s_decisions_are_made_again_where_state_is_kept(small, tmp_path):
    common = [small / "m.safetensors", "--input", small / "s.csv", "--state", tmp_path / "state", "--queue", "4096"]
    assert start(*common, "--output", "tcp://127.0.0.1:1").wait(60) == 1
    assert start(*common, "--output", tmp_path / "out").wait(60) == 0
    assert [d["index"] for d in decisions(tmp_path / "out")[0]] == list(range(2000))


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
