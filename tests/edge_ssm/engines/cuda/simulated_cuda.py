"""The CUDA kernels against the reference. test_cuda.py runs this in a process with NUMBA_ENABLE_CUDASIM=1."""

import numpy as np
import pytest
from support.cuda_simulator import create, create_persistent
from support.networks import random_network, samples_for

from edge_ssm.engines.cuda import engine as cuda_engine
from edge_ssm.engines.cuda import kernels, persistent
from edge_ssm.engines.cuda.engine import LANES_PER_GROUP, make_plan
from edge_ssm.engines.failover import FallbackEngine
from edge_ssm.engines.registry import create as create_engine
from edge_ssm.errors import EngineUnavailable, RunFailed, SampleError

FORMS = {
    "whole": {},
    "ragged, columns and rows dropped": {"h": 9, "ragged": True, "active": [4, 9], "columns": 6, "rows": 5},
    "nothing left": {"h": 5, "active": [0, 2], "columns": 0, "rows": 0},
    "rank one": {"h": 7, "rank_one": 0.5, "discretization": "bilinear", "ragged": True},
    "all rank one": {"h": 4, "rank_one": 1.0, "discretization": "bilinear"},
    "prenorm, affine, plain": {"h": 6, "prenorm": True, "norm": "affine", "mixing": "plain", "rows": 4},
    "prenorm, no norm": {"h": 6, "prenorm": True, "norm": None},
    "tokens": {"h": 6, "vocabulary": 7},
    "float16": {"h": 9, "mixing_dtype": "float16", "columns": 7, "active": [5, 6]},
    "int8": {"h": 9, "mixing_dtype": "int8", "rows": 8},
    "wider than a block": {"h": 40, "pairs": 2, "layers": 1},
}


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_the_kernel_steps_the_network(form, lanes):
    network = random_network(3, **FORMS[form])
    samples = samples_for(network, 0, 4, *([lanes] if lanes > 1 else []))
    expected = create_engine("reference", network, lanes=lanes).chunk(samples)
    found = create(network, lanes).chunk(samples)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= 2e-6 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("form", ["whole", "rank one", "int8"])
def test_a_chunk_is_as_many_steps_and_no_lane_sees_another(form):
    network = random_network(4, **FORMS[form])
    samples = samples_for(network, 0, 3, 2)
    together = create(network, 2).chunk(samples)
    steps = create(network, 2)
    assert np.array_equal(together, np.stack([steps.step(sample) for sample in samples]))
    assert np.array_equal(together[:, 1], create(network).chunk(samples[:, 1]))


def test_many_lanes_share_the_weights():
    network = random_network(5, h=4, pairs=2, layers=1)
    lanes = LANES_PER_GROUP + 1  # the last group has one
    samples = samples_for(network, 0, 2, lanes)
    engine = create(network, lanes)
    assert engine._plan.lanes_per_group == LANES_PER_GROUP
    assert np.abs(engine.chunk(samples) - create_engine("reference", network, lanes=lanes).chunk(samples)).max() <= 1e-5


@pytest.mark.parametrize(("lanes", "processors", "blocks"), [(1, 3, 3), (2, 4, 2)])
@pytest.mark.parametrize("form", ["ragged, columns and rows dropped", "rank one", "prenorm, affine, plain", "int8"])
def test_blocks_that_share_a_lane_hand_each_other_what_they_found(form, lanes, processors, blocks, monkeypatch):
    monkeypatch.setattr(cuda_engine, "SPLIT_BYTES", 0)
    network = random_network(3, **FORMS[form])
    samples = samples_for(network, 0, 2, *([lanes] if lanes > 1 else []))
    engine = create(network, lanes, processors)
    assert engine._plan.blocks == blocks
    expected = create_engine("reference", network, lanes=lanes).chunk(samples)
    assert np.abs(engine.chunk(samples) - expected).max() <= 2e-6 * max(1.0, np.abs(expected).max())


def test_a_step_is_one_launch():
    network = random_network()
    engine = create(network)
    for sample in samples_for(network, 0, 3):
        engine.step(sample)
    engine.chunk(samples_for(network, 0, 5))
    assert engine._device.launches == 4


@pytest.mark.parametrize(("lanes", "processors", "blocks"), [(1, 1, 1), (2, 2, 1), (1, 2, 2)])
def test_a_kernel_that_stays_is_as_many_steps_in_one_launch(lanes, processors, blocks, monkeypatch):
    monkeypatch.setattr(cuda_engine, "SPLIT_BYTES", 0 if blocks > 1 else 1 << 40)
    network = random_network(3, h=6, pairs=2, layers=2)
    samples = samples_for(network, 0, 6, *([lanes] if lanes > 1 else []))
    engine, reference = create_persistent(network, lanes, processors), create_engine("reference", network, lanes=lanes)
    assert engine._plan.blocks == blocks
    expected = reference.chunk(samples)
    found = np.concatenate([engine.step(samples[0])[None], engine.chunk(samples[1:4])])
    assert engine._device.launches == 1
    before = engine.snapshot()
    found = np.concatenate([found, engine.chunk(samples[4:])])
    assert engine._device.launches == 2
    assert np.abs(found - expected).max() <= 2e-6 * max(1.0, np.abs(expected).max())
    engine.restore(before)
    assert np.array_equal(engine.chunk(samples[4:]), found[4:])
    with pytest.raises(SampleError, match="nan"):
        engine.step(np.full_like(samples[0], np.nan))
    engine.reset()
    assert np.array_equal(engine.step(samples[0]), found[0])


