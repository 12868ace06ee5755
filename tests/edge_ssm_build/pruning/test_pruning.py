"""Scores, budgets, pruning and reduction of states, each compared with an independent computation."""

import copy
from dataclasses import replace

import numpy as np
import pytest

from edge_ssm.errors import RunFailed, UsageError

torch = pytest.importorskip("torch", reason="the host tool needs torch: pip install 'edge-ssm[host]'")

from edge_ssm_build.export.agreement import compare_engine
from edge_ssm_build.export.artifact import network_of
from edge_ssm_build.pruning import calibration, states
from edge_ssm_build.pruning.candidate import bypass_operators, make_candidate
from edge_ssm_build.pruning.importance import BUDGETS, SCORES, Measured, allocate, lowest
from edge_ssm_build.pruning.plan import METHODS, Plan, check_plan, make_plan, parse_shares
from edge_ssm_build.training import loop, scoring

S4 = {"kernel": "s4", "init": "legs", "discretization": "bilinear", "l_kernel": 50}


@pytest.fixture
def trained(fresh, data):
    checkpoint = fresh(epochs=12, d_state=16)
    loop.fit(checkpoint, data, checkpoint.recipe)
    return checkpoint


def measured(checkpoint, data, bypass="gain"):
    x, y = scoring.calibration_windows(checkpoint, data)
    statistics = calibration.measure(checkpoint.model, x, y)
    return [Measured(b, s, bypass, 50) for b, s in zip(checkpoint.model.layers(), statistics, strict=True)]


def test_the_depth_law_by_hand():
    # Shares of layers 1, 2, 3 are 2 : 4 : 8; layer 0 is touched only when they are full.
    assert allocate(100, 4, 14, "depth") == [0, 2, 4, 8]
    assert allocate(100, 4, 140, "depth") == [0, 20, 40, 80]
    assert allocate(10, 3, 18, "depth") == [0, 9, 9]
    assert allocate(10, 3, 20, "depth") == [2, 9, 9]
    assert allocate(10, 1, 5, "depth") == [5]
    assert allocate(10, 2, 6, "uniform") == [3, 3]
    with pytest.raises(UsageError, match="would empty a layer"):
        allocate(10, 3, 28, "depth")


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_larger_budget_never_gives_back(budget):
    before = [0] * 4
    for total in range(4 * 31 + 1):
        after = allocate(32, 4, total, budget, before)
        assert after == allocate(32, 4, total, budget)
        assert sum(after) == total
        assert max(after) <= 31
        assert all(b >= a for a, b in zip(before, after, strict=True))
        before = after


def test_a_global_budget_scales_layers_and_keeps_one_in_each():
    scores = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([100.0, 200.0, 900.0])]
    # Over their layer's mean: 0.5 1 1.5, and 0.25 0.5 2.25.
    assert lowest(scores, [[0, 1, 2], [0, 1, 2]], 2, keep=1) == [[0], [0]]
    assert lowest(scores, [[0, 1, 2], [0, 1, 2]], 3, keep=1) == [[0], [0, 1]]
    assert lowest(scores, [[0, 1, 2], [0, 1, 2]], 4, keep=1) == [[0, 1], [0, 1]]
    assert lowest(scores, [[0, 1, 2], [0, 1, 2]], 9, keep=1) == [[0, 1], [0, 1]]


def test_the_fitted_gain_is_the_least_squares_one(trained, data):
    x, y = scoring.calibration_windows(trained, data)
    block = trained.model.layers()[0]
    with torch.no_grad():
        signals = block.signals(trained.model.encoder(x))
    v, out = (t.reshape(-1, 8).double().numpy() for t in (signals.v, signals.y))
    statistics = calibration.measure(trained.model, x, y)[0]
    for h in range(8):
        (gain,), (rest,) = np.linalg.lstsq(v[:, [h]], out[:, h], rcond=None)[:2]
        assert np.isclose(float(statistics.gain[h]), gain, rtol=1e-5)
        assert np.isclose(float(statistics.gain_error[h]), rest / len(v), rtol=1e-4, atol=1e-9)
    assert (statistics.gain_error <= statistics.identity_error + 1e-12).all()


