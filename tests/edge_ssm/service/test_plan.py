"""The rules of a run are the same for ``service check`` and for ``run``, whatever a configuration says."""

import gc
import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.networks import random_network

from edge_ssm.errors import EdgeSSMError
from edge_ssm.formats import artifact
from edge_ssm.service import check, settings_file
from edge_ssm.service import run as service_run
from edge_ssm.service.settings import merge

NUMBERS = count()
COMMAND = [sys.executable, "-c", "from edge_ssm.cli.app import main; main()"]
CORES = sorted(os.sched_getaffinity(0))
LONG = "x" * 300
"""A file's name that no file system takes."""

MODELS = ["m", "rateless", "unpooled", "unpooled-rateless", "damaged", "none"]
MUTATIONS = {
    "model.path": [f"{name}.safetensors" for name in MODELS] + ["fifo", "folder"],
    "model.reload": [True, False],
    "source.input": [
        "{f}/empty.csv", "{f}/empty.f32", "{f}/none.csv", "{f}/folder", "{f}/socket", f"{{f}}/{LONG}", "/dev/null", "-",
        "tcp://h", "tcp://h:1", "tcp-listen://:9", "udp://:9", "unix:///run/x", "unix://h/x", "mqtt://h/a", "smoke://x",
        "serial:///dev/ttyX?baud=9600", "serial:///dev/ttyX?baud=fast", "iio://x", "iio://x?sampling_frequency=fast",
        "iio://x?length=0", "iio://", "iio://x?colour=red",
    ],
    "source.format": ["csv", "ndjson", "f32le", "i16le", "framed", "xml"],
    "source.scale": ["1", "2", "0.5,0.5", "1,2,3", "big", ""],
    "source.follow": [True, False],
    "source.strict": [True],
    "source.pace": [True, False],
    "source.stale_after": [0.5, 0.0],
    "source.time_gaps": [True],
    "window.hop": [-1, 0, 1, 5, 10, 11, 1 << 70],
    "window.carry": [True],
    "window.sample_rate": [25.0, 0.0, -1.0, 1e9],
    "gap.policy": ["hold", "skip", "reset", "guess"],
    "gap.max": [0, 5, -1],
    "engine.name": ["reference", "cpu", "auto", "onnx", "cuda", "steam"],
    "engine.threads": [1, 2, 0, 300],
    "engine.profile": ["auto", "none", "generic-x86-64", "orin-nano-8gb-15w", "none-such"],
    "engine.chunk": [1, "4", "auto", 0, 2000, "many"],
    "engine.latency_budget": [1000.0, -1.0],
    "engine.deadline": [2.0, 0.0],
    "engine.fifo": [0, 99],
    "engine.affinity": [[], [0], [1], [0, 1], [4000], [0, 4000], [-1]],
    "sink.output": [
        "{f}/out{n}", "{f}/out{n}.csv", "{f}/none/out", "{f}/folder", "{f}/out{n}/", "{f}/socket", f"{{f}}/{LONG}",
        "/dev/null", "/proc/x", "{f}/c.toml", "{f}/m.safetensors", "{f}/small.safetensors", "{f}/empty.csv", "-", "gopher://x",
        "tcp://127.0.0.1:1", "http://127.0.0.1/x", "unix:///run/x", "udp://h",
    ],
    "sink.format": ["ndjson", "csv", "text", "xml"],
    "sink.logits": [True],
    "sink.append": [True],
    "sink.rotate_bytes": [0, 100, -1],
    "sink.rotate_keep": [1, 2000],
    "sink.queue": [1, 0],
    "sink.overflow": ["wait", "drop-oldest", "burst"],
    "state.folder": ["{f}/state", "{f}/state/deep", "/proc/x", "{f}/empty.csv/state", f"{{f}}/{LONG}", "{f}/dangling"],
    "state.interval": [1.0, 0.0],
    "adaptive.members": [
        [], ["small.safetensors"], ["small.safetensors"] * 2, ["m.safetensors"], ["other.safetensors"],
        ["unpooled.safetensors"], ["damaged.safetensors"], ["none.safetensors"],
    ],
    "adaptive.max_misses": [0.5, 2.0],
    "adaptive.max_power": [5.0, -1.0],
    "adaptive.settle": [1.0, 0.0],
    "metrics.listen": [":0", "127.0.0.1:0", "here", ":70000", "a..b:80"],
    "metrics.prometheus": [True],
    "security.require_signature": [["none.pem"], ["empty.csv"]],
}  # fmt: skip
"""Values of keys, good and bad ones; {f} is the folder, and {n} a number that is new for every
example. Addresses on which an outcome would depend on the network are
left out."""
BASE = {
    "model.path": "m.safetensors",
    "source.input": "{f}/empty.csv",
    "engine.name": "reference",
    "engine.profile": "none",
    "sink.output": "{f}/out{n}",
}