def test_a_ring_is_filled_only_where_it_is_free_and_its_numbers_start_again(monkeypatch):
    monkeypatch.setattr(persistent, "SLOTS", 2)
    monkeypatch.setattr(persistent, "LAST_NUMBER", 4)
    monkeypatch.setattr(kernels, "LAST_NUMBER", 4)
    network = random_network(3, h=3, pairs=1, layers=1)
    samples = samples_for(network, 0, 11)
    found = create_persistent(network).chunk(samples)
    assert np.abs(found - create_engine("reference", network).chunk(samples)).max() <= 1e-5


def test_a_kernel_that_stays_needs_a_multiprocessor_a_lane_and_its_end_is_noticed():
    network = random_network(3, h=3, pairs=1, layers=1)
    with pytest.raises(EngineUnavailable, match="3 lanes, this GPU has 2 multiprocessors"):
        create_persistent(network, 3, 2)
    engine = create_persistent(network)
    engine.step(network.input.mean)
    engine._requests[...] = -1  # as if something had ended it
    with pytest.raises(RunFailed, match="the kernel ended by itself"):
        engine._device.wait() or engine.step(network.input.mean)
    engine.reset()
    engine.step(network.input.mean)
    assert engine._device.launches == 2


def test_snapshots_go_to_the_other_engines_and_back():
    network = random_network(6, h=7, rank_one=0.5, discretization="bilinear", ragged=True)
    samples = samples_for(network, 0, 8)
    engine, reference = create(network), create_engine("reference", network)
    engine.chunk(samples[:4])
    reference.restore(engine.snapshot())
    expected = reference.chunk(samples[4:])
    other = create(network)
    other.restore(engine.snapshot())
    assert np.abs(engine.chunk(samples[4:]) - expected).max() <= 1e-5
    assert np.abs(other.chunk(samples[4:]) - expected).max() <= 1e-5


def test_reset_and_gaps_are_of_one_lane_or_of_all():
    network = random_network(7)
    engine, reference = create(network, 2), create_engine("reference", network, lanes=2)
    samples = samples_for(network, 0, 3, 2)
    for each in (engine, reference):
        each.chunk(samples)
        each.skip(5, lane=1)
        each.reset(0)
    for found, expected in zip(engine.snapshot().state, reference.snapshot().state, strict=True):
        assert (found[0] == 0).all()
        assert np.allclose(found, expected, atol=1e-6)
    engine.reset()
    assert all((x == 0).all() for x in engine.snapshot().state)


def test_a_bad_sample_changes_nothing():
    network = random_network(8)
    engine = create(network)
    engine.step(network.input.mean)
    before = engine.snapshot().state
    with pytest.raises(SampleError, match="channel 'c1': nan"):
        engine.chunk(np.array([[0.0, 0.0], [0.0, np.nan]]))
    assert all(np.array_equal(a, b) for a, b in zip(before, engine.snapshot().state, strict=True))


def test_the_plan_fits_the_device():
    layout = create(random_network(9, h=64, pairs=32, layers=2))._layout
    assert make_plan(1, layout, 8, 48 << 10).blocks == 1  # small: waiting costs more than reading
    large = create(random_network(9, h=256, pairs=32, layers=1))._layout
    assert make_plan(1, large, 8, 48 << 10).blocks == 8
    assert make_plan(2, large, 8, 48 << 10).blocks == 4
    assert make_plan(8, large, 8, 48 << 10).blocks == 1  # one a multiprocessor
    assert make_plan(64, large, 8, 96 << 10).lanes_per_group == LANES_PER_GROUP
    with pytest.raises(EngineUnavailable, match="shared memory"):
        make_plan(1, large, 8, 1 << 10)


@pytest.mark.parametrize("at", [0, 3, 7])
def test_a_lost_gpu_is_taken_over_from_with_its_state(at):
    network = random_network(10)
    samples = samples_for(network, 0, 12)
    first = create(network)
    engine = FallbackEngine(first, lambda: create_engine("cpu", network))
    found = []
    for i, sample in enumerate(samples):
        if i == 5:
            engine.skip(2)
        if i == at:
            first._device.run = first._device.read = lost
        found.append(engine.step(sample))
    assert engine.lost == "engine 'cuda': a launch failed (illegal address)"
    assert engine.name == "cpu"
    expected = create_engine("reference", network)
    first_part = expected.chunk(samples[:5])
    expected.skip(2)
    assert np.abs(np.stack(found) - np.concatenate([first_part, expected.chunk(samples[5:])])).max() <= 1e-5


def lost(*_):
    raise RunFailed("engine 'cuda': a launch failed (illegal address)")