def test_taylor_predicts_what_a_small_step_towards_the_bypass_does(trained, data):
    """Its square root bounds the first-order change of the loss, window by window."""
    x, y = scoring.calibration_windows(trained, data)
    model = trained.model
    statistics = calibration.measure(model, x, y)[-1]
    block, eps = model.layers()[-1], 1e-3

    def losses():
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(model(x), y, reduction="none").double()

    before = losses()
    for h in range(8):
        ssm = copy.deepcopy(block.ssm)
        with torch.no_grad():
            # A share eps of the way from the operator to its fitted gain.
            block.ssm.C[h] *= 1 - eps
            block.ssm.D[h] += eps * (float(statistics.gain[h]) - block.ssm.D[h])
        change = ((losses() - before) / eps).square().mean()
        block.ssm = ssm
        assert np.isclose(float(change), float(statistics.taylor_gain[h]), rtol=0.1, atol=1e-6)


def test_the_h2_score_is_the_energy_that_white_noise_gives(trained, data):
    m = measured(trained, data)[0]
    kernel = m.block.ssm.kernel(50).detach().double().numpy()
    D, gain = m.block.ssm.full_D().detach().double().numpy(), m.statistics.gain.numpy()
    kernel[:, 0] += D - gain
    noise = np.random.default_rng(0).standard_normal(200_000)
    power = m.statistics.input_power.numpy() * m.column_power().numpy()
    for h in range(8):
        energy = np.square(np.convolve(noise, kernel[h])[50:-50]).mean()
        assert np.isclose(float(SCORES["h2"](m)[h]), energy * power[h], rtol=0.05)


@pytest.mark.parametrize("score", sorted(SCORES))
@pytest.mark.parametrize("bypass", ["identity", "gain", "zero"])
def test_an_operator_that_does_nothing_goes_first(trained, data, score, bypass):
    block = trained.model.layers()[1]
    with torch.no_grad():
        block.ssm.C[5] = 0.0
        block.ssm.D[5] = 0.0 if bypass == "zero" or score == "magnitude" else 1.0
    m = measured(trained, data, bypass)[1]
    if score == "magnitude" or (bypass, score) != ("zero", "h2"):
        assert int(SCORES[score](m).argmin()) == 5


@pytest.mark.parametrize("form", [{}, S4])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_makes_a_nested_family_that_streams(fresh, data, form, method):
    base = fresh(epochs=8, d_state=8, **form)
    loop.fit(base, data, base.recipe)
    plan = replace(make_plan(METHODS[method], (0.25, 0.5, 0.75), base), seeds=(1,))
    assert plan.epochs == 1  # one eighth of 8
    current, before = base, base.model.present_config().shapes()
    x, _ = scoring.split_windows(data, "test", 50)
    for step in range(3):
        current, reached = make_candidate(current, base, data, plan, step, 1)
        shapes = current.model.present_config().shapes()
        assert sum(len(s.active) for s in shapes) == 16 - round(plan.rates[step] * 16)
        for was, now in zip(before, shapes, strict=True):
            assert set(now.active) <= set(was.active)
            assert set(now.columns) <= set(was.columns)
            assert set(now.rows) <= set(was.rows)
            assert len(now.active) >= 1
        before = shapes
        network = network_of(current)
        agreement = compare_engine(current.model, network, "cpu", x[:8])
        assert agreement.labels_differing == 0
        assert agreement.max_error < 1e-4
        if method == "compact":
            assert sum(len(b.mixing.columns) for b in network.blocks) == 16 - round(0.75 * plan.rates[step] * 16)
            assert sum(len(b.mixing.rows) for b in network.blocks) == 16 - round(0.75 * plan.rates[step] * 16)
            pairs = sum(int(b.ssm.pairs.sum()) for b in network.blocks)
            operators = sum(len(b.ssm.active) for b in network.blocks)
            assert pairs == max(operators, round(0.3 * operators * 4))
        if method == "s4op":
            assert all(b.ssm.full_D()[h].item() == 1.0 for b in current.model.layers() for h in removed_channels(b))
    assert current.history[-1]["rate"] == 0.75
    again = base
    for step in range(3):
        again, repeated = make_candidate(again, base, data, plan, step, 1)
    assert repeated == reached


def removed_channels(block):
    return set(range(8)) - set(block.ssm.active.tolist())


