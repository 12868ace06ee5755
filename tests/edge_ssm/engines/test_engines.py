"""Every engine agrees with the convolution mode, computed independently of it, and keeps the common interface."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import convolution
from support.networks import networks, random_network, samples_for

from edge_ssm import create_engine
from edge_ssm.engines import registry
from edge_ssm.engines.registry import ENGINES, EngineOptions, available, create
from edge_ssm.errors import EngineUnavailable, NetworkError, SampleError, SnapshotError, UsageError
from edge_ssm.model.cost import cost
from edge_ssm.model.discretize import GAP_STEPS, gap_power, step_parameters
from edge_ssm.model.transforms import at_sample_rate

NAMES = sorted(available(random_network(mixing_dtype="int8"), every=True))


def bound(name, network):
    """Return the largest error of an output of ordinary size.

    int8 mixing converts its inputs to 16-bit integers, unless the weights were converted to float32.
    """
    small = any(block.mixing.dtype == "int8" for block in network.blocks)
    return {"reference": 1e-9, "cpu": 1e-3 if small else 1e-4}.get(name, 1e-4)


@pytest.mark.parametrize("name", NAMES)
@given(network=networks(), seed=st.integers(0, 1000), length=st.integers(1, 60))
def test_step_equals_chunk_equals_convolution(name, network, seed, length):
    samples = samples_for(network, seed, length)
    expected = convolution.outputs(network, samples)
    engine = create(name, network)
    stepped = np.stack([engine.step(sample) for sample in samples])
    engine.reset()
    chunked = engine.chunk(samples)
    assert np.array_equal(stepped, chunked)
    # Logits of ordinary size: the bound is absolute, and relative to what a random network blows up.
    scale = max(1.0, np.abs(expected).max())
    assert np.abs(chunked - expected).max() <= bound(name, network) * scale


@pytest.mark.parametrize("name", NAMES)
@given(network=networks(), seed=st.integers(0, 1000), lanes=st.integers(2, 4))
def test_lanes_are_independent_streams(name, network, seed, lanes):
    samples = samples_for(network, seed, 12, lanes)
    together = create(name, network, lanes=lanes).chunk(samples)
    for lane in range(lanes):
        alone = create(name, network).chunk(samples[:, lane])
        # The reference's matrix products round differently for another number of rows.
        assert np.allclose(together[:, lane], alone, rtol=1e-12, atol=0 if name == "cpu" else 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_reset_of_one_lane_leaves_the_others(name):
    network = random_network()
    samples = samples_for(network, 1, 20, 2)
    engine = create(name, network, lanes=2)
    engine.chunk(samples[:10])
    engine.reset(lane=1)
    after = engine.chunk(samples[10:])
    whole = create(name, network, lanes=2).chunk(samples)
    assert np.array_equal(after[:, 0], whole[10:, 0])
    assert np.allclose(after[:, 1], create(name, network).chunk(samples[10:, 1]), rtol=1e-12)


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", NAMES)
@given(network=networks(), seed=st.integers(0, 100))
def test_a_snapshot_goes_on_in_any_engine(source, target, network, seed):
    samples = samples_for(network, seed, 30)
    first = create(source, network)
    first.chunk(samples[:17])
    second = create(target, network)
    second.restore(first.snapshot())
    expected = convolution.outputs(network, samples)[17:]
    scale = max(1.0, np.abs(expected).max())
    assert np.abs(second.chunk(samples[17:]) - expected).max() <= 1e-4 * scale


@pytest.mark.parametrize("name", NAMES)
def test_a_snapshot_that_does_not_fit_is_refused_and_changes_nothing(name):
    network = random_network()
    engine = create(name, network)
    samples = samples_for(network, 0, 8)
    engine.chunk(samples)
    good = engine.snapshot()
    other = create(name, random_network(1)).snapshot()
    lanes = create(name, network, lanes=2).snapshot()
    broken = replace(good, state=(np.full_like(good.state[0], np.nan), *good.state[1:]))
    for bad in (other, lanes, broken):
        with pytest.raises(SnapshotError, match="snapshot: "):
            engine.restore(bad)
    assert all(np.array_equal(a, b) for a, b in zip(engine.snapshot().state, good.state, strict=True))


def dense_steps(block, discretization):
    """Yield the states of each active channel, and its Abar as a dense matrix over both halves of the spectrum."""
    first = 0
    for dt, pairs in zip(block.ssm.dt, block.ssm.pairs, strict=True):
        at = slice(first, first + pairs)
        first += pairs
        A = np.concatenate([block.ssm.A[at], block.ssm.A[at].conj()])
        P = np.zeros_like(A) if block.ssm.P is None else np.concatenate([block.ssm.P[at], block.ssm.P[at].conj()])
        dense, one = np.diag(A) - np.outer(P, P.conj()), np.eye(len(A))
        if discretization == "zoh":
            yield at, np.diag(np.exp(dt * A))
        else:
            yield at, np.linalg.inv(one - dt / 2 * dense) @ (one + dt / 2 * dense)


@pytest.mark.parametrize("name", NAMES)
@given(network=networks(), k=st.integers(1, 5000))
def test_skip_decays_every_state_in_closed_form(name, network, k):
    engine = create(name, network)
    engine.chunk(samples_for(network, 3, 10))
    before = engine.snapshot().state
    engine.skip(k)
    for x, y, block in zip(before, engine.snapshot().state, network.blocks, strict=True):
        dt = block.ssm.dt[block.ssm.owner]
        Bbar = dt * block.ssm.B / (1 - dt * block.ssm.A / 2)  # a state is kept over its own Bbar
        for at, Abar in dense_steps(block, network.discretization):
            scale = Bbar[at] if network.discretization == "bilinear" else np.ones(Abar.shape[0] // 2)
            true = x[0, at].astype(np.complex128) * scale
            both = np.linalg.matrix_power(Abar, k) @ np.concatenate([true, true.conj()])
            expected = both[: len(true)] / scale
            assert np.allclose(y[0, at], expected, rtol=1e-5, atol=1e-6 * max(1e-20, np.abs(expected).max()))


@pytest.mark.parametrize("name", NAMES)
def test_a_gap_is_the_same_stepped_over_and_in_closed_form(name):
    network = random_network(4, discretization="bilinear", rank_one=0.5)
    engine = create(name, network)
    engine.chunk(samples_for(network, 3, 10))
    start = engine.snapshot()
    engine.skip(GAP_STEPS)
    engine.skip(5)
    stepped = engine.snapshot().state
    engine.restore(start)
    engine.skip(GAP_STEPS + 5)
    for a, b in zip(stepped, engine.snapshot().state, strict=True):
        assert np.allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(a).max())


def test_the_gap_of_an_instant_bilinear_state_is_zero_not_nan():
    assert gap_power(np.array([-1.0 + 0j]), 3)[0] == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300, 1e12])
def test_a_bad_value_never_reaches_the_state(name, bad):
    network = random_network()
    engine = create(name, network)
    samples = samples_for(network, 0, 9)
    engine.chunk(samples)
    before = engine.snapshot()
    poisoned = samples.copy()
    poisoned[5, 1] = bad
    with pytest.raises(SampleError, match=r"sample 5, lane 0, channel 'c1'"):
        engine.chunk(poisoned)
    with pytest.raises(SampleError):
        engine.step(poisoned[5])
    assert all(np.array_equal(a, b) for a, b in zip(engine.snapshot().state, before.state, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [-1, 7, 2.5, np.nan, 1e30])
def test_a_token_out_of_the_vocabulary_is_refused(name, bad):
    engine = create(name, random_network(vocabulary=7))
    engine.step([6])
    with pytest.raises(SampleError, match="a whole number from 0 to 6"):
        engine.step([bad])


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_out(name):
    network = random_network()
    engine = create(name, network, lanes=2)
    samples = samples_for(network, 0, 4, 2)
    out = np.empty((4, 2, 3), dtype=engine.dtype)
    assert engine.chunk(samples, out=out) is out
    engine.reset()
    one = np.empty((2, 3), dtype=engine.dtype)
    engine.step(samples[0], out=one)
    assert np.array_equal(one, out[0])
    for wrong in (np.zeros(2), np.zeros((3, 2)), np.zeros((2, 3)), np.zeros((2, 2, 2))):
        with pytest.raises(UsageError, match="samples: shape"):
            engine.step(wrong)
    with pytest.raises(UsageError, match="out: "):
        engine.chunk(samples, out=np.empty((4, 2, 4), dtype=engine.dtype))
    with pytest.raises(UsageError, match="lanes: 0"):
        create(name, network, lanes=0)
    assert engine.chunk(samples[:0]).shape == (0, 2, 3)


@pytest.mark.parametrize("name", NAMES)
def test_same_input_same_bits(name):
    network = random_network(2, h=33, layers=3)
    samples = samples_for(network, 0, 200)
    assert np.array_equal(create(name, network).chunk(samples), create(name, network).chunk(samples))


@pytest.mark.slow
def test_slow_states_stay_within_the_bound_over_a_long_stream():
    network = random_network(5, h=16, pairs=16, layers=2, dt_min=1e-3, dt_max=1e-3, norm="layer")
    samples = samples_for(network, 6, 20_000) + network.input.std  # an offset settles in the slow states
    expected = create("reference", network).chunk(samples)
    assert np.abs(create("cpu", network).chunk(samples) - expected).max() <= 1e-4


def test_silence_leaves_no_subnormal_state_and_the_thread_as_it_was():
    network = random_network(7, h=16, layers=1, dt_min=1e-2)
    zero_bias = replace(network.encoder, bias=np.zeros_like(network.encoder.bias))
    network = replace(network, encoder=zero_bias)
    engine = create("cpu", network)
    engine.step(network.input.mean + 1.0)
    silence = np.tile(network.input.mean, (20_000, 1))
    for _ in range(20):
        engine.chunk(silence)
        values = np.concatenate([s.view(np.float32).ravel() for s in engine.snapshot().state])
        tiny = np.finfo(np.float32).tiny
        assert not ((values != 0) & (np.abs(values) < tiny)).any()
    # In delta form a state stands still where its own change is flushed: some 1e-35, far from doing harm.
    assert np.abs(values).max() < 1e-30
    assert np.float32(1e-40) * np.float32(1.0) != 0  # the caller's own arithmetic keeps its subnormals


def test_the_rational_functions_keep_their_stated_errors():
    from numba import njit

    from edge_ssm.engines.cpu import simd

    @njit
    def gelu(address, count):
        simd.gelu(simd.float32_at(address), count)

    @njit
    def gate(address, count):
        values = simd.float32_at(address)
        simd.gate(values, simd.offset(values, count), count)

    x = np.concatenate([np.linspace(-12, 12, 100_000), [-1e30, 1e30, -1e-30, 0.0, 3.9, -3.9, 8.6, -8.6]])
    x = x.astype(np.float32)
    wide = x.astype(np.float64)
    found = np.concatenate([np.ones_like(x), x])
    gate(found.ctypes.data, len(x))
    exact = 0.5 * (1 + np.tanh(wide / 2))
    assert np.abs(found[: len(x)] - exact).max() <= 4e-7
    inner = x[np.abs(x) < 20][: len(x) // 8 * 8 - 8]
    found = inner.copy()
    gelu(found.ctypes.data, len(found))
    exact = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in inner.astype(np.float64)])
    assert (np.abs(found - exact) <= 4e-7 * np.maximum(1, np.abs(inner))).all()


def test_every_finite_half_is_read_exactly():
    from numba import njit

    from edge_ssm.engines.cpu import simd

    read_column = simd.MULTIPLY_ONE["float16"][1]

    @njit
    def read(weights, ones, out, count):
        w, y, z = simd.float32_at(weights), simd.float32_at(ones), simd.float32_at(out)
        for i in range(0, count, 8):
            read_column(w, i, z, 1, y, simd.offset(z, i), 8)

    bits = np.arange(1 << 16, dtype=np.uint16)
    halves = bits.view(np.float16)
    finite = np.isfinite(halves)
    bits[~finite] = 0
    one, found = np.ones(1, dtype=np.float32), np.empty(len(bits), dtype=np.float32)
    read(bits.ctypes.data, one.ctypes.data, found.ctypes.data, len(bits))
    assert np.array_equal(found, halves.astype(np.float32))


def test_the_two_discretizations_meet_as_the_step_shrinks():
    ssm = random_network().blocks[0].ssm
    differences = []
    for dt in (1e-2, 1e-3, 1e-4):
        small = replace(ssm, dt=np.full_like(ssm.dt, dt))
        zoh, bilinear = step_parameters(small, "zoh"), step_parameters(small, "bilinear")
        differences.append(np.abs(zoh.delta - bilinear.delta).max() / dt)
    assert differences[0] > 50 * differences[1] > 50 * 50 * differences[2]


def test_half_the_sample_rate_doubles_the_step_and_keeps_the_window_s_time():
    network = random_network(window=20, rate=50.0)
    slower = at_sample_rate(network, 25.0)
    assert slower.window == 10
    assert np.array_equal(slower.blocks[0].ssm.dt, 2 * network.blocks[0].ssm.dt)
    constant = np.tile(network.input.mean + 1.0, (4000, 1))
    fast, slow = (
        create("reference", network).chunk(constant)[-1],
        create("reference", slower).chunk(constant[:2000])[-1],
    )
    assert np.allclose(fast, slow, atol=1e-2 * np.abs(fast).max())
    with pytest.raises(NetworkError, match="sample rate"):
        at_sample_rate(random_network(rate=None), 10.0)
    for hz in (0.0, -1.0, math.nan, math.inf, 1e6, 1e-3):
        with pytest.raises(NetworkError, match="sample rate"):
            at_sample_rate(network, hz)


def test_cost_counts_what_is_left():
    network = random_network(h=8, pairs=4, active=[8, 2], d_input=3, d_output=5)
    found = cost(network)
    assert [b.active for b in found.blocks] == [8, 2]
    assert [b.bypassed for b in found.blocks] == [0, 6]
    assert found.multiply_adds == 8 * 3 + 5 * 8 + sum(6 * k * 4 + 8 + 16 * 8 for k in (8, 2))
    assert found.state_values == 2 * 4 * 10
    smaller = random_network(h=8, pairs=4, active=[3], columns=4, rows=2, mixing_dtype="int8")
    block = cost(smaller).blocks[0]
    assert (block.columns, block.rows) == (4, 2)
    assert block.multiply_adds == 6 * 3 * 4 + 4 + 4 * 4
    assert block.weight_bytes == 4 * (4 * 3 * 4 + 4 + 16 + 4 + 2 * 8) + 4 * 4


def test_the_registry_names_what_it_has():
    assert create("auto", random_network()).name == "cpu"
    with pytest.raises(UsageError, match="engine 'gpu9': unknown, expected auto"):
        create("gpu9", random_network())


def test_lanes_are_an_option_with_a_shorthand():
    network = random_network()
    assert create_engine("reference", network).lanes == 1
    assert create_engine("reference", network, lanes=4).lanes == 4
    assert create_engine("cpu", network, EngineOptions(lanes=3)).lanes == 3
    assert create_engine("cpu", network, EngineOptions(lanes=3), lanes=2).lanes == 2


def test_importing_the_package_imports_neither_numba_nor_torch():
    code = "import sys, edge_ssm; print(sorted({'numba', 'torch', 'llvmlite'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_auto_falls_back_where_an_engine_does_not_load(monkeypatch):
    broken = replace(ENGINES["cpu"], requires=("no_such_package",), hint="pip install it")
    monkeypatch.setitem(registry.ENGINES, "cpu", broken)
    assert create("auto", random_network()).name == "reference"
    with pytest.raises(EngineUnavailable, match="package no_such_package is missing; pip install it"):
        create("cpu", random_network())
    monkeypatch.setitem(registry.ENGINES, "cpu", replace(broken, module="edge_ssm.engines.none", requires=()))
    assert create("auto", random_network()).name == "reference"
    with pytest.raises(EngineUnavailable, match="does not load"):
        create("cpu", random_network())
