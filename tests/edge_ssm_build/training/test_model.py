"""The torch network, its form as plain arrays, and the stream of the artifact agree."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from support import convolution

from edge_ssm.errors import RunFailed, UsageError
from edge_ssm.formats import artifact
from edge_ssm.model.network import fingerprint
from edge_ssm.model.transforms import quantised

torch = pytest.importorskip("torch", reason="the host tool needs torch: pip install 'edge-ssm[host]'")

from edge_ssm_build.data.rotation import rotate
from edge_ssm_build.export import artifact as artifact_export
from edge_ssm_build.export import convert, quantization
from edge_ssm_build.export.agreement import compare_engine, compare_logits, convolve_windows, stream_windows
from edge_ssm_build.export.artifact import export_artifact, network_of
from edge_ssm_build.training import loop, scoring
from edge_ssm_build.training.kernels import diagonal_kernel, initial_A, initial_rank_one

SPLITS = ("train", "test")

FORMS = [
    {},
    {"prenorm": True, "mixing": "plain"},
    {"norm": "batch", "discretization": "bilinear"},
    {"norm": "batch", "prenorm": True, "pooling": "last", "init": "inv"},
    {"init": "legs", "n_layers": 3, "d_model": 5},
    {"kernel": "s4", "init": "legs", "discretization": "bilinear", "l_kernel": 50},
    {"kernel": "s4", "init": "legs", "discretization": "bilinear", "l_kernel": 50, "d_state": 64, "norm": "batch"},
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pruned", [False, True])
def test_torch_equals_the_independent_convolution_and_every_engine(fresh, data, form, pruned):
    checkpoint = fresh(**form)
    loop.fit(checkpoint, data, checkpoint.recipe)  # BatchNorm has statistics of its own after it
    if pruned:
        for block in checkpoint.model.layers():
            block.ssm.bypass([0], torch.tensor([0.7]))
            block.ssm.bypass([3])
            block.mixing.drop_columns([0], torch.tensor([0.2]))
            block.ssm.fix([0], 0.0)
            block.mixing.drop_rows([1, 4], torch.tensor([0.3, -0.1]))
    network = network_of(checkpoint)
    x, _ = scoring.split_windows(data, "test", 50)
    x = x[:6]
    expected = convolve_windows(checkpoint.model, checkpoint.spec, x)
    # Norms, D and mixing are float32 in a network; the rest is the same to float64's last digits.
    assert np.allclose([convolution.pooled(network, window) for window in x], expected, atol=2e-6)
    in_float32 = scoring.predict(checkpoint.model, scoring.as_input(x, checkpoint.spec)).numpy()
    assert np.allclose(in_float32, expected, atol=2e-5)
    assert {p.dtype for p in checkpoint.model.parameters()} == {torch.float32}
    for engine in ("reference", "cpu"):
        agreement = compare_engine(checkpoint.model, network, engine, x)
        assert agreement.labels_differing == 0
        assert agreement.max_error < 2e-5
        if pruned:
            assert {len(b.mixing.columns) for b in network.blocks} == {network.d_model - 1}
            assert {len(b.mixing.rows) for b in network.blocks} == {network.d_model - 2}
    rebuilt = convert.to_model(network, torch.float64)
    assert np.allclose(convolve_windows(rebuilt, checkpoint.spec, x), expected, atol=2e-6)


def test_a_bypassed_channel_passes_its_input(fresh):
    ssm = fresh().model.ssms()[0]
    ssm.bypass(list(range(8)))
    u = torch.randn(2, 8, 20)
    assert torch.equal(ssm(u), u)
    assert sum(p.numel() for p in ssm.ssm_parameters()) == 0


def test_an_identity_stays_one_and_a_fitted_gain_trains_on(fresh, data):
    checkpoint = fresh()
    ssm = checkpoint.model.ssms()[0]
    ssm.bypass([1])
    ssm.bypass([2], torch.tensor([0.5]))
    loop.fit(checkpoint, data, checkpoint.recipe)
    assert ssm.full_D()[1].item() == 1.0
    assert ssm.full_D()[2].item() not in (0.5, 1.0)


def test_the_start_of_s4_is_hippo():
    A, P, B = initial_rank_one("legs", 8)
    both = [torch.cat([v, v.conj()]) for v in (A, P, B)]
    dense = np.diag(both[0].numpy()) - np.outer(both[1].numpy(), both[1].numpy().conj())
    p = np.sqrt(2 * np.arange(8) + 1.0)
    hippo = -np.tril(np.outer(p, p), -1) - np.diag(np.arange(8) + 1.0)  # S4 paper, eq. 2
    # The same system in other coordinates: equal spectra, equal Markov parameters of (A, B).
    assert np.allclose(np.sort_complex(np.linalg.eigvals(dense)), np.sort_complex(np.linalg.eigvals(hippo)))
    own, theirs = both[2].numpy(), p
    for _ in range(3):
        assert np.isclose(np.vdot(own, own).real, theirs @ theirs)
        own, theirs = dense @ own, hippo @ theirs
    with pytest.raises(UsageError, match="starts from legs only"):
        initial_rank_one("lin", 8)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_small_mixing_weights_are_what_torch_scores_and_the_engines_run(fresh, data, dtype):
    checkpoint = fresh()
    x = scoring.as_input(scoring.split_windows(data, "train", 50)[0], checkpoint.spec)
    quantization.round_mixing(checkpoint.model, dtype, x, x)
    network = network_of(checkpoint)
    assert {b.mixing.dtype for b in network.blocks} == {dtype}
    x, _ = scoring.split_windows(data, "test", 50)
    for engine in ("reference", "cpu"):
        assert compare_engine(checkpoint.model, network, engine, x[:6]).max_error < 2e-5
    whole = replace(checkpoint, model=convert.to_model(network))
    assert fingerprint(network_of(whole)) == fingerprint(network)


def test_rounding_by_the_inputs_changes_less_than_rounding_each_weight(fresh, data):
    checkpoint = fresh()
    windows = [scoring.as_input(scoring.split_windows(data, split, 50)[0], checkpoint.spec) for split in SPLITS]
    before = scoring.predict_exactly(checkpoint.model, windows[1])
    plain = convert.to_network(checkpoint.model, checkpoint.spec, 50, checkpoint.labels)
    plain = replace(plain, blocks=tuple(replace(b, mixing=quantised(b.mixing, "int8")) for b in plain.blocks))
    each = (scoring.predict_exactly(convert.to_model(plain), windows[1]) - before).abs()
    quantization.round_mixing(checkpoint.model, "int8", *windows)
    together = (scoring.predict_exactly(checkpoint.model, windows[1]) - before).abs()
    assert together.median() < 0.7 * each.median()
    assert checkpoint.model.rounding_error == pytest.approx(float(together.max()))


def test_rounded_columns_are_steps_of_their_rows_and_stay_so():
    torch.manual_seed(0)
    inputs = torch.randn(500, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    weight = torch.randn(5, 12, dtype=torch.float64)
    weight[3] = 0
    moments = inputs.T @ inputs / len(inputs)
    rounded = quantization.round_columns(weight, moments)
    steps = rounded / (weight.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-30)
    assert torch.allclose(steps, steps.round(), atol=1e-6)
    assert torch.allclose(quantization.round_columns(rounded, moments), rounded, atol=1e-12)
    each = (weight / weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) * 127).round()
    each *= weight.abs().amax(dim=1, keepdim=True) / 127

    def error(actual):
        return ((inputs @ (actual - weight).T) ** 2).mean()

    assert error(rounded) < 0.7 * error(each)


def test_the_initialisations_are_the_papers():
    lin = initial_A("lin", 8)
    assert torch.allclose(lin, torch.complex(torch.full((4,), -0.5), torch.pi * torch.arange(4.0)).to(torch.complex128))
    legs = initial_A("legs", 8)
    assert torch.allclose(legs.real, torch.full((4,), -0.5, dtype=torch.float64))
    n, p = np.arange(8), np.sqrt(2 * np.arange(8) + 1.0)
    hippo = -np.tril(np.outer(p, p), -1) - np.diag(n + 1.0)  # S4D paper, eq. 6
    eigenvalues = np.linalg.eigvals(hippo + np.outer(p, p) / 2)
    assert np.allclose(np.sort(eigenvalues.imag[eigenvalues.imag > 0]), legs.imag.numpy())


def test_an_artifact_that_disagrees_is_not_written(fresh, data, tmp_path, monkeypatch):
    checkpoint = fresh()
    path = tmp_path / "m.safetensors"

    def off_by_a_little(*arguments):
        network = convert.to_network(*arguments)
        network.decoder.bias[0] += 1e-3
        return network

    monkeypatch.setattr(artifact_export, "to_network", off_by_a_little)
    with pytest.raises(RunFailed, match=r"reference engine's stream differs .* bound 1\.0e-04; nothing was written"):
        export_artifact(checkpoint, data, path)
    assert not path.exists()
    monkeypatch.undo()
    agreements, provenance = export_artifact(checkpoint, data, path)
    assert {a.labels_differing for a in agreements.values()} == {0}
    loaded = artifact.load(path)
    assert fingerprint(loaded.network) == fingerprint(network_of(checkpoint))
    assert loaded.provenance["scores"]["test"] == provenance["scores"]["test"]
    again = tmp_path / "again.safetensors"
    export_artifact(checkpoint, data, again)
    assert again.read_bytes() == path.read_bytes()


def test_poles_that_moved_far_cost_torch_no_digits(fresh, data, move_poles):
    checkpoint = fresh(d_state=8)
    move_poles(checkpoint.model)
    x, _ = scoring.split_windows(data, "test", 50)
    for ssm in checkpoint.model.ssms():
        exact = copy.deepcopy(ssm).double().kernel(50)
        A = torch.complex(-torch.exp(ssm.log_A_real), ssm.A_imag)
        dt_A = torch.exp(ssm.log_dt)[:, None] * A
        narrow = diagonal_kernel(dt_A, torch.view_as_complex(ssm.C) * (torch.exp(dt_A) - 1) / A, 50)
        assert (narrow - exact).abs().max() > 1e-3 * exact.abs().max()  # what a kernel in float32 would be off by
        assert (ssm.kernel(50) - exact).abs().max() < 1e-6 * exact.abs().max()
    for engine in ("reference", "cpu"):
        agreement = compare_engine(checkpoint.model, network_of(checkpoint), engine, x)
        assert agreement.labels_differing == 0
        assert agreement.max_error < 2e-5


def test_float64_is_the_same_however_it_is_cut_into_batches(fresh, data, monkeypatch):
    checkpoint = fresh()
    x = scoring.as_input(scoring.split_windows(data, "test", 50)[0], checkpoint.spec)
    whole = scoring.predict_exactly(checkpoint.model, x)
    for values in (1, 3 * 50 * 8):
        monkeypatch.setattr(scoring, "BATCH_VALUES", values)
        assert torch.allclose(scoring.predict_exactly(checkpoint.model, x), whole, atol=1e-12)


BOUND = 1e-4


@pytest.mark.parametrize(
    ("expected", "actual", "ties", "ties_differing", "labels_differing", "passes"),
    [
        ([1.0, 0.0, 0.5], [1.0, 0.0, 0.5], 0, 0, 0, True),
        ([1.0, 1.0, 0.5], [1.0, 1.0 + 1e-12, 0.5], 1, 1, 0, True),  # an exact tie
        ([1.0, 1.0 - 2e-5, 0.5], [1.0, 1.0 + 1e-5, 0.5], 1, 1, 0, True),
        ([1.0, 1.0 - 2e-5, 0.5], [1.0, 1.0 - 3e-5, 0.5], 1, 0, 0, True),
        ([1.0, 1.0 - 1.9e-4, 0.5], [1.0 - 9.9e-5, 1.0 - 9.5e-5, 0.5], 1, 1, 0, True),
        ([1.0, 1.0 - 3e-4, 0.5], [1.0, 1.0 + 1e-5, 0.5], 0, 0, 1, False),
        ([1.0, 1.0 - 2e-5, 0.5], [1.0, 1.0, 1.1], 1, 0, 1, False),  # not one of the two that tie
        ([1.0, 0.0, 0.5], [1.0, 2e-4, 0.5], 0, 0, 0, False),
        ([1.0, 0.0, 0.5], [1.0, 0.0, np.nan], 0, 0, 1, False),
        ([np.nan, 0.0, 0.5], [1.0, 0.0, 0.5], 0, 0, 0, False),
        ([1.0], [1.0], 0, 0, 0, True),
    ],
)
def test_a_tie_is_no_difference_and_a_difference_is_no_tie(
    expected, actual, ties, ties_differing, labels_differing, passes
):
    agreement = compare_logits(np.array([expected]), np.array([actual]), BOUND)
    assert (agreement.ties, agreement.ties_differing) == (ties, ties_differing)
    assert agreement.labels_differing == labels_differing
    assert agreement.passes() == passes


def test_two_classes_that_always_tie_are_counted_and_exported(fresh, data, tmp_path):
    checkpoint = fresh()
    with torch.no_grad():
        checkpoint.model.decoder.weight[1] = checkpoint.model.decoder.weight[0]
        checkpoint.model.decoder.bias[:2] = 5.0
    agreements, provenance = export_artifact(checkpoint, data, tmp_path / "m.safetensors")
    for agreement in agreements.values():
        assert agreement.ties == agreement.windows
        assert agreement.labels_differing == 0
        assert f"{agreement.ties} ties (two largest logits within 2.0e-04)" in agreement.summary()
    # The scores are those of the stream, whichever way it decides a tie.
    x, y = scoring.split_windows(data, "test", 50)
    streamed = stream_windows(artifact.load(tmp_path / "m.safetensors").network, "cpu", x)
    assert provenance["scores"]["test"]["accuracy"] == pytest.approx((streamed.argmax(axis=1) == y).mean())


def test_a_rotation_keeps_lengths_and_needs_vectors_of_three():
    x = np.random.default_rng(0).standard_normal((4, 5, 6))
    turned = rotate(x, 30.0, np.random.default_rng(1))
    lengths = [np.linalg.norm(v.reshape(4, 5, 2, 3), axis=-1) for v in (x, turned)]
    assert np.allclose(*lengths)
    assert np.abs(x - turned).max() > 0.1
    with pytest.raises(UsageError, match="rotation: 4 channels"):
        rotate(x[..., :4], 30.0, np.random.default_rng(1))