def test_zero_drops_the_columns_and_keeps_what_they_gave_on_average(trained, data):
    model = trained.model
    x, y = scoring.calibration_windows(trained, data)
    statistics = calibration.measure(model, x, y)
    plain = copy.deepcopy(model)
    bypass_operators(model, [[1, 6], []], statistics, "zero")
    assert model.layers()[0].mixing.columns.tolist() == [0, 2, 3, 4, 5, 7]
    # Without the gate the mean of every output is kept exactly.
    with torch.no_grad():
        features = plain.layers()[0].signals(plain.encoder(x)).g.double().mean(dim=(0, 1))
    kept = model.layers()[0].mixing
    value = kept.weight.double() @ features[kept.columns] + kept.bias.double()
    full = plain.layers()[0].mixing
    expected = full.weight.double() @ features + full.bias.double()
    assert torch.allclose(value, expected, atol=1e-5)


def test_refitting_brings_the_mixing_nearer_to_the_reference(trained, data):
    x, y = scoring.calibration_windows(trained, data)
    reference, model = trained.model, copy.deepcopy(trained.model)
    statistics = calibration.measure(model, x, y)
    bypass_operators(model, [[0, 1, 2, 3], [0, 1, 2]], statistics, "gain")

    def distance(network):
        with torch.no_grad():
            wanted = reference.layers()[0].signals(reference.encoder(x)).z
            return float((network.layers()[0].signals(network.encoder(x)).z - wanted).square().mean())

    before = distance(model)
    calibration.refit_mixing(model, reference, x)
    assert distance(model) < before


# --- states ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", states.METHODS)
def test_states_go_and_the_rest_streams_on(trained, data, method):
    model = copy.deepcopy(trained.model)
    x, y = scoring.calibration_windows(trained, data)
    states.reduce(model, calibration.measure(model, x, y), 50, 40, method)
    assert sum(int(ssm.pairs.sum()) for ssm in model.ssms()) == 40
    assert all(int(ssm.pairs.min()) >= 1 for ssm in model.ssms())
    network = network_of(replace(trained, model=model))
    assert sum(len(b.ssm.A) for b in network.blocks) == 40
    windows, _ = scoring.split_windows(data, "test", 50)
    assert compare_engine(model, network, "cpu", windows[:8]).max_error < 1e-4


def mean_square_difference(model, other, x):
    with torch.no_grad():
        return float((model(x) - other(x)).square().mean())


@pytest.mark.parametrize("form", [{}, {"discretization": "bilinear"}, S4])
def test_the_fit_beats_dropping_modes(fresh, data, form):
    checkpoint = fresh(epochs=12, d_state=16, **form)
    loop.fit(checkpoint, data, checkpoint.recipe)
    x, y = scoring.calibration_windows(checkpoint, data)
    statistics = calibration.measure(checkpoint.model, x, y)
    errors = {}
    for method in ("h2",) if form is S4 else states.METHODS:
        model = copy.deepcopy(checkpoint.model)
        states.reduce(model, statistics, 50, 40, method)
        errors[method] = mean_square_difference(model, checkpoint.model, x)
    assert errors["h2"] <= min(errors.values())
    spread = float(checkpoint.model(x).detach().var())
    assert errors["h2"] < 0.01 * spread


def test_a_system_that_has_fewer_states_is_found(fresh, data):
    """A channel of 8 pairs of which 6 do nothing is reduced to 2 without error, poles and all."""
    checkpoint = fresh(d_state=16)
    ssm = checkpoint.model.ssms()[0]
    with torch.no_grad():
        ssm.C[:, 2:] = 0.0
        ssm.log_dt.fill_(float(np.log(0.05)))
    kernel = ssm.kernel(50).detach().double()
    x, y = scoring.calibration_windows(checkpoint, data)
    fits, _ = states.fit_layer(ssm, calibration.measure(checkpoint.model, x, y)[0], 50)
    modes, error = fits[2]
    assert float(error.max()) < 1e-4
    assert torch.allclose(states.impulse_response(modes, 50), kernel, atol=2e-2 * float(kernel.abs().max()))


def test_the_fit_is_a_stationary_point_of_the_weighted_error(fresh, data):
    """First-order optimality by finite differences: no small move of a pole lowers the penalised error."""
    checkpoint = fresh(d_state=16)
    ssm = checkpoint.model.ssms()[0]
    x, y = scoring.calibration_windows(checkpoint, data)
    statistics = calibration.measure(checkpoint.model, x, y)[0]
    fit = states.Fit(ssm.kernel(50).detach().double(), statistics.spectrum[ssm.active] + 1e-3)
    start = states.HankelStart(fit.kernel).poles(3)
    modes, _ = fit.run(start)
    _, _, cost = fit.solve_residues(modes.p)
    assert (cost <= fit.solve_residues(start)[2] + 1e-12).all()
    inside = (modes.p.real > -2.9) & (modes.p.real < -3e-4) & (modes.p.imag.abs() < 3.1)
    for move in (1e-3, -1e-3, 1e-3j, -1e-3j):
        for m in range(3):
            moved = modes.p.clone()
            moved[:, m] = torch.where(inside[:, m], moved[:, m] + move, moved[:, m])
            assert (fit.solve_residues(moved)[2] >= 0.97 * cost - 1e-6).all(), (move, m)


