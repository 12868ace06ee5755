"""Metrics as Prometheus' own tools see them: real scrapes of a real run."""

import contextlib
import io
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from support import ROOT
from support.networks import random_network
from support.watched import Watched, demo, rows

from edge_ssm import log
from edge_ssm.errors import UsageError
from edge_ssm.hardware import machine
from edge_ssm.histogram import LatencyHistogram
from edge_ssm.telemetry import prometheus as telemetry_prometheus
from edge_ssm.telemetry.http import serve
from edge_ssm.telemetry.prometheus import EDGES_NS, Metrics

DASHBOARD = ROOT / "docs" / "grafana.json"


def scrape(live):
    """{(name, sorted labels): value} of one scrape, and its text."""
    text = Metrics(live).text().decode()
    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return values, text


def promtool_check(text):
    """Return exit status and output of ``promtool check metrics``."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is missing: apt-get install --no-install-recommends prometheus")
    process = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    return process.returncode, process.stdout + process.stderr


@pytest.fixture
def gappy():
    network = random_network(window=10)
    with Watched(network, rows(network, gap_every=7)) as run:
        run.until(20)
        run.stop.set()
        run._thread.join()
        yield run


def test_a_scrape_shows_the_counters(gappy):
    values, _ = scrape(gappy.publisher)
    counters, status = gappy.counters, gappy.publisher.status()
    assert values["edge_ssm_samples_total", ()] == counters.samples
    assert values["edge_ssm_gaps_total", (("reason", "missing"),)] == counters.gaps["missing"] > 0
    assert values["edge_ssm_gaps_total", (("reason", "out_of_range"),)] == 0
    by_label = {key[1][0][1]: n for key, n in values.items() if key[0] == "edge_ssm_decisions_total"}
    assert by_label == status.labels
    assert sum(by_label.values()) == counters.decisions
    for name in ("deadline_misses", "resets", "undecided", "reconnects", "reloads", "moves"):
        assert values[f"edge_ssm_{name}_total", ()] == getattr(counters, name)
    assert values["edge_ssm_source_up", ()] == 1
    assert values["edge_ssm_ready", ()] == 1
    assert values["edge_ssm_sample_rate_hertz", ()] == 50
    info = (("digest", "5eed"), ("engine", "reference"), ("model", "demo.safetensors"), ("profile", ""))
    assert values["edge_ssm_model_info", info] == 1
    assert values["process_resident_memory_bytes", ()] > 0


def test_the_step_histogram_is_that_of_the_pipeline(gappy):
    values, _ = scrape(gappy.publisher)
    latency = gappy.counters.latency
    assert values["edge_ssm_step_seconds_count", ()] == latency.count > 0
    assert values["edge_ssm_step_seconds_sum", ()] == pytest.approx(latency.sum_ns / 1e9)
    counts = [n for key, n in values.items() if key[0] == "edge_ssm_step_seconds_bucket"]
    assert len(counts) == len(EDGES_NS) + 1
    assert counts == sorted(counts)
    assert counts[-1] == latency.count


def test_only_measured_values_are_present(gappy):
    gappy.info.power_w = gappy.info.snapshot_at = None
    values, text = scrape(gappy.publisher)
    assert "edge_ssm_power_watts" not in text
    assert "edge_ssm_snapshot_age_seconds" not in text
    gappy.info.power_w, gappy.info.snapshot_at = 4.25, time.monotonic() - 3
    values, _ = scrape(gappy.publisher)
    assert values["edge_ssm_power_watts", ()] == 4.25
    assert 3 <= values["edge_ssm_snapshot_age_seconds", ()] < 60


@pytest.mark.parametrize("state", ["waiting", "stale", "lost"])
def test_a_silent_source_is_not_up(gappy, state):
    gappy.info.source_state = state
    assert scrape(gappy.publisher)[0]["edge_ssm_source_up", ()] == 0


def test_promtool_accepts_a_scrape(gappy):
    gappy.info.power_w, gappy.info.snapshot_at = 4.25, time.monotonic()
    gappy.info.profile = "orin-nano-8gb-15w"
    assert promtool_check(scrape(gappy.publisher)[1]) == (0, "")


def test_names_from_a_hostile_model_stay_within_their_labels():
    names = ('a"} 1\nedge_ssm_fake_total 7', "back\\slash", "\ud800 half a pair")
    network = random_network(window=5)
    object.__setattr__(network, "labels", names)
    with Watched(network, rows(network), model='m"\n.safetensors\udcff') as run:
        run.until(60)
        values, text = scrape(run.publisher)
    assert not re.search("^edge_ssm_fake_total", text, re.M)
    labels = {key[1][0][1] for key in values if key[0] == "edge_ssm_decisions_total"}
    assert labels
    assert labels <= {name.encode("utf-8", "replace").decode() for name in names}
    assert promtool_check(text) == (0, "")


def test_a_regression_has_decisions_without_labels():
    network = random_network(window=5, task="regression")
    with Watched(network, rows(network)) as run:
        run.until(10)
        values, _ = scrape(run.publisher)
    assert values["edge_ssm_decisions_total", (("label", ""),)] >= 10


def test_counters_never_decrease_between_scrapes():
    network = random_network(window=5)
    with Watched(network, rows(network), hop=1) as run:
        last = {}
        for _ in range(40):
            values, _ = scrape(run.publisher)
            for key, n in last.items():
                assert values[key] >= n, key
            last = {
                k: n for k, n in values.items() if k[0].startswith("edge_ssm_") and k[0].endswith(("_total", "_count"))
            }
            buckets = [n for key, n in values.items() if key[0] == "edge_ssm_step_seconds_bucket"]
            assert buckets == sorted(buckets)
            assert buckets[-1] == values["edge_ssm_step_seconds_count", ()]


@given(
    st.lists(
        st.one_of(st.integers(0, 1 << 34), st.sampled_from(EDGES_NS), st.sampled_from(EDGES_NS).map(lambda e: e + 1))
    )
)
def test_counts_at_the_edges_are_exact(durations):
    one, many = LatencyHistogram(), LatencyHistogram()
    for ns in durations:
        one.record(ns)
    many.record_many(np.array(durations, dtype=np.int64))
    many.add(LatencyHistogram())
    expected = [sum(ns <= edge for ns in durations) for edge in EDGES_NS], len(durations)
    assert one.cumulative(EDGES_NS) == many.cumulative(EDGES_NS) == expected
    assert one.sum_ns == many.sum_ns == sum(durations)


def test_the_dashboard_uses_only_metrics_that_exist():
    with demo() as run:
        run.until(2)
        run.info.power_w, run.info.snapshot_at = 5.0, time.monotonic()
        names = {key[0] for key in scrape(run.publisher)[0]}
    names.add("edge_ssm_temperature_celsius")  # Not every machine that tests has a thermometer.
    dashboard = json.loads(DASHBOARD.read_text())
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    targets += [v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in dashboard["panels"])
    queried = {name for query in targets for name in re.findall(r"\b(?:edge_ssm|process)_[a-z0-9_]+", query)}
    assert queried - names == set()
    own = {name for name in names if name.startswith("edge_ssm_")} - {
        "edge_ssm_step_seconds_count",
        "edge_ssm_step_seconds_sum",
    }
    assert own - queried == set(), "metrics that no panel shows"


@pytest.mark.slow
def test_a_real_prometheus_scrapes_and_answers_the_dashboard(tmp_path):
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        pytest.skip("prometheus is missing: apt-get install --no-install-recommends prometheus")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    expressions = [
        target["expr"].replace("$__rate_interval", "10s").replace("$instance", ".*")
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        for target in panel["targets"]
        if machine.temperatures() or "temperature" not in target["expr"]
    ]
    with (
        demo(hz=500, hop=50, read_power=lambda: 4.5) as run,
        contextlib.closing(serve(run.publisher, ":0", prometheus=True)) as web,
    ):
        run.info.snapshot_at = time.monotonic()
        targets = {"job_name": "edge-ssm", "scrape_interval": "1s", "static_configs": [{"targets": [web.address]}]}
        (tmp_path / "config.yml").write_text(json.dumps({"scrape_configs": [targets]}))
        command = [prometheus, f"--config.file={tmp_path}/config.yml", f"--storage.tsdb.path={tmp_path}/data"]
        command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
        with subprocess.Popen(command) as server:
            try:
                unanswered, end = list(expressions), time.monotonic() + 60
                while unanswered and time.monotonic() < end:
                    time.sleep(1)
                    with contextlib.suppress(OSError):
                        unanswered = [expr for expr in unanswered if not query(port, expr)]
            finally:
                server.kill()
    assert unanswered == []


def query(port, expression):
    url = f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(expression)}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)["data"]["result"]


def test_the_table_in_the_docs_names_every_metric():
    table = (DASHBOARD.parent / "observing.md").read_text()
    with demo() as run:
        run.until(1)
        text = scrape(run.publisher)[1]
    missing = [name for name in re.findall(r"^# TYPE (edge_ssm_\w+)", text, re.M) if f"`{name}" not in table]
    assert missing == []


def test_without_prometheus_client_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(telemetry_prometheus, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'edge-ssm\[metrics\]'"):
        telemetry_prometheus.require()


def test_prometheus_client_is_not_imported_before_it_is_asked_for():
    code = "import sys, edge_ssm.telemetry.http; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


LOG = """
import logging
from edge_ssm import log
log.configure()
log.configure()
logging.getLogger("edge_ssm.x").warning("source %s", "lost", extra={"fields": {"name": "tty 1", "tries": 3}})
"""


def test_a_line_has_a_priority_in_the_journal_and_a_name_elsewhere(tmp_path):
    path = tmp_path / "journal"
    with path.open("w") as file:
        values = os.fstat(file.fileno())
        for stream in (f"{values.st_dev}:{values.st_ino}", f"{values.st_dev}:{values.st_ino + 1}", "nonsense", ""):
            environment = os.environ | {"JOURNAL_STREAM": stream}
            subprocess.run([sys.executable, "-c", LOG], stderr=file, env=environment, check=True, timeout=60)
    plain = 'edge-ssm: source lost name="tty 1" tries=3'
    assert path.read_text().splitlines() == ['<4>source lost name="tty 1" tries=3', plain, plain, plain]


@given(st.text(), st.text())
def test_a_peers_text_is_one_line_of_the_journal(message, value):
    with contextlib.redirect_stderr(io.StringIO()) as labels:
        log.configure()
        logging.getLogger("edge_ssm.x").info(message, extra={"fields": {"key": value}})
    assert labels.getvalue().endswith("\n")
    assert labels.getvalue()[:-1].isprintable()
    assert len(labels.getvalue()) <= log.MAX_LINE + 20


def test_a_closed_standard_error_ends_nothing():
    code = f"import os; os.close(2)\n{LOG}"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
