"""Reports: what they state, which ones are refused, and what a comparison may claim."""

import json
import re
import subprocess
import sys

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT, commands
from support.networks import random_network, samples_for

from edge_ssm.engines.registry import create
from edge_ssm.errors import InputRefused
from edge_ssm.histogram import LatencyHistogram
from edge_ssm.profiler import compare, protocol, report, report_html
from edge_ssm.profiler.energy import Energy
from edge_ssm.profiler.protocol import Workload

DEMO = ROOT / "examples" / "demo.safetensors"
CLI = [sys.executable, "-c", "from edge_ssm.cli.app import main; main()", "profile"]
SHORT = ["--rounds", "2", "--block-seconds", "0.3", "--meter", "none", "--engine", "cpu"]


def profile(*arguments):
    return commands.run([*CLI, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A report with a paced workload, as text, page and JSON."""
    folder = tmp_path_factory.mktemp("reports")
    done = profile(DEMO, *SHORT, "--json", folder / "a.json", "--html", folder / "a.html")
    assert done.returncode == 0, done.stderr
    (folder / "text").write_text(done.stdout)
    return folder


@pytest.fixture
def a(folder):
    return report.load(folder / "a.json")


def replaced(found, **of_first):
    return msgspec.structs.replace(found, results=[msgspec.structs.replace(found.results[0], **of_first)])


def with_latency(found, us, low, high):
    return replaced(found, latency_us=report.Percentiles(us, us, us, us, us), latency_low_us=low, latency_high_us=high)


# --- what is stated ---------------------------------------------------------------------------------------------------


def test_a_percentile_is_stated_if_ten_calls_took_longer():
    def found(calls):
        histogram = LatencyHistogram()
        histogram.record_many(np.arange(1, calls + 1) * 1000)
        p = report.percentiles(histogram)
        return [name for name in ("p90", "p99", "p999") if getattr(p, name) is not None], p

    assert found(99)[0] == []
    assert found(100)[0] == ["p90"]
    assert found(999)[0] == ["p90"]
    assert found(1000)[0] == ["p90", "p99"]
    assert found(9999)[0] == ["p90", "p99"]
    assert found(10000)[0] == ["p90", "p99", "p999"]
    assert found(147)[1].p50 == pytest.approx(74, rel=0.016)
    assert found(147)[1].max == 147


def test_what_was_not_measured_is_not_stated(folder):
    """30 paced calls have no p99, and without a deadline the number of misses is unknown, not 0."""
    back_to_back, paced = json.loads((folder / "a.json").read_text())["results"]
    assert back_to_back["deadline_us"] is None
    assert back_to_back["deadline_misses"] is None
    assert paced["deadline_misses"] is not None
    assert paced["samples"] < 100
    assert (paced["latency_us"]["p90"], paced["latency_us"]["p999"], paced["jitter_us"]) == (None, None, None)
    assert paced["late_us"]["p99"] is None
    (row,) = [line for line in (folder / "text").read_text().splitlines() if line.startswith("cpu, at 50 Hz")]
    assert row.split()[-4:-1] == ["-", "-", "-"]
    assert "<td>-<td>-<td>-" in (folder / "a.html").read_text()


def test_short_rounds_are_marked_in_every_output(folder):
    said = "2 rounds of 0.3 s, fewer or shorter than the default of 5 rounds of 10 s"
    assert said in (folder / "text").read_text()
    assert "(short)" in (folder / "text").read_text()
    assert f"Short: {said}" in (folder / "a.html").read_text()
    assert any(said in note for note in json.loads((folder / "a.json").read_text())["notes"])
    assert profile("--compare", folder / "a.json", folder / "a.json").stdout.count(f"short: {said}") == 2


def test_rounds_with_equal_medians_have_an_interval_nonetheless():
    network = random_network(h=4, pairs=2, layers=1)
    workload = Workload("work", create("reference", network), samples_for(network, 0, 64))
    run = protocol.run([workload], None, rounds=2, block_s=0.02)
    workload.block_p50_us[:] = [100.0, 100.0, 100.0, 100.0, 100.0]
    found = report.make_result(workload, run)
    assert found.latency_high_us >= 100 * (1 + 1 / 64)
    assert found.latency_low_us <= 100 * (1 - 1 / 64)
    assert found.latency_low_us <= found.latency_us.p50 <= found.latency_high_us


# --- what a comparison may say ----------------------------------------------------------------------------------------


def test_a_difference_as_small_as_between_equal_runs_gets_no_verdict(a):
    said = compare.compare(with_latency(a, 100.0, 99.0, 101.0), with_latency(a, 108.0, 107.0, 109.0))
    assert "B is 1.08 of A: runs at different times differ by that much (up to 10 %)" in said
    assert not {"faster", "worse"} & set(said.replace(":", " ").split())
    assert "B is 1.2 of A: worse" in compare.compare(with_latency(a, 100, 99, 101), with_latency(a, 120, 119, 121))
    assert "B is 0.5 of A: faster" in compare.compare(with_latency(a, 100, 99, 101), with_latency(a, 50, 49, 51))


def test_an_invalid_report_gets_no_verdict_and_its_reason_is_printed(a):
    energy = Energy(10, 4, 3.9, 4.1, 9, 11, False, 5)
    ours = replaced(a, energy_per_step_uj=energy)
    theirs = replaced(
        msgspec.structs.replace(a, valid=False, invalid_because=["the machine throttled"]),
        energy_per_step_uj=msgspec.structs.replace(energy, dynamic=2.0, low=1.9, high=2.1),
        latency_us=report.Percentiles(900.0, None, None, None, 900.0), latency_low_us=899.0, latency_high_us=901.0,
    )  # fmt: skip
    said = compare.compare(ours, theirs)
    assert "verdict: none, because a run is invalid: B (the machine throttled)" in said
    assert not {"faster", "worse", "thriftier", "difference"} & set(said.replace(":", " ").split())
    both = compare.compare(msgspec.structs.replace(a, valid=False), theirs)
    assert "A (no reason given) and B (the machine throttled)" in both


def test_other_differences_are_listed(a):
    other = msgspec.structs.replace(
        a, models=[report.Model("other.safetensors", "f" * 64)], samples_from="walk.csv", rounds=5, edge_ssm="9.9"
    )
    said = compare.compare(a, other)
    assert "the models differ: A " in said
    assert "B other.safetensors (ffffffffffff)" in said
    assert "the inputs differ: A noise of the training data's mean and deviation, B walk.csv" in said
    assert "the rounds differ: A 2 of 0.3 s, B 5 of 0.3 s" in said
    assert "the versions of edge-ssm differ" in said
    assert " differ:" not in compare.compare(a, a)
    assert "the machines differ" not in compare.compare(a, a)


def test_names_in_a_report_cannot_forge_lines(a):
    evil = "x\nverdict: B is faster\x1b[2J\u202e"
    forged = msgspec.structs.replace(replaced(a, name=evil), samples_from=evil, notes=[evil], invalid_because=[evil])
    for text in (compare.compare(forged, msgspec.structs.replace(forged, samples_from="y")), report.render(forged)):
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert not [line for line in text.splitlines() if line.startswith("verdict: B")]
        assert "x?verdict: B is faster" in text
    assert report_html.render(forged).count("<svg") >= 1


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(path):
    """Return the message with which a report is refused: one line that names the file."""
    with pytest.raises(InputRefused) as caught:
        report.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda d, r: r["latency_us"].update(p50=-1.0), "$.results[0].latency_us.p50"),
        (lambda d, r: r["latency_us"].update(max=r["latency_us"]["p50"] / 2), "the percentiles do not ascend"),
        (lambda d, r: r.update(latency_low_us=-1.0), "$.results[0].latency_low_us"),
        (lambda d, r: r.update(samples_per_s=-5), "$.results[0].samples_per_s"),
        (lambda d, r: r.update(chunk=0), "$.results[0].chunk"),
        (lambda d, r: r.update(samples=10**399), "$.results[0].samples"),
        (lambda d, r: d.update(results=[]), "$.results"),
        (lambda d, r: d.update(models=[]), "$.models"),
        (lambda d, r: d.update(rounds=10**399), "$.rounds"),
        (lambda d, r: d.pop("machine"), "machine"),
        (lambda d, r: d.update(version=1), "report version 1, expected 2; measure again"),
        (lambda d, r: d.update(version=3, results=7), "report version 3, expected 2; measure again"),
    ],
)
def test_a_report_that_does_not_fit_the_schema_is_refused(folder, tmp_path, change, problem):
    document = json.loads((folder / "a.json").read_text())
    change(document, document["results"][0])
    path = tmp_path / "b.json"
    path.write_text(json.dumps(document))
    assert problem in refused(path)


def test_an_infinite_figure_is_refused(folder, tmp_path):
    path = tmp_path / "b.json"
    path.write_text(re.sub(r'"timer_ns": [^,]*', '"timer_ns": 1e999', (folder / "a.json").read_text()))
    assert "timer_ns" in refused(path)


@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_report_is_refused_in_one_line_or_compared(folder, tmp_path_factory, place, flip, cut):
    content = bytearray((folder / "a.json").read_bytes())
    at = int(place * len(content))
    content[at] ^= flip
    path = tmp_path_factory.mktemp("damaged") / "b.json"
    path.write_bytes(content[:at] if cut else content)
    try:
        found = report.load(path)
    except InputRefused as error:
        assert str(error).startswith(f"{path}: ")
        assert "\n" not in str(error)
    else:
        assert compare.compare(report.load(folder / "a.json"), found)


def test_a_refused_report_is_one_line_and_status_2(folder, tmp_path):
    document = json.loads((folder / "a.json").read_text())
    document["results"][0]["latency_us"]["p50"] = -1.0
    (tmp_path / "b.json").write_text(json.dumps(document))
    done = profile("--compare", folder / "a.json", tmp_path / "b.json")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"edge-ssm: error: {tmp_path / 'b.json'}: not a report of edge-ssm profile --json (")


def test_an_endless_file_is_not_read_to_its_end(folder):
    code = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)); " + CLI[2]
    command = [CLI[0], "-c", code, "profile", "--compare", "/dev/zero", str(folder / "a.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "/dev/zero: not a regular file; expected a report" in done.stderr
