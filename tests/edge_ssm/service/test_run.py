"""A run as a service: what it refuses, and how it ends."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from support import commands
from support.service_runs import start
from support.waiting import catches, until

EDGE_SSM = [sys.executable, "-c", "from edge_ssm.cli.app import main; main()"]
READS_ALL = ["--input", "s.csv"]


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


@pytest.mark.slow
def test_what_no_reader_took_stands_in_the_account_and_is_a_failure(small, tmp_path):
    run = start(small / "m.safetensors", "--input", small / "s.csv", "--output", "tcp://127.0.0.1:1", "--queue", "4096")
    _, said = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "2000 output_unsent" in said
    assert "Connection refused; 2000 decisions and events were not delivered" in said.splitlines()[-1]


@pytest.mark.slow
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
        ("--output", "out", "another run is writing it"),
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
