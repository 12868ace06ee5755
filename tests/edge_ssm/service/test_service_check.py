"""``edge-ssm service check`` and what ``install`` refuses before it changes anything; the example configuration."""

import os
import re
import shutil
import socket
import sys
from contextlib import suppress

import pytest
from support import commands
from support.networks import random_network

from edge_ssm.errors import UsageError
from edge_ssm.formats import artifact
from edge_ssm.io.sinks import formats
from edge_ssm.io.sinks.file import FileSink
from edge_ssm.runtime.counters import Counters
from edge_ssm.service import check
from edge_ssm.service.systemd import install, units
from edge_ssm.telemetry import publisher

COMMAND = [sys.executable, "-c", "from edge_ssm.cli.app import main; main()"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    artifact.save(folder / "m.safetensors", random_network(window=10, h=16), {"data": "random"})
    artifact.save(folder / "small.safetensors", random_network(window=10, h=8), {"data": "random"})
    artifact.save(folder / "other.safetensors", random_network(window=20, h=8), {"data": "random"})
    (folder / "damaged.safetensors").write_bytes(b"\xff" * 100)
    for name in ("small.safetensors.sig", "k.pem"):
        (folder / name).write_text("a key")
    return folder


def configured(models, text):
    path = models / "a.toml"
    path.write_text(f'[model]\npath = "m.safetensors"\n{text}')
    return str(path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[source]\ninput = 'tcp://nowhere'", "line 4: source.input: tcp://nowhere: expected tcp://HOST:PORT"),
        ("[source]\ninput = 'smoke://x'", "line 4: source.input: smoke://x: 'smoke' is unknown"),
        ("[source]\ninput = '/tmp'", "line 4: source.input: /tmp: cannot be read (it is a directory)"),
        ("[source]\nfollow = true", "line 4: source.follow: only for a file; standard input ends where it ends"),
        ("[source]\nscale = '1,2,3'\nformat = 'i16le'", "line 4: source.scale: "),
        ("[source]\nscale = 'big'", "line 4: source.scale: --scale 'big': expected numbers"),
        ("[sink]\noutput = 'unix://host/x'", "line 4: sink.output: unix://host/x: expected unix:///PATH"),
        ("[sink]\nrotate_bytes = 100", "line 4: sink.rotate_bytes: only for a file"),
        ("[window]\nhop = 11", "line 4: window.hop: hop: 11 samples, expected 1 to the window's 10"),
        ("[engine]\nname = 'steam'", "line 4: engine.name: engine 'steam': unknown, expected auto, "),
        ("[engine]\nprofile = 'none-such'", "line 4: engine.profile: profile 'none-such': unknown"),
        ("[engine]\nchunk = 'auto'", "line 4: engine.chunk: --chunk auto: needs --latency-budget"),
        ("[engine]\nlatency_budget = 3.0", "line 4: engine.latency_budget: only with --chunk auto"),
        ("[engine]\naffinity = [99999]", "line 4: engine.affinity: --affinity [99999]: no such core"),
        ("[adaptive]\nmembers = ['damaged.safetensors']", "line 4: adaptive.members: "),
        ("[adaptive]\nmembers = ['other.safetensors']", "its windows or labels are not those of "),
        ("[adaptive]\nmembers = ['m.safetensors']", "m.safetensors, or is listed twice; expected a smaller model"),
        ("[adaptive]\nmembers = ['small.safetensors', 'small.safetensors']", "or is listed twice; expected a"),
        (
            "[engine]\nthreads = 4",
            "line 4: engine.threads: --threads 4: not for the engine auto; only onnx or tflite take",
        ),
        (
            "[engine]\nname = 'cpu'\nthreads = 4",
            "line 5: engine.threads: --threads 4: not for the engine cpu; only onnx or",
        ),
        (
            "[source]\ninput = 'tcp://h:1'\npace = true",
            "line 5: source.pace: only for a recording; tcp:// sets",
        ),
        ("[sink]\noutput = '{folder}/a.toml'", "line 4: sink.output: --output {folder}/a.toml: the run reads it"),
        (
            "[sink]\noutput = '{folder}/small.safetensors.sig'\n[adaptive]\nmembers = ['small.safetensors']",
            "the run reads",
        ),
        ("[sink]\noutput = '{folder}/k.pem'\n[security]\nrequire_signature = ['k.pem']", "k.pem: the run reads it"),
        (
            "[source]\ninput = 'mqtt://h/a?username=u&password_file={folder}/k.pem'\n[sink]\noutput = '{folder}/k.pem'",
            "k.pem: the run reads it",
        ),
        (
            "[source]\ninput = 'mqtt://h/a/#'\n[sink]\noutput = 'mqtt://h/a/b'",
            "line 6: sink.output: --output mqtt://h/a/b: the run reads it (mqtt://h/a/#)",
        ),
        (
            "[sink]\noutput = '/tmp'",
            "line 4: sink.output: /tmp: cannot be written (it is a directory); expected a file",
        ),
        ("[sink]\noutput = '/proc/x'", "line 4: sink.output: /proc/x: cannot be written (no new files in /proc)"),
        ("[state]\nfolder = '/proc/x'", "line 4: state.folder: /proc/x: snapshots cannot be kept there"),
        ("[adaptive]\nmembers = ['none.safetensors']", "none.safetensors: cannot be read (No such file or directory)"),
        ("[security]\nrequire_signature = ['no.pem']", "line 4: security.require_signature: "),
        ("[state]\nfolder = '/etc/passwd/s'", "line 4: state.folder: /etc/passwd/s: snapshots cannot be kept there"),
        ("[metrics]\nlisten = 'here'", "line 4: metrics.listen: listen 'here': expected HOST:PORT"),
        ("[metrics]\nprometheus = true", "line 4: metrics.prometheus: needs metrics.listen"),
        ("[gap]\npolicy = 'guess'", "line 4: gap.policy: 'guess', "),
        ('[source]\ninput = "a\\u0000b"', "line 4: source.input: 'a\\x00b': has a zero byte; expected a text"),
        ('[sink]\noutput = "a\\u0000b"', "line 4: sink.output: 'a\\x00b': has a zero byte"),
        ('[state]\nfolder = "a\\u0000b"', "line 4: state.folder: 'a\\x00b': has a zero byte"),
        ('[adaptive]\nmembers = ["a\\u0000b"]', "line 4: adaptive.members: 'a\\x00b': has a zero byte"),
        ("[source]\ninput = 'serial:///dev/a%00b'", "line 4: source.input: serial:///dev/a%00b: '/dev/a\\x00b': has a"),
        ("[sink]\noutput = 'tcp://a..b:80'", "line 4: sink.output: tcp://a..b:80: 'a..b' is not a host"),
        ("[metrics]\nlisten = 'a..b:80'", "line 4: metrics.listen: listen 'a..b:80': 'a..b' is not a host"),
    ],
)
def test_what_can_not_run_says_where(models, text, problem):
    if "mqtt" in text:
        pytest.importorskip("paho")
    path = configured(models, text.replace("{folder}", str(models)))
    with pytest.raises(UsageError, match=re.escape(problem.replace("{folder}", str(models)))) as caught:
        check.check(path)
    assert str(caught.value).startswith(path)


