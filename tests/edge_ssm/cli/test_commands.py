"""The commands as a user meets them: processes, pipes, signals, exit statuses."""

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from support import commands
from support.networks import random_network, samples_for

import edge_ssm
from edge_ssm.engines.registry import create
from edge_ssm.formats import artifact

COMMAND = [sys.executable, "-c", "from edge_ssm.cli.app import main; main()"]
WINDOW = 10


@pytest.fixture(scope="module")
def network():
    return random_network(window=WINDOW, h=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, network):
    """A model and the same 45 samples in every format."""
    folder = tmp_path_factory.mktemp("cli")
    artifact.save(folder / "m.safetensors", network, {"data": "random"})
    samples = samples_for(network, 0, 45).astype("<f4").astype(np.float64)
    rows = [",".join(map(repr, row)) for row in samples.tolist()]
    (folder / "s.csv").write_text("c0,c1,label\n" + "".join(f"{row},class 1\n" for row in rows))
    (folder / "bare.csv").write_text("\n".join(rows) + "\n")
    (folder / "s.ndjson").write_text("".join(json.dumps(row) + "\n" for row in samples.tolist()))
    (folder / "s.f32").write_bytes(samples.astype("<f4").tobytes())
    return folder


def run(*arguments, stdin=b"", env=None):
    command = [*COMMAND, *map(str, arguments)]
    if env is None:
        return commands.run(command, input=stdin, capture_output=True, timeout=120)
    return subprocess.run(command, input=stdin, capture_output=True, timeout=120, env=os.environ | env)


def stream(folder, *arguments, **options):
    return run("run", folder / "m.safetensors", "--stream", *arguments, **options)


def decisions(done):
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def expected(network, folder):
    samples = np.fromfile(folder / "s.f32", "<f4").reshape(-1, 2)
    engine = create("reference", network)
    result = []
    for start in range(0, 40, WINDOW):
        engine.reset()
        result.append(engine.chunk(samples[start : start + WINDOW]).mean(axis=0))
    return np.array(result)


@pytest.mark.parametrize("engine", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("file", ["s.csv", "bare.csv", "s.ndjson", "s.f32"])
def test_every_format_and_engine_gives_the_offline_decisions(network, folder, file, engine):
    found = decisions(stream(folder, "--input", folder / file, "--logits", "--engine", engine))
    wanted = expected(network, folder)
    assert [(d["index"], d["start"], d["end"]) for d in found] == [(i, 10 * i, 10 * i + 10) for i in range(4)]
    assert np.abs(np.array([d["logits"] for d in found]) - wanted).max() < 1e-4
    assert [d["label"] for d in found] == [f"class {i}" for i in wanted.argmax(axis=1)]
    assert set(found[0]) == {"index", "start", "end", "label", "score", "logits"}


def test_stdin_is_the_default_input_and_takes_a_format(folder):
    assert len(decisions(stream(folder, stdin=(folder / "s.csv").read_bytes()))) == 4
    assert len(decisions(stream(folder, "--format", "ndjson", stdin=(folder / "s.ndjson").read_bytes()))) == 4
    raw = np.arange(40, dtype="<i2").tobytes()
    assert len(decisions(stream(folder, "--format", "i16le", "--scale", "0.1,0.01", stdin=raw))) == 2


def test_hop_carry_sample_rate_and_truth(folder):
    path = folder / "s.csv"
    assert len(decisions(stream(folder, "--input", path, "--hop", "5"))) == 8
    assert len(decisions(stream(folder, "--input", path, "--hop", "5", "--carry"))) == 8
    halved = decisions(stream(folder, "--input", path, "--sample-rate", "25"))
    assert [d["end"] - d["start"] for d in halved] == [5] * 9
    assert decisions(stream(folder, "--input", path, "--truth"))[0]["truth"] == "class 1"


def test_a_summary_ends_the_run(folder):
    done = stream(folder, "--input", folder / "s.csv")
    summary = done.stderr.decode()
    assert "ended by end of input; engine cpu" in summary
    assert "samples   45, gaps 0, malformed rows 0" in summary
    assert "last window unfinished with 5 samples" in summary
    assert "step      p50" in summary
    assert "times real time" in summary
    right = sum(d["label"] == "class 1" for d in decisions(done))
    assert f"{right} of 4 decisions equal the true label" in summary


def test_gaps_and_malformed_rows_are_counted_and_shown(folder):
    rows = (folder / "bare.csv").read_text().splitlines()
    rows[3], rows[4], rows[20] = "nan,1", "1e300,2", "garbage"
    done = stream(folder, "--gap", "skip", stdin="\n".join(rows).encode())
    assert decisions(done)[0]["gaps"] == 2
    assert "edge-ssm: stdin, line 21: 1 fields, expected 2; left out" in done.stderr.decode()
    assert "samples   44, gaps 1 missing, 1 out_of_range, malformed rows 1" in done.stderr.decode()
    strict = stream(folder, "--strict", stdin="\n".join(rows).encode())
    assert strict.returncode == 1
    assert strict.stderr.decode().splitlines()[-1].startswith("edge-ssm: error: line 21: ")


def test_a_babbling_sensor_does_not_fill_the_log(folder):
    done = stream(folder, "--engine", "reference", stdin=b"1,2\n" + b"garbage\n" * 5000)
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) < 40
    assert "malformed rows 5000" in done.stderr.decode()


