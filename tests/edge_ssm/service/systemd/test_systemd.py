"""The units under a real systemd, installed by ``edge-ssm service install`` as on a device."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import chain, combinations

import pytest
from support import real_systemd
from support.waiting import until

from edge_ssm.service.systemd import install

# One manager serves the file's tests in turn: they run together, or not at all.
pytestmark = pytest.mark.slow

WINDOW = 200
COMMAND = [sys.executable, "-c", "from edge_ssm.cli.app import main; main()"]
UNIT = "edge-ssm@wrist"

analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
booted = pytest.mark.skipif(bool(real_systemd.why_not()), reason=real_systemd.why_not() or "none")


@analyze
@pytest.mark.parametrize("openings", list(chain.from_iterable(combinations(install.PERMISSIONS, n) for n in range(6))))
def test_exposure(openings, tmp_path):
    """1.5 or less, with the GPU 2.5 or less, whatever the configuration needs."""
    drop_ins = tmp_path / "edge-ssm@.service.d"
    drop_ins.mkdir()
    for opening in openings:
        shutil.copy(install.folder() / f"edge-ssm-{opening}.conf", drop_ins)
    service = shutil.copy(install.folder() / "edge-ssm@.service", tmp_path)
    threshold = 25 if "gpu" in openings else 15
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", f"--threshold={threshold}", service],
        capture_output=True,
        text=True,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )
    assert done.returncode == 0, done.stdout[-100:]


@analyze
def test_exposure_of_the_compiler():
    unit = install.folder() / "edge-ssm-compile.service"
    subprocess.run(["systemd-analyze", "security", "--offline=yes", "--threshold=15", unit], check=True)


@pytest.fixture(scope="module")
def rows(demo_stream):
    """Lines of the demo's recording, the header first, each with a sequence number and without its label."""
    header, *lines = demo_stream.read_text().splitlines()
    width = len(header.split(",")) - 1
    assert header.endswith(",label")
    cut = [",".join(line.split(",")[:width]) for line in (header, *lines)]
    return [f"seq,{cut[0]}\n", *(f"{i},{row}\n" for i, row in enumerate(cut[1:]))]


@pytest.fixture(scope="module")
def labels(rows, demo_model):
    """What the stream's first windows are, by a plain run."""
    done = subprocess.run(
        [*COMMAND, "run", demo_model, "--output-format", "ndjson"],
        input="".join(rows[: 1 + 16 * WINDOW]),
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line)["label"] for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    with real_systemd.system_manager(tmp_path_factory.mktemp("systemd")) as manager:
        yield manager


class Instance:
    """Installed as a user would, with times that suit a test."""

    def __init__(self, manager, demo_model, name, source, *flags, more=""):
        self.manager, self.name, self.unit = manager, name, f"edge-ssm@{name}"
        self.decided = f"/var/lib/edge-ssm/{name}/decisions.ndjson"
        place = manager.path(f"/srv/{name}")
        place.mkdir(parents=True)
        shutil.copy(demo_model, place / f"{name}.safetensors")
        (place / "a.toml").write_text(
            f'[model]\npath = "{name}.safetensors"\n[source]\ninput = "{source}"\n{more}'
            f'[sink]\noutput = "{self.decided}"\n[state]\ninterval = 0.2\n'
        )
        drop_in = manager.path(f"/etc/systemd/system/{self.unit}.service.d")
        drop_in.mkdir(parents=True)
        (drop_in / "quick.conf").write_text("[Service]\nWatchdogSec=2\nRestartSec=100ms\nTimeoutAbortSec=1\n")
        self.said = manager.edge_ssm("service", "install", name, "--config", f"/srv/{name}/a.toml", *flags).stdout

    def show(self, name):
        return self.manager.show(self.unit, name)

    def lines(self):
        path = self.manager.path(f"/var/lib/private/edge-ssm/{self.name}/decisions.ndjson")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def decisions(self):
        return [line for line in self.lines() if "label" in line]

    def events(self, name):
        return [line for line in self.lines() if line.get("event") == name]

    def wait_for(self, decisions):
        until(lambda: len(self.decisions()) >= decisions, f"{decisions} decisions, {self.manager.journal()}")

    def restarted(self, times):
        until(
            lambda: (self.show("NRestarts"), self.show("ActiveState")) == (str(times), "active"),
            f"{times} restarts, {self.manager.journal()}",
        )


@pytest.fixture(scope="module")
def wrist(manager, demo_model):
    fifo = manager.path("/srv/sensor")
    os.mkfifo(fifo)
    fifo.chmod(0o666)
    wrist = Instance(manager, demo_model, "wrist", "/srv/sensor", more="follow = true\n")
    with fifo.open("w") as wrist.sensor:
        yield wrist


def send(instance, rows, first, last):
    """Samples ``first`` to ``last`` - 1, and the header before the very first."""
    instance.sensor.writelines(rows[first + (first > 0) : last + 1])
    instance.sensor.flush()