def test_a_damaged_model_is_refused_as_a_command_would(models):
    path = configured(models, "")
    (models / "b.toml").write_text('[model]\npath = "damaged.safetensors"\n')
    done = commands.run([*COMMAND, "service", "check", models / "b.toml"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"edge-ssm: error: {models}/b.toml, line 2: model.path: ")
    assert done.stderr.count("\n") == 1
    assert commands.run([*COMMAND, "service", "check", path], capture_output=True).returncode == 0


def test_what_will_run_and_what_it_needs(models):
    pytest.importorskip("serial")
    plan = check.check(
        configured(
            models,
            "[source]\ninput = 'serial:///dev/ttyUSB9?baud=9600'\n[sink]\noutput = 'tcp://10.0.0.1:9'\n"
            "[metrics]\nlisten = ':9464'\n[adaptive]\nmembers = ['small.safetensors']\n[window]\nhop = 5\n",
        )
    )
    assert plan.requirements == {"serial": "input", "network": "output", "loopback": "listen"}
    told = dict(line.split(maxsplit=1) for line in check.describe(plan).splitlines())
    assert told["windows"].startswith("10 samples, hop 5")
    assert told["source"] == "serial:///dev/ttyUSB9?baud=9600, csv"
    assert told["page"] == "127.0.0.1 port 9464"
    assert told["member"].startswith(f"{models}/small.safetensors, digest ")


def test_a_check_opens_nothing(models):
    """A named pipe without a writer would block it, a taken port would fail."""
    os.mkfifo(models / "pipe")
    plan = check.check(configured(models, f"[source]\ninput = '{models}/pipe'\n"))
    assert any("ends with its first writer" in warning.text for warning in plan.warnings)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        check.check(configured(models, f"[source]\ninput = 'tcp-listen://127.0.0.1:{port}'\n"))


@pytest.mark.parametrize("key", ["model.path", "adaptive.members", "security.require_signature"])
def test_a_named_pipe_for_a_file_does_not_hold_the_check_up(tmp_path, models, key):
    """``run`` refuses it at once."""
    os.mkfifo(tmp_path / "fifo")
    section, name = key.split(".")
    value = '"fifo"' if name == "path" else '["fifo"]'
    model = "" if name == "path" else f'[model]\npath = "{models}/m.safetensors"\n'
    (tmp_path / "a.toml").write_text(f"{model}[{section}]\n{name} = {value}\n")
    command = [*COMMAND, "service", "check", tmp_path / "a.toml"]
    done = commands.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert re.search(rf"line \d: {key}: .*fifo: not a regular file; expected ", done.stderr)


def on_a_terminal(*arguments):
    """What a terminal gets, where click lets escape sequences through."""
    terminal, end = os.openpty()
    done = commands.Process([*COMMAND, *arguments], stdin=end, stdout=end, stderr=end)
    os.close(end)
    parts = []
    with suppress(OSError):  # EIO: nobody has the other end any more
        while part := os.read(terminal, 1 << 16):
            parts.append(part)
    os.close(terminal)
    return done.wait(60), b"".join(parts).decode()


def test_names_can_not_move_the_terminals_cursor(models):
    """As paths in a configuration that somebody else wrote."""
    path = configured(models, '[source]\ninput = "a\\u001b[31mX\\nmodel"\n[sink]\noutput = "b\\u001b[31mX"\n')
    status, shown = on_a_terminal("service", "check", path)
    assert status == 0
    assert "a?[31mX?model: does not exist now" in shown
    assert "\nsink      b?[31mX" in shown
    assert "\x1b" not in shown


def test_what_a_run_tells_can_not_either(tmp_path):
    info = publisher.RunInfo("m\x1b[2J", "d", "cpu", 50.0, source="\x1b[31mX")
    formatter = formats.make("ndjson", FileSink(str(tmp_path / "out")), random_network(), False, False)
    told = publisher.StatusPublisher(formatter, info, Counters()).status()
    shown = units.in_words({"Id": "edge-ssm@x.service", "StatusText": "runs \x1b[2J"}, told)
    assert "\x1b" not in shown
    assert "  model     m?[2J, digest d" in shown


@pytest.mark.parametrize(
    ("text", "flags", "problem"),
    [
        ("[source]\ninput = 'tcp://10.0.0.1:9'", {}, "source.input: the service cannot reach it; add --network"),
        ("[source]\ninput = 'tcp://[::1]:9'", {}, "source.input: the service cannot reach it; add --loopback"),
        ("[source]\ninput = 'mqtt://broker.lan/a/+'", {}, "source.input: the service cannot reach it; add --network"),
        ("[sink]\noutput = 'mqtt://localhost/a'", {}, "sink.output: the service cannot reach it; add --loopback"),
        ("[sink]\noutput = 'http://10.0.0.1/a'", {}, "sink.output: the service cannot reach it; add --network"),
        (
            "[source]\ninput = '/dev/null'",
            {"socket": True},
            "source.input: does not listen; --socket is for tcp-listen",
        ),
        ("[source]\ninput = 'log.csv'", {}, "line 4: source.input: 'log.csv'; a service has no working folder"),
        ("[source]\ninput = '/home/x/log.csv'", {}, "line 4: source.input: '/home/x/log.csv'; hidden from the service"),
        ("[sink]\noutput = '/srv/d.ndjson'", {}, "the service may write below /var/lib/edge-ssm/wrist only"),
        ("[state]\nfolder = '/var/tmp'", {}, "the service keeps its state in /var/lib/edge-ssm/wrist, leave it out"),
        ("[adaptive]\nmembers = ['../{folder}/small.safetensors']", {}, "expected a path below the configuration's"),
        ("[adaptive]\nmembers = ['{models}/small.safetensors']", {}, "hidden from the service, put it beside"),
    ],
)
def test_what_the_sandbox_would_not_let_through_is_not_installed(models, tmp_path, text, flags, problem):
    if "mqtt" in text:
        pytest.importorskip("paho")
    path = configured(models, text.format(models=models, folder=models.name))
    with pytest.raises(UsageError, match=re.escape(problem)):
        install.install(install.Request("wrist", path, root=tmp_path, **flags), print)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_stays_where_it_is_must_be_readable_by_all(models, tmp_path):
    root = tmp_path / "root"
    (root / "opt/models").mkdir(parents=True)
    real = shutil.copy(models / "m.safetensors", root / "opt/models")
    path = tmp_path / "a.toml"
    path.write_text(f'[model]\npath = "{real}"\n')
    with pytest.raises(UsageError, match="hidden from the service, put it beside the configuration"):
        install.install(install.Request("wrist", str(path), root=root), print)
    for closed in (real, root / "opt/models"):
        mode = os.stat(closed).st_mode
        os.chmod(closed, 0o700)
        with pytest.raises(UsageError, match="the service's user cannot read it"):
            install.check_public(root, "/opt/models/m.safetensors", "model.path")
        os.chmod(closed, mode | 0o005)
    install.check_public(root, "/opt/models/m.safetensors", "model.path")


@pytest.mark.parametrize("name", ["", "Wrist", "9", "a b", "../x", "a" * 23, "wrist.left"])
def test_a_name_that_can_be_no_user(models, tmp_path, name):
    with pytest.raises(UsageError, match="expected a name of at most 22"):
        install.install(install.Request(name, configured(models, ""), root=tmp_path), print)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("systemd-sysusers") is None, reason="needs root and systemd")