def test_outputs(folder, tmp_path):
    path = tmp_path / "d.csv"
    assert stream(folder, "--input", folder / "s.csv", "--output", path, "--logits").returncode == 0
    header, first, *_ = path.read_text().splitlines()
    assert header == "index,start,end,time,label,score,gaps,logit_class 0,logit_class 1,logit_class 2"
    assert first.startswith("0,0,10,,class ")
    text = stream(folder, "--input", folder / "s.csv", "--output-format", "text").stdout.decode()
    assert "truth" in text.splitlines()[0]
    assert "class 1" in text


def test_decisions_come_as_they_fall_due(folder):
    rows = (folder / "bare.csv").read_bytes().splitlines(keepends=True)
    command = [*COMMAND, "run", str(folder / "m.safetensors"), "--stream", "--engine", "reference"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(b"".join(rows[:WINDOW]))
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["end"] == WINDOW  # with the input still open
        process.stdin.close()
        assert process.wait(30) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("pace", [False, True])
def test_signals_end_the_run_cleanly(folder, number, pace):
    rows = (folder / "bare.csv").read_bytes().splitlines(keepends=True)
    command = [*COMMAND, "run", str(folder / "m.safetensors"), "--stream", "--engine", "reference"]
    with subprocess.Popen(
        command + ["--pace"] * pace, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdin.write(b"".join(rows[: WINDOW + 3]))
        process.stdin.flush()
        process.stdout.readline()
        process.send_signal(number)
        _, summary = process.communicate(timeout=30)
        assert process.returncode == 0
        assert b"ended by signal" in summary
        assert b"Traceback" not in summary


def test_a_closed_pipe_ends_the_run_quietly(folder):
    rows = (folder / "bare.csv").read_bytes()
    command = [*COMMAND, "run", str(folder / "m.safetensors"), "--stream", "--engine", "reference"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(rows)
        process.stdin.flush()
        process.stdout.readline()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # the command may have ended before all of it is written
            process.stdin.write(rows * 50)
            process.stdin.flush()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        errors = process.stderr.read()
        assert process.wait(30) == 0
    assert b"ended by closed output" in errors
    assert b"Traceback" not in errors
    assert b"Exception" not in errors


def test_pace_holds_a_recording_back(folder):
    began = time.monotonic()
    assert len(decisions(stream(folder, "--input", folder / "s.csv", "--pace", "--engine", "reference"))) == 4
    assert time.monotonic() - began > 44 / 50  # never faster than the sensor was


def one_line(done, status, text):
    assert done.returncode == status, done.stderr
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("edge-ssm: error: ")
    assert text in line
    assert done.stdout == b""


def test_an_error_says_nothing_to_the_terminal_itself(folder, tmp_path):
    """A hostile model's words stand in the message; they must not move the cursor or change a title."""
    content = (folder / "m.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    # JSON within JSON: the document's member is called `\x1b[2J` once both are read.
    header = content[8 : 8 + size].replace(b'\\"prenorm\\"', rb"\"\\u001b[2J\"")
    hostile = tmp_path / "hostile.safetensors"
    hostile.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
    done = run("inspect", hostile)
    one_line(done, 2, "unknown field `?[2J`")
    assert b"\x1b" not in done.stderr


def test_wrong_use_is_one_line_and_status_2(folder, tmp_path):
    model = folder / "m.safetensors"
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(model.read_bytes()[:1000])
    one_line(run("run", damaged, "--stream"), 2, f"{damaged}: ")
    one_line(run("inspect", damaged), 2, f"{damaged}: ")
    one_line(run("run", tmp_path / "none", "--stream"), 2, "cannot be read (No such file or directory)")
    known = "auto, cpu, cpu-float32, cuda, cuda-persistent, onnx, tflite, reference"
    one_line(stream(folder, "--engine", "warp"), 2, f"engine 'warp': unknown, expected {known}")
    one_line(stream(folder, "--hop", "11"), 2, "hop: 11 samples, expected 1 to the window's 10")
    one_line(stream(folder, "--input", tmp_path / "none.csv"), 2, "none.csv: cannot be read")
    one_line(stream(folder, "--input", tmp_path), 2, "it is a directory")
    one_line(stream(folder, "--output", tmp_path / "no" / "x"), 2, "cannot be written")
    one_line(stream(folder, "--scale", "x"), 2, "--scale 'x': expected numbers")
    one_line(stream(folder, "--sample-rate", "-1"), 2, "sample rate: -1 Hz, expected 0.05 to 50000")
    one_line(stream(folder, "--gap", "fill"), 2, "'fill' is not one of 'hold', 'skip', 'reset'")
    one_line(stream(folder, "--format", "xml"), 2, "'xml' is not one of")
    one_line(run("run"), 2, "MODEL: missing; give an artifact, or --config FILE")
    one_line(run("fly"), 2, "No such command 'fly'")
    one_line(stream(folder, "--engine", "reference", stdin=b"a,b\n1,2\n"), 2, "line 1: no column for channel 'c0'")


def test_a_stream_without_one_valid_row_fails(folder):
    done = stream(folder, "--engine", "reference", stdin=b"1\n2\n")
    assert done.returncode == 1
    assert (
        "no valid sample among 2 rows; expected csv with 2 channels (c0, c1)" in done.stderr.decode().splitlines()[-1]
    )
    assert stream(folder, "--engine", "reference", stdin=b"").returncode == 0


def test_inspect(folder):
    document = json.loads(run("inspect", folder / "m.safetensors", "--json").stdout)
    assert document["window"] == WINDOW
    assert [layer["active"] for layer in document["layers"]] == [16, 16]
    text = run("inspect", folder / "m.safetensors").stdout.decode()
    assert "2 layers of 16 channels" in text
    assert "data: random" in text


def test_doctor_lists_what_is_here_and_how_to_add_the_rest():
    findings = {f["name"]: f for f in json.loads(run("doctor", "--json").stdout)["findings"]}
    assert findings["python"]["ok"]
    assert findings["numba (compiles it)"]["ok"]
    for finding in findings.values():
        assert finding["found"]
    assert run("doctor").stdout.decode().count("\n") >= len(findings)


def test_doctor_does_not_import_what_it_looks_for():
    code = "import sys; from edge_ssm.cli import doctor as d; d.examine(); print({'torch', 'numba'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_a_full_disk_is_one_clear_error(folder):
    done = stream(folder, "--engine", "reference", "--input", folder / "s.csv", "--output", "/dev/full")
    *account, line = done.stderr.decode().splitlines()
    assert done.returncode == 1
    assert line == "edge-ssm: error: output: cannot be written (No space left on device); the run ends here"
    assert account[0].startswith("ended by failure; engine reference")
    with open("/dev/full", "w") as full:
        command = [*COMMAND, "run", str(folder / "m.safetensors"), "--stream", "--engine", "reference"]
        done = subprocess.run([*command, "--input", str(folder / "s.csv")], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr


def test_a_reader_that_leaves_is_no_error(folder):
    shell = f"{shutil.which('bash')} -o pipefail -c"
    line = " ".join([f'"{part}"' for part in [*COMMAND, "inspect", str(folder / "m.safetensors")]])
    done = subprocess.run([*shell.split(), f"{line} | true"], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_recording_in_chunks_decides_the_same(folder):
    def run_with(*options):
        done = stream(folder, "--input", folder / "s.csv", "--logits", "--engine", "cpu", *options)
        assert done.returncode == 0, done.stderr
        return done

    expected = run_with().stdout
    for options in (("--chunk", "3"), ("--chunk", "1024"), ("--chunk", "auto", "--latency-budget", "50")):
        done = run_with(*options)
        assert done.stdout == expected
        assert b"\nchunk " in done.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--chunk", "0"], "--chunk '0': expected auto, or 1 to 1024 samples"),
        (["--chunk", "many"], "--chunk 'many': expected auto"),
        (["--chunk", "auto"], "--chunk auto: needs --latency-budget"),
        (["--chunk", "auto", "--latency-budget", "nan"], "--latency-budget: nan; expected a number"),
        (["--latency-budget", "5"], "--latency-budget: only with --chunk auto"),
        (["--chunk", "auto", "--latency-budget", "1e-6"], "but a single step takes"),
    ],
)
def test_chunks_that_can_not_be_are_refused(folder, options, text):
    done = stream(folder, "--input", folder / "s.csv", *options)
    assert done.returncode == 2
    assert text in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_kernel_is_compiled_for_another_processor(tmp_path):
    done = run("compile", "--target", "aarch64-generic", "--output", tmp_path / "k", "--assembly", tmp_path / "s")
    assert b"kernel for aarch64-generic" in done.stdout
    assert (tmp_path / "k").read_bytes().startswith(b"edge-ssm kernel")
    assert "fmla" in (tmp_path / "s").read_text()
    done = run("compile", "--target", "z80")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"--target 'z80': unknown" in done.stderr


def test_auto_says_what_it_chose_and_why(folder):
    done = stream(folder, "--input", folder / "s.csv")
    assert b"(by trial: cpu " in done.stderr
    assert b", reference " in done.stderr


def test_recorded_labels_can_not_write_to_the_terminal(folder):
    rows = (folder / "bare.csv").read_text().splitlines()
    content = "c0,c1,label\n" + "".join(f"{row},\x1b[2Jx\n" for row in rows)
    done = stream(folder, "--engine", "reference", "--output-format", "text", stdin=content.encode())
    assert b"?[2Jx" in done.stdout
    assert b"\x1b" not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_read_only_home_only_costs_the_compile_cache(folder, tmp_path):
    package = tmp_path / "copy"
    shutil.copytree(
        os.path.dirname(edge_ssm.__file__), package / "edge_ssm", ignore=shutil.ignore_patterns("__pycache__")
    )
    env = {"PYTHONPATH": str(package), "EDGE_SSM_CACHE": "/proc/nowhere", "PYTHONDONTWRITEBYTECODE": "1"}
    assert len(decisions(stream(folder, "--input", folder / "s.csv", "--engine", "cpu", env=env))) == 4