@booted
def test_a_fresh_device_compiles_for_itself_and_streams(wrist, manager, rows, labels):
    assert "edge-ssm@wrist.service: started" in wrist.said
    kernels = list(manager.path("/var/cache/edge-ssm").glob("*.kernel"))
    assert len(kernels) == 1
    assert kernels[0].stat().st_uid == 0
    until(lambda: "engine cpu\n" in manager.edge_ssm("service", "status", "wrist").stdout, "the compiled engine")
    assert wrist.show("MemoryDenyWriteExecute") == "yes"
    assert wrist.show("ActiveState") == "active"  # Type=notify: READY was seen
    configured = manager.path("/etc/edge-ssm/wrist.toml").stat()
    assert configured.st_mode & 0o777 == 0o640
    assert configured.st_gid != 0
    send(wrist, rows, 0, 5 * WINDOW + 90)
    wrist.wait_for(5)
    assert [decision["label"] for decision in wrist.decisions()] == labels[:5]


@booted
def test_verify_is_silent(wrist, manager):
    units = ["multi-user.target.wants/edge-ssm@wrist.service", "edge-ssm@.socket", "edge-ssm-compile.service"]
    done = manager.run("systemd-analyze", "verify", "--man=no", *(f"/etc/systemd/system/{unit}" for unit in units))
    assert (done.stdout, done.stderr) == ("", "")


@booted
def test_status_in_words(wrist, manager):
    until(lambda: "decided   5" in manager.edge_ssm("service", "status", "wrist").stdout, "its own words")
    told = manager.edge_ssm("service", "status").stdout
    assert told.startswith("edge-ssm@wrist.service: active (running), process ")
    assert "at boot   started" in told
    assert "source    /srv/sensor, flowing; 1090 samples" in told
    refused = manager.edge_ssm("service", "status", "none", check=False)
    assert refused.returncode == 2
    assert "edge-ssm@none.service: neither enabled nor running" in refused.stderr


@booted
def test_killed_it_goes_on_in_the_open_window(wrist, manager, rows, labels):
    time.sleep(0.5)  # the snapshot's interval, twice
    manager.kill(UNIT, signal.SIGKILL)
    wrist.restarted(1)
    send(wrist, rows, 5 * WINDOW + 90, 8 * WINDOW + 90)
    wrist.wait_for(8)
    assert [line["index"] for line in wrist.decisions()] == list(range(8))
    assert [line["label"] for line in wrist.decisions()] == labels[:8]
    assert [line["start"] for line in wrist.decisions()] == list(range(0, 8 * WINDOW, WINDOW))
    assert len(wrist.events("resumed")) == 1


@booted
def test_frozen_it_is_killed_by_the_watchdog_and_goes_on(wrist, manager, rows, labels):
    time.sleep(0.5)
    manager.kill(UNIT, signal.SIGSTOP)
    wrist.restarted(2)
    assert "Watchdog timeout" in manager.journal()
    send(wrist, rows, 8 * WINDOW + 90, 10 * WINDOW)
    wrist.wait_for(10)
    assert [line["label"] for line in wrist.decisions()] == labels[:10]


@booted
def test_reload_takes_a_new_model_over_and_refuses_a_bad_one(wrist, manager, rows):
    model, before = manager.path("/etc/edge-ssm/wrist.safetensors"), wrist.show("MainPID")
    good = model.read_bytes()
    model.write_bytes(good[:1000])
    manager.run("systemctl", "reload", UNIT)
    until(lambda: wrist.events("reload_failed"), "a refused model")
    assert "a new model was refused" in wrist.show("StatusText")
    model.write_bytes(good)
    manager.run("systemctl", "reload", UNIT)
    until(lambda: wrist.events("reloaded"), "a model taken over")
    send(wrist, rows, 10 * WINDOW, 11 * WINDOW)
    wrist.wait_for(11)
    assert wrist.show("MainPID") == before


@booted
def test_a_refused_configuration_is_not_tried_again(wrist, manager):
    path = manager.path("/etc/edge-ssm/wrist.toml")
    good = path.read_text()
    path.write_text(good.replace("interval = 0.2", "interval = -1"))
    assert manager.run("systemctl", "restart", UNIT, check=False).returncode != 0
    time.sleep(0.5)
    assert (wrist.show("ActiveState"), wrist.show("NRestarts")) == ("failed", "0")
    told = manager.edge_ssm("service", "status", "wrist").stdout
    assert "last end  it ended with status 2" in told
    assert "it is not tried again until it is started" in told
    assert "error: /etc/edge-ssm/wrist.toml, line 9: state.interval: '-1', expected float > 0.0" in manager.journal()
    path.write_text(good)
    manager.run("systemctl", "restart", UNIT)
    assert wrist.show("ActiveState") == "active"


@booted
def test_a_configuration_that_differs_is_not_overwritten(wrist, manager):
    source = manager.path("/srv/wrist/a.toml")
    source.write_text(source.read_text() + "[gap]\npolicy = 'skip'\n")
    again = ("service", "install", "wrist", "--config", "/srv/wrist/a.toml", "--no-start")
    refused = manager.edge_ssm(*again, check=False)
    assert refused.returncode == 2
    assert "/etc/edge-ssm/wrist.toml: exists and differs from the new one; --force" in refused.stderr
    manager.edge_ssm(*again, "--force")
    assert "skip" in manager.path("/etc/edge-ssm/wrist.toml").read_text()


