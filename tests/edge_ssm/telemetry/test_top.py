"""``edge-ssm top`` reads the status files of runs, and what others may have put beside them."""

import json
import os
import subprocess
import sys
import time

import msgspec
import pytest
from support import commands
from support.networks import random_network

from edge_ssm.io.sinks import formats
from edge_ssm.io.sinks.file import FileSink
from edge_ssm.runtime.counters import Counters
from edge_ssm.telemetry import publisher as telemetry_publisher
from edge_ssm.telemetry import top

COMMAND = [sys.executable, "-c", "from edge_ssm.cli.app import main; main()", "top"]


def run_top(*arguments):
    process = commands.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture
def publisher(tmp_path, monkeypatch):
    """A real telemetry_publisher in this process; it writes to ``tmp_path / "status"``."""
    monkeypatch.setenv("EDGE_SSM_RUN", str(tmp_path / "status"))
    formatter = formats.make("ndjson", FileSink(str(tmp_path / "out")), random_network(), False, False)
    publisher = telemetry_publisher.StatusPublisher(
        formatter, telemetry_publisher.RunInfo("m.safetensors", "d", "cpu", 50.0), Counters()
    )
    yield publisher
    publisher.close()


@pytest.fixture
def path(tmp_path, publisher):
    (tmp_path / "status").mkdir()
    return tmp_path / "status" / f"{os.getpid()}.status"


def test_a_status_is_shown(publisher, path):
    path.write_bytes(msgspec.json.encode(publisher.status()))
    assert json.loads(run_top("--json"))[0]["pid"] == os.getpid()
    assert f"m.safetensors   pid {os.getpid()}, engine cpu" in run_top("--once")


def test_a_pipe_in_place_of_a_status_file_does_not_block_top(publisher, path):
    os.mkfifo(path)
    assert json.loads(run_top("--json")) == []
    assert "no run is visible here" in run_top("--once")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to somebody else")
def test_a_status_file_of_another_user_is_skipped(publisher, path):
    path.write_bytes(msgspec.json.encode(publisher.status()))
    os.chown(path, 12345, -1)
    assert json.loads(run_top("--json")) == []


def test_a_status_file_must_bear_the_number_of_its_process(publisher, path):
    content = msgspec.json.encode(publisher.status())
    path.with_name("1.status").write_bytes(content)
    path.with_name("link.status").symlink_to("1.status")
    assert json.loads(run_top("--json")) == []


def test_a_status_of_a_dead_run_is_skipped_though_its_number_is_used_again(publisher, path):
    """In containers, for example: every run there may be process 1."""
    status = publisher.status()
    assert status.process_started > 0
    dead = msgspec.structs.replace(status, process_started=status.process_started - 1)
    path.write_bytes(msgspec.json.encode(dead))
    assert json.loads(run_top("--json")) == []


def test_a_run_removes_what_killed_runs_have_left(publisher, path):
    with subprocess.Popen([sys.executable, "-c", ""]) as dead_run:
        dead_run.wait()
    leftovers = [path.with_name(f"{dead_run.pid}.status"), path.with_name(f".{dead_run.pid}.status.abcd1234")]
    others = [path.with_name("mine.status"), path.with_name(f".{os.getppid()}.status.abcd1234")]
    for file in (*leftovers, *others):
        file.write_bytes(msgspec.json.encode(msgspec.structs.replace(publisher.status(), pid=dead_run.pid)))
    os.utime(leftovers[1], (0, 0))
    path.write_bytes(msgspec.json.encode(publisher.status()))
    publisher.start()
    assert sorted(path.parent.iterdir()) == sorted([*others, path])


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
def test_impossible_figures_are_not_shown(publisher, path, change):
    path.write_bytes(msgspec.json.encode(msgspec.to_builtins(publisher.status()) | change))
    assert json.loads(run_top("--json")) == []


def test_a_name_cannot_start_a_line_of_its_own(publisher, path):
    evil = "x\npower        1.00 W, the board\x1b[2J"
    changes = {"model": evil, "engine": evil, "last": evil, "source": evil, "events": [evil], "labels": {evil: 3}}
    changes |= {"dropped": {evil: 1}, "started": time.time() + 1e6}
    path.write_bytes(msgspec.json.encode(msgspec.to_builtins(publisher.status()) | changes))
    text = run_top("--once")
    assert "\x1b" not in text
    assert sum(line.startswith("power   ") for line in text.splitlines()) == 1
    assert "x?power" in text
    assert "up 0 min 0 s" in text


def test_the_rate_of_rare_decisions_is_not_zero(publisher, monkeypatch):
    monkeypatch.setattr(telemetry_publisher, "INTERVAL_S", 0.05)
    counters = publisher._counters
    publisher.start()
    time.sleep(0.5)
    counters.decisions = 1  # and none in the later intervals
    time.sleep(0.5)
    status = publisher.status()
    assert 0.5 < status.decisions_per_s < 1.5
    assert " (0.0 a second)" not in top.page([status], None)
    quiet = msgspec.structs.replace(status, decisions=3, decisions_per_s=0.0, started=status.updated - 600)
    assert "decisions  3 (0.005 a second)" in top.page([quiet], None)
