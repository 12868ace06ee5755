"""The engine "auto": selected by a trial whose result is kept, and repeated when the result no longer fits."""

import json
from dataclasses import replace

import numpy as np
import pytest
from support.networks import random_network, samples_for

from edge_ssm.engines import registry, selection
from edge_ssm.engines.cpu import cache as kernel_cache
from edge_ssm.engines.registry import EngineOptions, create
from edge_ssm.errors import EngineUnavailable


@pytest.fixture
def kept(tmp_path, monkeypatch):
    kernel_cache.load()  # found where it is, before the folder changes
    monkeypatch.setenv("EDGE_SSM_CACHE", str(tmp_path))
    return tmp_path


def only(folder):
    (path,) = folder.glob("*.trial")
    return path


def test_the_fastest_is_taken_and_the_figures_are_kept(kept):
    network = random_network()
    engine, trial = selection.select_engine(network)
    assert set(trial.step_us) == {"cpu", "reference"}
    assert engine.name == trial.winner == min(trial.step_us, key=trial.step_us.get)
    assert trial.why().startswith(f"{trial.winner} ")
    # Other figures in the file, and it is they that decide.
    turned = {"step_us": {"cpu": 9.0, "reference": 1.0}, "unavailable": {}}
    only(kept).write_text(json.dumps(turned))
    assert create("auto", network).name == "reference"
    assert selection.select_engine(network)[1].why() == "reference 1 us, cpu 9 us a step"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"step_us": {}, "unavailable": {}}', '{"step_us": {"gone": 1.0}, "unavailable": {}}']
)
def test_figures_that_do_not_fit_are_measured_again(kept, content):
    network = random_network()
    selection.select_engine(network)
    only(kept).write_text(content)
    assert set(selection.select_engine(network)[1].step_us) == {"cpu", "reference"}
    assert json.loads(only(kept).read_text())["step_us"].keys() == {"cpu", "reference"}


def test_another_network_or_number_of_lanes_is_another_trial(kept):
    selection.select_engine(random_network(0))
    selection.select_engine(random_network(1))
    selection.select_engine(random_network(1), EngineOptions(lanes=2))
    assert len(list(kept.glob("*.trial"))) == 3


def test_the_trial_leaves_no_state_behind(kept):
    engine, _ = selection.select_engine(random_network(), EngineOptions(lanes=2))
    assert all((x == 0).all() for x in engine.snapshot().state)


def test_what_does_not_load_is_left_out_and_named(kept, monkeypatch):
    def fails():
        raise EngineUnavailable("engine 'cpu': not today")

    monkeypatch.setattr(kernel_cache, "load", fails)
    engine, trial = selection.select_engine(random_network())
    assert engine.name == "reference"
    assert trial.unavailable == {"cpu": "engine 'cpu': not today"}
    assert not list(kept.glob("*.trial"))  # it may load at the next start
    monkeypatch.delitem(registry.ENGINES, "reference")
    with pytest.raises(EngineUnavailable, match="not today"):
        selection.select_engine(random_network(1))


@pytest.mark.parametrize(("stated", "engines_left"), [(0.01, {"cpu", "cpu-float32"}), (0.0, {"cpu-float32"})])
def test_small_weights_run_as_stored_only_within_what_the_artifact_states(kept, stated, engines_left):
    """int8 mixing takes its inputs as 16-bit integers; what that costs must be little beside what int8 cost."""
    network = replace(random_network(3, h=128, pairs=32, layers=6, mixing_dtype="int8"), rounding_error=stated)
    trial = selection.select_engine(network)[1]
    assert set(trial.step_us) == engines_left | {"reference"}
    if "cpu" not in engines_left:
        assert "more than 1.0e-04" in trial.inaccurate["cpu"]


def test_widened_weights_are_the_stored_ones():
    network = random_network(h=19, mixing_dtype="float16")
    samples = samples_for(network, 0, 50)
    assert np.array_equal(create("cpu-float32", network).chunk(samples), create("cpu", network).chunk(samples))


def test_an_unwritable_folder_only_costs_the_next_trial(monkeypatch):
    kernel_cache.load()
    monkeypatch.setenv("EDGE_SSM_CACHE", "/proc/nowhere")
    assert selection.select_engine(random_network())[0].name in ("cpu", "reference")
