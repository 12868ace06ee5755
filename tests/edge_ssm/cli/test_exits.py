"""How commands end that are interrupted, are terminated, or cannot write their output."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from support import ROOT, commands

DEMO = ROOT / "examples" / "demo.safetensors"
MAIN = "from edge_ssm.cli.app import main; main()"
COMMAND = [sys.executable, "-c", MAIN]
BUILD = [sys.executable, "-c", "from edge_ssm_build.cli.app import main; main()"]
LONG = ["profile", str(DEMO), "--engine", "reference", "--no-paced", "--meter", "none", "--block-seconds", "60"]
SHORT = ["--rounds", "2", "--block-seconds", "0.3", "--no-paced", "--meter", "none", "--engine", "reference"]
ON_IMPORT = """\
import os, signal, sys
class Finder:
    def find_spec(self, name, *rest):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""
ON_CHILD = """\
import os, signal, sys
def on(event, arguments):
    if event == "subprocess.Popen" and {module!r} in arguments[1]:
        os.kill(os.getpid(), signal.{name})
sys.addaudithook(on)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["profiles", "list"],
        ["profiles", "show", "raspberry-pi-5"],
        ["profiles", "detect"],
        ["top", "--once"],
        ["top", "--json"],
        ["doctor"],
        ["inspect", DEMO],
        ["profile", DEMO, *SHORT],
        ["--help"],
        ["--version"],
        ["profile", "--help"],
    ],
)
def test_a_full_output_is_reported_in_one_line_with_status_1(arguments):
    with open("/dev/full", "wb") as full:
        command = [*COMMAND, *map(str, arguments)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.stderr == "edge-ssm: error: output: cannot be written (No space left on device)\n"
    assert done.returncode == 1


def test_a_full_output_of_the_build_command_is_reported_in_one_line():
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*BUILD, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.stderr == "edge-ssm-build: error: output: cannot be written (No space left on device)\n"
    assert done.returncode == 1


def test_the_exit_status_is_right_without_standard_error():
    with open("/dev/full", "wb") as full:
        assert subprocess.run([*COMMAND, "fly"], stderr=full, timeout=60).returncode == 2


@pytest.mark.slow
def test_a_report_is_kept_if_its_text_cannot_be_shown(tmp_path):
    with open("/dev/full", "wb") as full:
        command = [*COMMAND, "profile", str(DEMO), *SHORT, "--json", str(tmp_path / "r.json")]
        assert subprocess.run(command, stdout=full, stderr=subprocess.DEVNULL, timeout=120).returncode == 1
    assert (tmp_path / "r.json").stat().st_size > 1000


def test_ctrl_c_during_a_run_is_reported_in_one_line():
    with subprocess.Popen([*COMMAND, *LONG], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (130, b"", b"edge-ssm: error: interrupted\n")


@pytest.mark.parametrize("module", ["click", "numpy", "edge_ssm.model.network", "edge_ssm.profiler.run"])
def test_ctrl_c_while_modules_load_is_reported_in_one_line(module):
    for arguments in (LONG, ["top", "--once"]):
        command = [sys.executable, "-c", ON_IMPORT.format(module=module) + MAIN, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if module.startswith("edge_ssm.profiler") and arguments[0] == "top":  # is not loaded by it
            assert done.returncode == 0
            continue
        assert done.stderr == "edge-ssm: error: interrupted\n"
        assert done.returncode in (130, -signal.SIGINT)  # the same for a shell


def test_ctrl_c_ends_top_in_a_terminal_quietly():
    master, slave = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, "top"], stdout=slave, stderr=subprocess.PIPE, env=os.environ | {"TERM": "xterm"}
    ) as p:
        os.close(slave)
        seen = b""
        while b"temperature" not in seen:
            seen += os.read(master, 4096)
        p.send_signal(signal.SIGINT)
        assert p.stderr.read() == b""
        assert p.wait(30) == 0
    os.close(master)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_leaves_no_folder_behind(tmp_path, name):
    """The signal arrives while the first meter is read, as when a device shuts down."""
    code = ON_CHILD.format(module="edge_ssm.profiler.sampler", name=name) + MAIN
    command = [sys.executable, "-c", code, "profile", str(DEMO), "--engine", "reference", "--no-paced"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=os.environ | {"TMPDIR": str(tmp_path)}
    )
    assert list(tmp_path.iterdir()) == []
    said = "edge-ssm: error: interrupted\n" if name == "SIGINT" else ""
    assert (done.returncode, done.stderr) == (130 if name == "SIGINT" else 143, said)


def test_a_signal_while_a_kernel_is_compiled_leaves_no_folder_behind(tmp_path):
    code = ON_CHILD.format(module="edge_ssm.engines.cpu.compiler", name="SIGTERM") + MAIN
    command = [sys.executable, "-c", code, "compile", "--output", str(tmp_path / "k")]
    (tmp_path / "t").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "t")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stderr) == (143, "")
    assert list((tmp_path / "t").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "said"),
    [
        ([*COMMAND, "profile", DEMO, "--block-seconds", "nan"], "--block-seconds"),
        ([*COMMAND, "profile", DEMO, "--block-seconds", "inf"], "--block-seconds"),
        ([*COMMAND, "top", "--interval", "nan"], "--interval"),
        ([*COMMAND, "run", DEMO, "--sample-rate", "nan"], "--sample-rate: nan; expected a number"),
        ([*COMMAND, "run", DEMO, "--chunk", "auto", "--latency-budget", "nan"], "--latency-budget"),
        *(
            ([*BUILD, "train", "--data", "x", "--output", "x", "--window", "9", option, "nan"], option)
            for option in ("--dropout", "--lr", "--ssm-lr", "--weight-decay", "--noise", "--scaling", "--rotation")
        ),
        *(
            ([*BUILD, "prune", "x", "--output", "x", option, "nan"], option)
            for option in ("--distill", "--target-latency", "--max-accuracy-loss")
        ),
        ([*BUILD, "export", "x", "--output", "x", "--error-bound", "nan"], "--error-bound"),
    ],
)
def test_nan_is_in_no_range(command, said):
    done = commands.run(list(map(str, command)), capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert said in line
