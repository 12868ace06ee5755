"""Step times: measurement, table and prediction."""

import json
import sys

import numpy as np
import pytest
from support import commands
from support.networks import random_network

from edge_ssm.engines.registry import create
from edge_ssm.errors import InputRefused
from edge_ssm.model.cost import cost
from edge_ssm.model.validation import check
from edge_ssm.profiler import step_table


def test_a_table_is_written_by_the_command_and_predicts_its_own_rows(tmp_path):
    path = tmp_path / "table.json"
    code = "from edge_ssm.cli.app import main; main()"
    command = [sys.executable, "-c", code, "profile", "--step-table", str(path), "--engine", "cpu"]
    done = commands.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "80 networks measured" in done.stdout
    table = step_table.load_table(path)
    small = step_table.synthetic(16, 1, 4, 2, 8, "float32", False)
    large = step_table.synthetic(128, 4, 128, 32, 128, "float32", False)
    assert 0 < table.predict(small) < table.predict(large)


def test_the_prediction_recovers_the_costs_of_synthetic_rows():
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(30):
        features = {"call": 1.0, "states": float(rng.integers(1, 500)), "mixing_int8": float(rng.integers(1, 5000))}
        rows.append(step_table.Row(features, 2 + 0.01 * features["states"] + 0.0005 * features["mixing_int8"]))
    table = step_table.StepTable(1, "cpu", "here", rows)
    network = random_network(h=32, mixing_dtype="int8")
    found = step_table.features(network)
    assert np.isclose(table.predict(network), 2 + 0.01 * found["states"] + 0.0005 * found["mixing_int8"])


def test_costs_are_never_negative():
    A = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    x = step_table._non_negative(A, np.array([3.0, 2.0, 1.0]))
    assert (x >= 0).all()
    assert x[1] == 0


def test_the_synthetic_networks_have_the_requested_sizes():
    network = step_table.synthetic(32, 2, 8, 4, 16, "int8", True)
    check(network)
    total = cost(network)
    assert [b.active for b in total.blocks] == [8, 8]
    assert [b.pairs for b in total.blocks] == [32, 32]
    assert [(b.columns, b.rows) for b in total.blocks] == [(16, 16), (16, 16)]
    assert step_table.features(network)["low_rank_states"] == 64
    assert step_table.features(network)["mixing_int8"] == 2 * 2 * 16 * 16
    assert create("cpu", network).step(np.zeros(1)).shape == (2,)


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"[]",
        b"\xff",
        json.dumps({"version": 1, "engine": "cpu", "machine": "m", "rows": []}).encode(),
        json.dumps({"version": 9, "engine": "c", "machine": "m", "rows": [{"features": {}, "step_us": 1.0}]}).encode(),
        json.dumps({"version": 1, "engine": "c", "machine": "m", "rows": [{"features": {}, "step_us": 0}]}).encode(),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, content):
    path = tmp_path / "table.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputRefused, match=r"table\.json: ") as caught:
        step_table.load_table(path)
    assert "\n" not in str(caught.value)