def test_into_the_root_of_another_system(models, tmp_path):
    said = []
    request = install.Request("wrist", configured(models, ""), ("network", "gpu"), root=tmp_path)
    install.install(request, said.append)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir()}
    drop_ins = "etc/systemd/system/edge-ssm@wrist.service.d"
    assert {
        "etc/edge-ssm/wrist.toml",
        "etc/edge-ssm/m.safetensors",
        f"{drop_ins}/edge-ssm-network.conf",
        f"{drop_ins}/edge-ssm-gpu.conf",
        "etc/systemd/system/edge-ssm@.service",
        "etc/systemd/system/edge-ssm-compile.service",
        "etc/systemd/system/multi-user.target.wants/edge-ssm@wrist.service",
    } <= found
    assert any("its units look for edge-ssm in the usual folders" in line for line in said)
    again = install.Request("wrist", configured(models, "[gap]\nmax = 3\n"), root=tmp_path)
    with pytest.raises(UsageError, match="exists and differs from the new one"):
        install.install(again, said.append)
    install.uninstall("wrist", True, tmp_path, said.append)
    left = [path for path in tmp_path.rglob("*") if "edge-ssm" in path.name and not path.is_dir()]
    assert left == []
    assert list((tmp_path / "etc/edge-ssm").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("systemd-sysusers") is None, reason="needs root and systemd")
def test_a_file_that_can_not_be_written_takes_all_others_back(models, tmp_path):
    (tmp_path / "etc/edge-ssm").mkdir(parents=True)
    (tmp_path / "etc/edge-ssm/m.safetensors").mkdir()  # in the way
    with pytest.raises((UsageError, OSError, install.RunFailed)):
        install.install(install.Request("wrist", configured(models, ""), root=tmp_path, force=True), print)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and "edge-ssm" in path.name] == []


def test_without_root_it_says_so(models, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    request = install.Request("wrist", configured(models, ""), root=tmp_path)
    with pytest.raises(UsageError, match="service install: needs root; run it with sudo"):
        install.install(request, print)
    assert list(tmp_path.iterdir()) == []