def test_a_reduced_rank_one_channel_is_diagonal_and_one_that_keeps_all_is_not(fresh, data):
    checkpoint = fresh(d_state=16, **S4)
    x, y = scoring.calibration_windows(checkpoint, data)
    statistics = calibration.measure(checkpoint.model, x, y)
    states.reduce(checkpoint.model, statistics, 50, 100, "h2")
    network = network_of(checkpoint)
    for block in network.blocks:
        assert np.array_equal(block.ssm.rank_one, block.ssm.pairs == 8)
    assert sum(len(b.ssm.A) for b in network.blocks) <= 100


def test_what_states_can_not_be(fresh, data, trained):
    x, y = scoring.calibration_windows(trained, data)
    statistics = calibration.measure(trained.model, x, y)
    with pytest.raises(UsageError, match="15 pairs for 16 channels"):
        states.reduce(trained.model, statistics, 50, 15, "h2")
    with pytest.raises(UsageError, match="'modal': needs a diagonal kernel"):
        states.reduce(fresh(**S4).model, statistics, 50, 20, "modal")


# --- plans -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rates": ()}, "rates: "),
        ({"rates": (0.5, 0.3)}, "rates: "),
        ({"rates": (0.0,)}, "rates: "),
        ({"rates": (1.0,)}, "rates: "),
        ({"rates": (float("nan"),)}, "rates: "),
        ({"rates": (0.99,)}, "would empty a layer"),
        ({"seeds": ()}, "seeds: "),
        ({"seeds": (1, 1)}, "seeds: "),
        ({"seeds": (-1,)}, "seeds: "),
        ({"seeds": (1 << 31,)}, "seeds: "),
        ({"rates": (1e-9,)}, "each must remove more"),
        ({"rates": (0.5, 0.501)}, "each must remove more"),
        ({"choice": "luck"}, "method 'luck': unknown"),
        ({"budget": "global"}, "a random choice has no scores"),
        ({"bypass": "none"}, "bypass 'none': unknown"),
        ({"states_method": "none"}, "states method 'none': unknown"),
        ({"mixing_dtype": "int4"}, "mixing dtype 'int4': unknown"),
        ({"distill": 2.0}, "distill: 2.0"),
    ],
)
def test_plans_that_can_not_be(fresh, change, message):
    with pytest.raises(UsageError, match=message):
        check_plan(fresh(), replace(Plan((0.5,), (0,)), **change))


def test_shares():
    rates = (0.2, 0.4)
    assert parse_shares("rate", rates, "x") == rates
    assert parse_shares("0.5*rate", rates, "x") == (0.1, 0.2)
    assert parse_shares("0.3", rates, "x") == (0.3, 0.3)
    assert parse_shares("0.1,0.3", rates, "x") == (0.1, 0.3)
    assert parse_shares("0", rates, "x") == ()
    for bad in ("", "1", "-0.1", "0.3,0.1", "0.1,0.2,0.3", "nan", "9*rate", "x*rate", "rate*2"):
        with pytest.raises(UsageError, match=r"--rows .*: expected rate"):
            parse_shares(bad, rates, "--rows")


def test_a_pruned_checkpoint_is_no_start(fresh):
    start = fresh()
    start.model.ssms()[0].bypass([1])
    with pytest.raises(UsageError, match="already pruned"):
        check_plan(start, Plan((0.5,), (0,)))


def test_s4_needs_its_own_state_method(fresh):
    with pytest.raises(UsageError, match="'last': needs a diagonal kernel"):
        check_plan(fresh(**S4), Plan((0.5,), (0,), states=(0.5,), states_method="last"))


def test_a_loss_that_is_not_finite_ends_a_candidate(fresh, data):
    base = fresh(epochs=8)
    with torch.no_grad():
        base.model.decoder.bias.fill_(float("nan"))
    with pytest.raises(RunFailed, match="the loss is nan"):
        make_candidate(base, base, data, check_plan(base, Plan((0.5,), (0,))), 0, 0)