CONNECT = """
import socket, sys
s = socket.create_connection(("127.0.0.1", 9001), 10) if sys.argv[1] == "tcp" else socket.socket(socket.AF_UNIX)
if sys.argv[1] != "tcp":
    s.connect(sys.argv[1])
s.sendall(sys.stdin.buffer.read())
"""


def connect(manager, where, rows):
    manager.run("/opt/edge-ssm/bin/python", "-c", CONNECT, where, stdin="".join(rows))


@booted
@pytest.mark.parametrize(
    ("name", "source", "where"),
    [("ankle", "tcp-listen://127.0.0.1:9001", "tcp"), ("elbow", "unix-listen:///run/elbow.sock", "/run/elbow.sock")],
)
def test_a_socket_of_systemd_reaches_a_closed_service(manager, demo_model, rows, labels, name, source, where):
    """Without a network of its own; and a sensor that connects while the service is dead is not refused."""
    instance = Instance(manager, demo_model, name, source, "--socket")
    assert instance.show("PrivateNetwork") == "yes"
    connect(manager, where, rows[: 1 + WINDOW])
    instance.wait_for(1)
    manager.run("systemctl", "stop", instance.unit)
    connect(manager, where, [rows[0], *rows[1 + WINDOW : 1 + 2 * WINDOW]])  # starts it
    instance.wait_for(2)
    assert [line["label"] for line in instance.decisions()] == labels[:2]
    manager.edge_ssm("service", "uninstall", name, "--purge")


@booted
def test_loopback_is_reached_through_its_drop_in(manager, demo_model, rows):
    instance = Instance(manager, demo_model, "knee", "tcp-listen://127.0.0.1:9001", "--loopback")
    connect(manager, "tcp", rows[: 1 + WINDOW])
    instance.wait_for(1)
    assert "0.0.0.0/0" in instance.show("IPAddressDeny")
    manager.edge_ssm("service", "uninstall", "knee", "--purge")


@booted
def test_uninstalled_nothing_is_left(wrist, manager):
    done = manager.edge_ssm("service", "uninstall", "wrist")
    assert "removed" in done.stdout
    assert manager.path("/etc/edge-ssm/wrist.toml").exists()
    manager.edge_ssm("service", "uninstall", "wrist", "--purge")
    left = [path for folder in ("etc", "var") for path in manager.path(folder).rglob("*wrist*")]
    assert [path for path in left if "journal" not in str(path)] == []
    assert not manager.path("/etc/systemd/system/edge-ssm@.service").exists()


class Watched:
    """A plain run that takes this test for its service manager."""

    def __init__(self, folder, *arguments, stdin=None):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(folder / "notify"))
        self.socket.settimeout(20)
        self.run = subprocess.Popen(
            [*COMMAND, "run", *arguments],
            env={**os.environ, "NOTIFY_SOCKET": str(folder / "notify"), "WATCHDOG_USEC": "400000"},
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        while not self.socket.recv(4096).startswith(b"READY=1"):
            pass
        return self

    def __exit__(self, *_):
        self.run.kill()
        self.run.communicate()
        self.socket.close()

    def longest_silence(self, seconds):
        """Between two pings within so many seconds, or until the run ends."""
        longest, last, end = 0.0, time.monotonic(), time.monotonic() + seconds
        while time.monotonic() < end and (got := self.socket.recv(4096)) != b"STOPPING=1":
            if got == b"WATCHDOG=1":
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
        return max(longest, time.monotonic() - last)


def test_a_loop_that_waits_for_its_reader_feeds_the_watchdog_and_ends(demo_model, demo_stream, tmp_path):
    """Its queue is full and sink.overflow is wait: that is not stuck. SIGTERM ends it all the same."""
    sink = ["--output", f"unix://{tmp_path}/none", "--queue=2", "--overflow=wait"]
    with Watched(tmp_path, demo_model, "--input", demo_stream, *sink) as watched:
        assert watched.longest_silence(2) < 1.5
        watched.run.send_signal(signal.SIGTERM)
        _, told = watched.run.communicate(timeout=20)
        assert watched.run.returncode == 0
        assert "ended by signal" in told


def test_a_loop_that_fills_a_long_gap_feeds_the_watchdog(demo_model, rows, tmp_path):
    (tmp_path / "jump.csv").write_text("".join([*rows[:300], f"400000,{rows[300].partition(',')[2]}"]))
    arguments = ["--input", tmp_path / "jump.csv", "--max-gap", "1000000", "--engine", "cpu"]
    with Watched(tmp_path, demo_model, *arguments) as watched:
        assert watched.longest_silence(60) < 1.5
        _, told = watched.run.communicate(timeout=20)
        assert "399701 lost" in told, told
