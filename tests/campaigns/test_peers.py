"""The peers of benchmarks/peers compute what the engines compute, and the benchmark runs from end to end."""

import json
import subprocess
import sys

import numpy as np
import pytest
from support import ROOT

from edge_ssm.engines.registry import create

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from peers import entries, parts
from support.networks import samples_for


@pytest.mark.filterwarnings("ignore")  # PyTorch warns of TorchScript, which is one of the peers.
@pytest.mark.parametrize("shape", ["tiny", "tiny-50"])
@pytest.mark.parametrize("name", entries.REQUIRES)
def test_a_peer_steps_the_same_network(name, shape):
    absent = entries.missing(name)
    if absent:
        pytest.skip(f"{', '.join(absent)} not installed")
    network = parts.network_of(shape)
    samples = samples_for(network, 0, 50)
    step = entries.make(name, parts.parts_of(network))
    outputs = np.stack([step(sample) for sample in samples])
    assert np.abs(outputs - create("reference", network).chunk(samples)).max() <= 1e-4


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    pytest.importorskip("torch", reason="a peer to compare with")
    output = tmp_path / "r.json"
    command = [sys.executable, BENCHMARKS / "peers" / "run.py", "--shapes", "tiny-50", "--rounds", "2"]
    subprocess.run([*command, "--output", output], check=True, timeout=300, stdout=subprocess.DEVNULL)
    rows = {row["entry"]: row for row in json.loads(output.read_text())["rows"]}
    assert {"edge-ssm", "NumPy", "PyTorch eager", "floor"} <= set(rows)
    assert rows["edge-ssm"]["ratio"] == 1
    assert all(row["median_us"] > 0 and row["floor_us"] > 0 for row in rows.values())
