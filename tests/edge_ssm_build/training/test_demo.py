"""The shipped demo: its stream agrees with torch and with the figures on its page."""

import json
import re
import sys

import numpy as np
import pytest
from support import commands

from edge_ssm import load

torch = pytest.importorskip("torch", reason="the host tool needs torch: pip install 'edge-ssm[host]'")

from edge_ssm_build.export.agreement import convolve_windows
from edge_ssm_build.export.convert import to_model


def test_the_demo_streams_what_torch_computes(demo_model, demo_stream):
    artifact = load(demo_model)
    network = artifact.network
    rows = np.genfromtxt(demo_stream, delimiter=",", skip_header=1, dtype=str)
    x = rows[:, :-1].astype(float).reshape(-1, network.window, network.d_input)
    truth = rows[:: network.window, -1]
    logits = convolve_windows(to_model(network, torch.float64), network.input, x)
    labels = [network.labels[i] for i in logits.argmax(axis=1)]
    command = [sys.executable, "-c", "from edge_ssm.cli.app import main; main()", "run", str(demo_model), "--stream"]
    done = commands.run([*command, "--input", str(demo_stream), "--logits"], capture_output=True, text=True, check=True)
    decisions = [json.loads(line) for line in done.stdout.splitlines()]
    assert [d["label"] for d in decisions] == labels
    assert np.abs(np.array([d["logits"] for d in decisions]) - logits).max() <= 1e-4
    right = int((np.array(labels) == truth).sum())
    stated = f"{right} of {len(truth)} decisions equal the true label"
    assert stated in done.stderr
    root = demo_model.parent.parent
    assert stated in (root / "README.md").read_text()
    test = artifact.provenance["scores"]["test"]
    page = (root / "examples" / "README.md").read_text()
    assert re.search(rf"complete test split[^|]*\| {test['windows']} windows \| {100 * test['accuracy']:.1f} %", page)


def test_the_demo_is_pruned_and_says_where_it_comes_from(demo_model):
    artifact = load(demo_model)
    bypassed = sum(
        network_block.ssm.D.size - len(network_block.ssm.active) for network_block in artifact.network.blocks
    )
    assert bypassed > 0
    assert "BSD-3-Clause" in artifact.provenance["data"]["source"]
    pruned = artifact.provenance["history"][-1]
    assert (pruned["choice"], pruned["rate"]) == ("sensitivity", 0.7)
    blocks = artifact.network.blocks
    assert max(len(b.mixing.columns) for b in blocks) < artifact.network.d_model
    assert len({int(n) for b in blocks for n in b.ssm.pairs}) > 1
