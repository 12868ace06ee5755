"""A counter is declared once: everything that shows or keeps counters derives from the declaration."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT
from support.networks import random_network

import edge_ssm
from edge_ssm.runtime.counters import DECLARATIONS, PUBLISHED, Counters
from edge_ssm.telemetry.status import Status
from edge_ssm.telemetry.summary import summary

OBSERVING = ROOT / "docs" / "observing.md"
NEW = '    sightings: int = counter("Geese seen.", row="geese", summary=Phrase("wildlife", "{} geese"))\n'
LOOK = """
import io, json
from edge_ssm.io.sinks.formats import NdjsonFormatter
from edge_ssm.runtime.counters import Counters
from edge_ssm.telemetry import http, top
from edge_ssm.telemetry.prometheus import Metrics
from edge_ssm.telemetry.publisher import RunInfo, StatusPublisher
from edge_ssm.telemetry.status_document import encode
from edge_ssm.telemetry.summary import summary
from support.networks import random_network

network, counters, again = random_network(), Counters(), Counters()
counters.sightings = 3
again.restore(counters.kept())
formatter = NdjsonFormatter(io.StringIO(), network, logits=False, truth=False)
publisher = StatusPublisher(formatter, RunInfo("m", "d", "cpu", 50.0), counters)
print(json.dumps({
    "snapshot": counters.kept()["sightings"],
    "restored": again.sightings,
    "status": publisher.status().sightings,
    "document": json.loads(encode(publisher, 1.0))["status"]["sightings"],
    "metrics": "edge_ssm_sightings_total 3.0" in Metrics(publisher).text().decode(),
    "summary": "wildlife  3 geese" in summary(counters, network, "cpu"),
    "top": "geese 3" in top.page([publisher.status()], None),
    "page": '["sightings", "geese", ""]' in http._page()[0].decode(),
}))
"""


def test_a_new_counter_needs_its_declaration_and_nothing_else(tmp_path):
    package = tmp_path / "edge_ssm"
    shutil.copytree(Path(edge_ssm.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    path = package / "runtime" / "counters.py"
    before, after = path.read_text().split("    labelled: int = counter(")
    path.write_text(f"{before}{NEW}    labelled: int = counter({after}")
    paths = [str(tmp_path), str(ROOT / "tests")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", LOOK], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == {
        "snapshot": 3,
        "restored": 3,
        "status": 3,
        "document": 3,
        "metrics": True,
        "summary": True,
        "top": True,
        "page": True,
    }


def test_the_status_and_the_snapshot_hold_exactly_what_is_declared():
    assert set(Counters().published()) == {each.name for each in PUBLISHED} <= set(Status.__struct_fields__)
    assert set(Counters().kept()) == {each.name for each in DECLARATIONS if each.is_kept and each.reasons is None}


def test_counts_by_reason_survive_a_restart():
    counters, again = Counters(samples=7), Counters()
    counters.gaps["lost"] += 2
    counters.dropped["late"] += 1
    again.restore(counters.kept() | {"gap.": 1, "unknown": 9})
    assert (again.samples, again.earlier) == (7, 7)
    assert again.gaps == {"lost": 2, "": 1}
    assert again.dropped == {"late": 1}


def test_a_counter_may_be_a_reason_of_another():
    counters = Counters(malformed=2, discarded=0)
    counters.dropped["late"] = 1
    assert counters.published()["dropped"] == {"late": 1, "malformed": 2}
    assert "malformed" not in counters.published()


def test_lines_of_the_summary_without_counts_are_left_out():
    assert summary(Counters(), random_network(), "cpu").splitlines() == [
        "ended by end of input; engine cpu",
        "samples   0, gaps 0, malformed rows 0",
        "decisions 0, windows without one 0, resets 0",
    ]
    counters = Counters(samples=9, moves=1, engine_losses=2, resets=1, discarded=4, unfinished=5)
    counters.gaps.update({"missing": 2, "lost": 1})
    assert summary(counters, random_network(), "cpu").splitlines()[1:] == [
        "samples   9, gaps 1 lost, 2 missing, malformed rows 0",
        "decisions 0, windows without one 0, resets 1 (gave up 4 samples), last window unfinished with 5 samples",
        "dropped   nothing; late decisions 0, connections 0, engines lost 2",
        "reloads   0, refused 0; moves within the family 1",
    ]


@pytest.mark.parametrize("declaration", PUBLISHED, ids=lambda each: each.name)
def test_the_documentation_describes_a_metric_as_it_is_declared(declaration):
    (row,) = [line for line in OBSERVING.read_text().splitlines() if f"`edge_ssm_{declaration.name}_total" in line]
    assert row.endswith(f"| {declaration.help} |")
