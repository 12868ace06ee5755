"""``edge-ssm profile`` without a sensor: the protocol, the report, its page, comparisons, and refusals."""

import json
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT, commands
from support.browser import browse
from support.networks import random_network, samples_for

from edge_ssm.engines.registry import ENGINES, create
from edge_ssm.errors import InputRefused
from edge_ssm.hardware import machine
from edge_ssm.histogram import LatencyHistogram
from edge_ssm.profiler import compare, protocol, report, report_html
from edge_ssm.profiler.energy import Energy
from edge_ssm.profiler.protocol import Workload
from edge_ssm.profiler.sampler import MeterDescription
from edge_ssm.telemetry import status_files

EXAMPLES = ROOT / "examples"
DEMO = EXAMPLES / "demo.safetensors"
CLI = [sys.executable, "-c", "from edge_ssm.cli.app import main; main()", "profile"]
QUICK = ["--quick", "--rounds", "2", "--block-seconds", "0.3", "--meter", "none"]


def profile(*arguments):
    command = [*CLI, *map(str, arguments)]
    return commands.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Reports of the demo on its own recording."""
    folder = tmp_path_factory.mktemp("reports")
    for name, engine in (("a", "cpu"), ("b", "reference")):
        done = profile(
            DEMO, *QUICK, "--engine", engine, "--input", EXAMPLES / "demo.csv",
            "--json", folder / f"{name}.json", "--html", folder / f"{name}.html",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    (folder / "text").write_text(done.stdout)
    return folder


@given(st.lists(st.integers(0, 1 << 45), max_size=50))
def test_recording_many_durations_equals_recording_them_one_by_one(durations):
    one, many = LatencyHistogram(), LatencyHistogram()
    for ns in durations:
        one.record(ns)
    many.record_many(np.array(durations, dtype=np.int64))
    assert (one._counts, one.count, one.max_ns) == (many._counts, many.count, many.max_ns)
    both = LatencyHistogram()
    both.add(one)
    both.add(many)
    assert both.count == 2 * one.count
    assert both.percentile_ns(50) == one.percentile_ns(50)
    assert sum(n for _, n in one.buckets()) == one.count


def test_a_histogram_can_be_limited_to_what_was_recorded_since():
    histogram = LatencyHistogram()
    for _ in range(10_000):
        histogram.record(1_000)
    earlier = histogram.copy()
    assert earlier.since(earlier).percentile_ns(99) == 0
    for _ in range(100):
        histogram.record(50_000)
    assert earlier.count == 10_000
    recent = histogram.since(earlier)
    assert recent.count == 100
    assert 50_000 <= recent.percentile_ns(99) <= 50_000 * 65 / 64
    assert histogram.percentile_ns(99) < 2_000


def test_a_report_has_the_documented_members(reports):
    found = json.loads((reports / "a.json").read_text())
    assert found["version"] == 2
    assert found["engine"] == "cpu"
    assert found["meter"] is None
    assert found["energy_per_step_uj"] is None  # what was not measured is not stated
    assert found["power_w"] == {}
    assert found["valid"] is True
    latency = found["latency_us"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["p999"] <= latency["max"]
    assert [r["name"] for r in found["results"]] == ["cpu", "cpu, at 50 Hz"]
    assert found["results"][1]["samples_per_s"] == pytest.approx(50, rel=0.15)
    assert found["models"][0]["digest"] in found["models"][0]["digest"]
    assert found["timer_ns"] < 5000
    text = (reports / "text").read_text()
    assert "power: not measured (no sensor; see edge-ssm doctor)" in text
    assert " W" not in re.sub(r"[A-Z]{2,}", "", text)


def test_the_page_is_self_contained(reports):
    text = (reports / "a.html").read_text()
    assert text.count("<svg") == text.count("</svg>") >= 1
    assert not re.search(r"(src|href)=|https?:|@import|url\(", text)
    assert "Power: not measured" in text

    class Numbers(HTMLParser):
        def handle_starttag(self, tag, attributes):
            for name, value in attributes:
                assert "nan" not in (value or "").lower(), (tag, name)

    Numbers().feed(text)


def test_a_browser_opens_the_page_and_draws_its_plots(reports, tmp_path):
    page, refused = browse((reports / "a.html").as_uri(), tmp_path)
    assert refused == []
    plot = re.search(r"<svg.*?</svg>", page, re.S)[0]  # without a sensor the latency's alone
    assert re.search(r"<(path|polyline) [^>]*(d|points)=.[^>]{100}", plot)
    assert "p99" in page


def test_the_page_draws_power_and_temperature(reports):
    """The same report with power, energy and temperatures in it."""
    found = report.load(reports / "a.json")
    energy = Energy(10, 4, 3.5, 4.5, 9, 11, False, 2)
    watts = {"VDD_IN": 5.0, "total": 5.0}
    results = [msgspec.structs.replace(r, energy_per_step_uj=energy, power_w=watts) for r in found.results]
    curves = report.Curves([0.0, 1.0], [4.0, 5.0], [0.0, 1.0], {"cpu": [40.0, 41.0]}, found.curves.blocks)
    whole = msgspec.structs.replace(
        found, meter=report.MeterInfo("hwmon", "the board", ["VDD_IN"], 0.04, 0.02), idle_w=watts, results=results,
        curves=curves, invalid_because=["<b>"],
    )  # fmt: skip
    text = report_html.render(whole)
    assert text.count("<svg") == 3
    assert "4 beyond idling (3.5 to 4.5)" in text
    assert "&lt;b&gt;" in text
    assert "not measured" not in text.replace("start", "")
    assert "4 beyond idling (3.5 to 4.5)" in report.render(whole)


def test_a_comparison_claims_no_more_than_the_intervals_show(reports):
    done = profile("--compare", reports / "a.json", reports / "b.json")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"latency A .* us .*, B .* us .*: (?:B is|no difference)", done.stdout)) == 2
    assert "energy  not measured in both" in done.stdout
    a = report.load(reports / "a.json")
    same = compare.compare(a, a)
    assert same.count("no difference that these runs can show") == 2

    def with_latency(us):
        latency = report.Percentiles(us, us, us, us, us)
        first = msgspec.structs.replace(
            a.results[0], latency_us=latency, latency_low_us=us * 0.9, latency_high_us=us * 1.1
        )
        return msgspec.structs.replace(a, results=[first])

    assert "B is 1.5 of A: worse" in compare.compare(with_latency(2), with_latency(3))
    assert "B is 0.667 of A: faster" in compare.compare(with_latency(3), with_latency(2))
    assert "no difference" in compare.compare(with_latency(3), with_latency(3.3))

    def with_energy(dynamic, low, high):
        energy = Energy(10, dynamic, low, high, 9, 11, low <= 0, 5)
        first = msgspec.structs.replace(a.results[0], energy_per_step_uj=energy)
        return msgspec.structs.replace(a, results=[first])

    assert "B is 0.5 of A: thriftier" in compare.compare(with_energy(4, 3.9, 4.1), with_energy(2, 1.9, 2.1))
    assert "no difference" in compare.compare(with_energy(4, 2, 6), with_energy(3, 1, 5)).split("energy")[1]
    assert "below resolution in both" in compare.compare(with_energy(1, -1, 3), with_energy(1, -1, 3))
    assert "not measured in B" in compare.compare(with_energy(4, 3, 5), a)
    invalid = msgspec.structs.replace(a, valid=False, invalid_because=["the machine throttled"])
    assert "verdict: none, because a run is invalid" in compare.compare(a, invalid)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"version": 2}', b"[" * 5000])
def test_anything_but_a_report_is_refused(tmp_path, content):
    path = tmp_path / "r.json"
    path.write_bytes(content)
    with pytest.raises(InputRefused, match=r"r\.json: not a report of edge-ssm profile --json"):
        report.load(path)
    with pytest.raises(InputRefused, match="cannot be read"):
        report.load(tmp_path / "none")


def workload(name="work", **options):
    network = random_network(h=4, pairs=2, layers=1)
    return Workload(name, create("reference", network), samples_for(network, 0, 64), **options)


def test_blocks_are_in_random_order_and_each_round_has_all():
    one, two = workload("one"), workload("two", rate_hz=200.0, deadline_s=0.005)
    run = protocol.run([one, two], None, rounds=6, block_s=0.05, seed=3)
    orders = [[b.kind for b in run.blocks if b.round == i] for i in range(6)]
    assert all(sorted(order) == ["idle", "one", "two"] for order in orders)
    assert len(set(map(tuple, orders))) > 1
    assert one.latency.count == one.steps == sum(b.steps for b in run.blocks if b.kind == "one")
    assert len(one.block_p50_us) == 6
    assert 0.5 * 6 * 0.05 * 200 <= two.steps <= 6 * 0.05 * 200
    assert run.trace is None


def test_a_run_ends_although_its_meter_keeps_failing():
    class Failing:
        meter = MeterDescription("flaky", [], [], "", 0.1)
        stopped = 0

        def failure(self):
            return "flaky: gone"

        def stop(self):
            Failing.stopped += 1

    run = protocol.run([workload()], Failing(), 2, 0.02, next_sampler=Failing)
    assert Failing.stopped == 3
    assert run.trace is None
    assert [note.endswith("continued with flaky") for note in run.notes] == [True, True, False]


def test_a_late_paced_step_is_a_miss_and_none_is_left_out():
    slow = workload(rate_hz=100.0, deadline_s=0.010)
    step = slow.engine.step
    slow.engine.step = lambda *a: (time.sleep(0.02), step(*a))[1]  # twice as long as there is time for
    run = protocol.run([slow], None, rounds=2, block_s=0.2)
    assert slow.misses == slow.latency.count > 10
    assert slow.late.max_ns > 100e6  # it falls further and further behind
    assert not run.invalid


def test_a_machine_that_changes_makes_the_run_invalid(monkeypatch):
    first = machine.state()
    states = iter([first] * 4)
    changed = msgspec.structs.replace(first, governor="powersave", power_mode="7W", throttle_alerts=1)
    monkeypatch.setattr(machine, "state", lambda: next(states, changed))
    run = protocol.run([workload()], None, rounds=2, block_s=0.02)
    assert any("the power mode changed from None to 7W" in why for why in run.invalid)
    assert any("throttled" in why for why in run.invalid)
    assert machine.changes(first, first) == []
    hotter = msgspec.structs.replace(first, throttle_count=first.throttle_count + 1, max_mhz=[100.0])
    assert len(machine.changes(first, hotter)) == 2


@pytest.mark.slow
def test_an_invalid_run_has_exit_status_1(tmp_path):
    code = (
        "from edge_ssm.hardware import machine\n"
        "n = iter(range(99)); real = machine.state\n"
        "import msgspec\n"
        "machine.state = lambda: msgspec.structs.replace(real(), max_mhz=[1000.0 + next(n)])\n"
        "from edge_ssm.cli.app import main; main()"
    )
    command = [sys.executable, "-c", code, "profile", DEMO, *QUICK, "--no-paced", "--json", tmp_path / "r.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "INVALID: in round 1 the allowed clocks changed" in done.stdout
    assert done.stderr.startswith("edge-ssm: error: the machine changed while it was measured")
    assert json.loads((tmp_path / "r.json").read_text())["valid"] is False


@pytest.mark.slow
def test_sweeps_and_all_engines_are_rounds_of_one_run(tmp_path):
    done = profile(DEMO, *QUICK, "--sweep", "chunk,lanes", "--engine", "cpu", "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert len(results) == 12
    assert {(r["chunk"], r["lanes"]) for r in results} == {(c, n) for c in (1, 4, 16, 64) for n in (1, 4, 16)}
    done = profile(DEMO, *QUICK, "--engines", "all", "--no-paced", "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    engines = {r["engine"] for r in found["results"]}
    assert {"cpu", "reference"} <= engines
    for name in set(ENGINES) - engines:  # each that is left out, with its reason
        assert [note for note in found["notes"] if note.startswith(f"left out: engine {name!r}: ")], name
        assert f"note: left out: engine {name!r}: " in done.stdout
    assert len(found["notes"]) == len(set(found["notes"]))


@pytest.mark.slow
def test_a_family_is_several_models(tmp_path):
    other = tmp_path / "other.safetensors"
    other.write_bytes(DEMO.read_bytes())
    done = profile(DEMO, other, *QUICK, "--sweep", "family", "--engine", "cpu")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^demo cpu .*^other cpu ", done.stdout, re.MULTILINE | re.DOTALL)
    same = tmp_path / "demo.safetensors"
    same.write_bytes(DEMO.read_bytes())
    done = profile(DEMO, same, *QUICK, "--sweep", "family", "--engine", "cpu")
    assert done.returncode == 2
    assert "another model has the same file name" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, "MODEL: missing; give an artifact, or --compare, or --step-table"),
        (["none.safetensors"], 2, "none.safetensors"),
        ([DEMO, "--meter", "watt"], 2, "--meter 'watt': unknown"),
        ([DEMO, "--meter", "battery"], 1, "battery: "),
        ([DEMO, "--sweep", "all"], 2, "--sweep 'all': expected chunk, lanes, family"),
        ([DEMO, "--sweep", "family"], 2, "--sweep family: give several MODELs"),
        ([DEMO, "--chunk", "0"], 2, "--chunk '0': expected numbers from 1 to 4096"),
        ([DEMO, "--lanes", "two"], 2, "--lanes 'two'"),
        ([DEMO, "--profile", "pi"], 2, "profile 'pi': unknown; edge-ssm boards list"),
        ([DEMO, "--engine", "gpu"], 2, "engine 'gpu': unknown"),
        ([DEMO, "--input", "none.csv"], 2, "none.csv: cannot be read"),
        ([DEMO, "--input", "/dev/null"], 2, "/dev/null: not a regular file"),
        ([DEMO, "--rounds", "1"], 2, "--rounds"),
        ([DEMO, "--step-table", "t.json"], 2, "--step-table: measures networks of its own"),
        ([DEMO, "--json", "/nowhere/r.json"], 2, "/nowhere/r.json: its folder is missing"),
        ([DEMO, "--html", "/tmp"], 2, "/tmp: is a folder"),
        ([DEMO, "--json", "/proc/x"], 2, "/proc/x: cannot be written"),
        ([DEMO, "--json", ""], 2, "'--json': an empty text"),
        ([DEMO, "--html", ""], 2, "'--html': an empty text"),
        ([DEMO, "--sweep", ""], 2, "'--sweep': an empty text"),
        ([DEMO, "--sweep", "chunk", "--chunk", "2"], 2, "--sweep chunk: measures several; leave out --chunk"),
        ([DEMO, "--sweep", "lanes", "--lanes", "2"], 2, "--sweep lanes: measures several; leave out --lanes"),
        ([DEMO, "--sweep", "lanes", "--paced"], 2, "--sweep: runs back to back; leave out --paced"),
        ([DEMO, "--chunk", "1,1"], 2, "--chunk '1,1': 1 appears twice"),
        ([DEMO, "--lanes", "2,1,2"], 2, "--lanes '2,1,2': 2 appears twice"),
        ([DEMO, "--engine", "cpu,cpu"], 2, "--engine 'cpu,cpu': cpu appears twice"),
        ([DEMO, "--engine", "all,cpu"], 2, "--engine 'all,cpu': all stands by itself"),
        (["--step-table", "t.json", "--json", "j"], 2, "on one engine; leave out --json"),
        (["--step-table", "/proc/x"], 2, "/proc/x: cannot be written"),
        (["--step-table", "t.json", "--engine", "all"], 2, "--step-table: takes one engine, not 'all'"),
        (["--compare", "a.json", "b.json"], 2, "a.json: cannot be read"),
        (["--compare", "a.json", "b.json", "c.json"], 2, "two reports and nothing else; leave out MODEL"),
        (["--compare", "a.json", "b.json", "--json", "z.json"], 2, "nothing else; leave out --json"),
        (["--compare", "a.json", "b.json", "--quick"], 2, "nothing else; leave out --quick"),
    ],
)
def test_wrong_use_is_one_line(arguments, status, said):
    done = profile(*arguments)
    assert done.returncode == status, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("edge-ssm: error: ")
    assert said in line


SHORT = [*QUICK[1:], "--no-paced", "--engine", "reference"]


def test_an_output_that_is_an_input_or_another_output_is_refused_before_minutes_are_spent(tmp_path):
    model, recording, link, hard = (tmp_path / name for name in ("m.safetensors", "r.csv", "link", "hard"))
    model.write_bytes(DEMO.read_bytes())
    recording.write_bytes((EXAMPLES / "demo.csv").read_bytes())
    link.symlink_to(model)
    hard.hardlink_to(recording)
    os.mkfifo(tmp_path / "pipe")
    for arguments, said in (
        (["--json", model], f"is MODEL {model} too, which would be lost"),
        (["--html", link], f"is MODEL {model} too, which would be lost"),
        (["--json", recording, "--input", recording], "is --input too"),
        (["--html", hard, "--input", recording], "is --input too"),
        (["--json", tmp_path / "new", "--html", f"{tmp_path}/../{tmp_path.name}/new"], "is --json too"),
        (["--json", tmp_path / "pipe", "--html", tmp_path / "pipe"], "is --json too"),
    ):
        begin = time.monotonic()
        done = profile(model, "--rounds", 9, "--meter", "none", *arguments)
        assert time.monotonic() - begin < 20
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert said in line
    assert model.read_bytes() == DEMO.read_bytes()
    assert recording.read_bytes() == (EXAMPLES / "demo.csv").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hard", "link", "m.safetensors", "pipe", "r.csv"]


@pytest.mark.slow
def test_outputs_go_through_links_and_to_standard_output(tmp_path):
    (tmp_path / "link").symlink_to("far.json")
    with open(tmp_path / "out", "wb") as out:
        arguments = [DEMO, *SHORT, "--json", tmp_path / "link", "--html", "/dev/stdout"]
        done = commands.run([*CLI, *map(str, arguments)], stdout=out, stderr=subprocess.PIPE, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "far.json").read_text())["valid"] is True
    text = (tmp_path / "out").read_text()
    assert text.startswith("<!doctype html>")
    assert "note: 2 rounds of 0.3 s" in text
    done = profile(DEMO, *SHORT, "--json", "/dev/null", "--html", "/dev/null")
    assert done.returncode == 0, done.stderr
    assert not Path("/dev/null").is_file()


def test_a_full_disk_fails_the_run_but_loses_no_other_output(tmp_path):
    (tmp_path / "full").symlink_to("/dev/full")
    done = profile(DEMO, *SHORT, "--json", tmp_path / "full", "--html", tmp_path / "page.html")
    assert done.returncode == 1
    assert done.stderr == f"edge-ssm: error: {tmp_path / 'full'}: cannot be written (No space left on device)\n"
    assert "samples/s" in done.stdout
    assert "<svg" in (tmp_path / "page.html").read_text()


def test_profiles_are_listed_and_shown():
    command = [*CLI[:-1], "profiles"]
    done = commands.run([*command, "list"], capture_output=True, text=True, timeout=60)
    assert len(done.stdout.splitlines()) >= 30
    done = commands.run([*command, "show", "orin-nano-8gb-super-25w"], capture_output=True, text=True, timeout=60)
    assert "6 cores at 1344 MHz" in done.stdout
    assert "nvpmodel_p3767_0003_super.conf" in done.stdout
    if os.uname().machine == "x86_64":
        done = commands.run([*command, "detect"], capture_output=True, text=True, timeout=60)
        assert done.stdout == "generic-x86-64\n"


@pytest.fixture
def running(tmp_path, monkeypatch):
    """A run of the demo that lasts until its input is closed, and its status folder."""
    monkeypatch.setenv("EDGE_SSM_RUN", str(tmp_path / "status"))
    command = [*CLI[:-1], "run", str(DEMO), "--stream", "--engine", "reference", "--output", str(tmp_path / "out")]
    process = commands.Process(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    rows = (EXAMPLES / "demo.csv").read_bytes().splitlines(keepends=True)
    process.stdin.write(b"".join(rows[:401]) + b"bad\n" + rows[402])
    process.stdin.flush()
    yield process, tmp_path / "status"
    process.stdin.close()
    process.wait(30)


def top(*arguments):
    done = commands.run([*CLI[:-1], "top", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_top_shows_a_run_until_it_ends(running):
    process, folder = running
    until = time.monotonic() + 30
    while time.monotonic() < until:
        found = json.loads(top("--json"))
        if found and found[0]["samples"] == 401:
            break
    (status,) = found
    assert status["pid"] == process.pid
    assert (status["decisions"], status["dropped"]["malformed"]) == (2, 1)
    text = top("--once")
    assert f"pid {process.pid}, engine reference" in text
    assert "decisions  2 (" in text
    assert re.search(r"step +p50 \d+\.\d us", text)
    assert "power        " in text
    process.stdin.close()
    assert process.wait(30) == 0
    assert list(folder.iterdir()) == []
    assert "no run is visible here" in top()


def test_top_skips_files_that_are_no_status(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_SSM_RUN", str(tmp_path))
    for name, content in (("1.status", b""), ("2.status", b"\xff"), ("3.status", b"{}"), ("4.status", b"[" * 9999)):
        (tmp_path / name).write_bytes(content)
    assert json.loads(top("--json")) == []


def test_a_folder_that_others_could_write_to_is_not_used(tmp_path, monkeypatch):

    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    assert not status_files.is_private(shared)
    assert status_files.is_private(tmp_path / "own")
    (tmp_path / "link").symlink_to(tmp_path / "own")
    assert not status_files.is_private(tmp_path / "link")