class SourceOpened(Exception):
    """The run has come so far that it opens its source."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    networks = {
        "m": random_network(window=10, h=8),
        "small": random_network(window=10, h=4),
        "other": random_network(window=20, h=4),
        "rateless": random_network(window=10, h=4, rate=None),
        "unpooled": random_network(window=10, h=4, pooling="none", task="regression"),
        "unpooled-rateless": random_network(window=10, h=4, pooling="none", task="regression", rate=None),
    }
    for name, network in networks.items():
        artifact.save(folder / f"{name}.safetensors", network, {})
    (folder / "damaged.safetensors").write_bytes(b"\xff" * 100)
    for name in ("empty.csv", "empty.f32"):
        (folder / name).write_text("")
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    (folder / "dangling").symlink_to(folder / "nowhere")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "socket"))
        yield folder


@pytest.fixture(autouse=True)
def own_status_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_SSM_RUN", str(tmp_path))


@contextmanager
def on_cores(cores):
    """Let this process use these cores only; what a run changes of the process is undone."""
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, CORES)
        gc.unfreeze()


def written(folder, keys):
    sections = {}
    for key, value in keys.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(f"{name} = {json.dumps(value)}".replace("{f}", str(folder)))
    text = "".join(f"[{section}]\n" + "\n".join(lines) + "\n" for section, lines in sections.items())
    path = folder / "c.toml"
    path.write_text(text.replace("{n}", str(next(NUMBERS))))
    return str(path)


def executed(path):
    """The error of ``edge-ssm run --config``, or None; up to where it opens a source that does not end."""
    opened = service_run.open_source

    def open_source(text, spec, follow, is_paced):
        if text == "-" or "://" in text or follow:
            raise SourceOpened
        return opened(text, spec, follow, is_paced)

    service_run.open_source = open_source
    try:
        service_run.run(merge(settings_file.read(path), {}), path)
    except SourceOpened:
        return None
    except EdgeSSMError as error:
        return error
    finally:
        service_run.open_source = opened
    return None


@settings(max_examples=250)
@given(st.dictionaries(st.sampled_from(sorted(MUTATIONS)), st.integers(0, 1 << 16), max_size=5), st.sampled_from(CORES))
def test_a_check_accepts_what_a_run_accepts(folder, choices, core):
    keys = BASE | {key: MUTATIONS[key][number % len(MUTATIONS[key])] for key, number in choices.items()}
    path = written(folder, keys)
    with on_cores({core}):
        try:
            plan, refusal = check.check(path), None
        except EdgeSSMError as error:
            plan, refusal = None, error
        problem = executed(path)
    if refusal is not None:
        assert problem is not None, f"only the check refuses {keys}: {refusal}"
    elif problem is not None:
        # What may be otherwise by the time of the run, the check only warns of.
        assert plan.warnings, f"only the run refuses {keys}: {problem}"


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in MUTATIONS.items() for value in values])
def test_each_value_alone_is_accepted_by_both_or_by_neither(folder, key, value):
    test_a_check_accepts_what_a_run_accepts.hypothesis.inner_test(folder, {key: MUTATIONS[key].index(value)}, CORES[-1])


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_an_affinity_that_this_process_may_not_use_is_refused_by_both(folder):
    path = written(folder, BASE | {"engine.affinity": [CORES[0]]})
    told = []
    for arguments in (["service", "check", path], ["run", "--config", path]):
        command = ["taskset", "--cpu-list", str(CORES[1]), *COMMAND, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (2, "")
        told.append(done.stderr)
    assert all(f"--affinity [{CORES[0]}]: no such core, expected of [{CORES[1]}]" in text for text in told)


def test_a_plan_opens_and_changes_nothing(folder, tmp_path):
    keys = BASE | {
        "sink.output": f"{tmp_path}/out",
        "state.folder": f"{tmp_path}/state",
        "metrics.listen": ":0",
        "engine.affinity": [CORES[-1]],
    }
    before = os.sched_getaffinity(0), len(os.listdir("/proc/self/fd"))
    check.check(written(folder, keys))
    assert list(tmp_path.iterdir()) == []
    assert (os.sched_getaffinity(0), len(os.listdir("/proc/self/fd"))) == before
