"""``edge-ssm top`` reads what runs write of themselves, and what others may have put there."""

import json
import os
import subprocess
import sys
import time

import msgspec
import pytest
from networks import random_network

from edge_ssm.io.sinks import formats
from edge_ssm.io.sinks.file import FileSink
from edge_ssm.runtime.counters import Counters
from edge_ssm.telemetry import publisher, top

COMMAND = [sys.executable, "-c", "from edge_ssm.cli.app import main; main()", "top"]


def shown(*arguments):
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def teller(tmp_path, monkeypatch):
    """A real one of this process; it writes under ``tmp_path / "status"``."""
    monkeypatch.setenv("EDGE_SSM_RUN", str(tmp_path / "status"))
    formatter = formats.make("ndjson", FileSink(str(tmp_path / "out")), random_network(), False, False)
    teller = publisher.StatusPublisher(formatter, publisher.RunInfo("m.safetensors", "d", "cpu", 50.0), Counters())
    yield teller
    teller.close()


@pytest.fixture
def place(tmp_path, teller):
    (tmp_path / "status").mkdir()
    return tmp_path / "status" / f"{os.getpid()}.status"


def test_a_status_is_shown(teller, place):
    place.write_bytes(msgspec.json.encode(teller.status()))
    assert json.loads(shown("--json"))[0]["pid"] == os.getpid()
    assert f"m.safetensors   pid {os.getpid()}, engine cpu" in shown("--once")


def test_a_pipe_in_a_status_files_place_does_not_hold_top_up(teller, place):
    os.mkfifo(place)
    assert json.loads(shown("--json")) == []
    assert "no run is visible here" in shown("--once")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to somebody else")
def test_nobody_speaks_for_anothers_process(teller, place):
    place.write_bytes(msgspec.json.encode(teller.status()))
    os.chown(place, 12345, -1)
    assert json.loads(shown("--json")) == []


def test_a_file_speaks_for_the_process_that_it_is_named_after(teller, place):
    content = msgspec.json.encode(teller.status())
    place.with_name("1.status").write_bytes(content)
    place.with_name("link.status").symlink_to("1.status")
    assert json.loads(shown("--json")) == []


def test_a_dead_runs_number_that_is_another_processs_now(teller, place):
    """Process 1 of a container, say: each run there has the same number."""
    status = teller.status()
    assert status.process_started > 0
    dead = msgspec.structs.replace(status, process_started=status.process_started - 1)
    place.write_bytes(msgspec.json.encode(dead))
    assert json.loads(shown("--json")) == []


def test_a_run_removes_what_killed_ones_left(teller, place):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    kill = [place.with_name(f"{gone.pid}.status"), place.with_name(f".{gone.pid}.status.abcd1234")]
    keep = [place.with_name("mine.status"), place.with_name(f".{os.getppid()}.status.abcd1234")]
    for path in (*kill, *keep):
        path.write_bytes(msgspec.json.encode(msgspec.structs.replace(teller.status(), pid=gone.pid)))
    os.utime(kill[1], (0, 0))
    place.write_bytes(msgspec.json.encode(teller.status()))
    teller.start()
    assert sorted(place.parent.iterdir()) == sorted([*keep, place])


@pytest.mark.parametrize(
    "change",
    [
        {"samples": -1},
        {"decisions": -(2**40)},
        {"samples_per_s": 1e308},
        {"step_p50_us": -3.0},
        {"temperature_c": 1e9},
        {"power_w": -1e300},
        {"labels": {"a": -5}},
        {"gaps": {"missing": 2**62}},
    ],
)
def test_impossible_figures_are_not_shown(teller, place, change):
    place.write_bytes(msgspec.json.encode(msgspec.to_builtins(teller.status()) | change))
    assert json.loads(shown("--json")) == []


def test_names_can_not_write_lines_of_their_own(teller, place):
    evil = "x\npower        1.00 W, the board\x1b[2J"
    changes = {"model": evil, "engine": evil, "last": evil, "source": evil, "events": [evil], "labels": {evil: 3}}
    changes |= {"dropped": {evil: 1}, "started": time.time() + 1e6}
    place.write_bytes(msgspec.json.encode(msgspec.to_builtins(teller.status()) | changes))
    text = shown("--once")
    assert "\x1b" not in text
    assert sum(line.startswith("power   ") for line in text.splitlines()) == 1
    assert "x?power" in text
    assert "up 0 min 0 s" in text


def test_a_decision_in_many_seconds_has_a_rate(teller, monkeypatch):
    monkeypatch.setattr(publisher, "INTERVAL_S", 0.05)
    counters = teller._counters
    teller.start()
    time.sleep(0.5)
    counters.decisions = 1  # and none in the intervals after
    time.sleep(0.5)
    status = teller.status()
    assert 0.5 < status.decisions_per_s < 1.5
    assert " (0.0 a second)" not in top.page([status], None)
    quiet = msgspec.structs.replace(status, decisions=3, decisions_per_s=0.0, started=status.updated - 600)
    assert "decisions  3 (0.005 a second)" in top.page([quiet], None)
