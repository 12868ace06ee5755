"""The torch network, its form as plain arrays, and the stream of the artifact say the same."""

import convolution
import numpy as np
import pytest

from edge_ssm import artifact
from edge_ssm.errors import RunFailed, UsageError
from edge_ssm.network import fingerprint

torch = pytest.importorskip("torch", reason="the host tool needs torch: pip install 'edge-ssm[host]'")

from edge_ssm_build import convert, exporting, training  # noqa: E402
from edge_ssm_build.model import initial_A  # noqa: E402
from edge_ssm_build.rotation import rotate  # noqa: E402

FORMS = [
    {},
    {"prenorm": True, "mixing": "plain"},
    {"norm": "batch", "discretization": "bilinear"},
    {"norm": "batch", "prenorm": True, "pooling": "last", "init": "inv"},
    {"init": "legs", "n_layers": 3, "d_model": 5},
]


def network_of(checkpoint):
    return convert.to_network(checkpoint.model, checkpoint.spec, checkpoint.recipe.window, checkpoint.labels)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pruned", [False, True])
def test_torch_equals_the_independent_convolution_and_every_engine(fresh, data, form, pruned):
    checkpoint = fresh(**form)
    training.fit(checkpoint, data, checkpoint.recipe)  # BatchNorm has statistics of its own after it
    if pruned:
        for ssm in checkpoint.model.ssms():
            ssm.bypass([0, 3])
    network = network_of(checkpoint)
    x, _ = training.split_windows(data, "test", 50)
    x = x[:6]
    expected = training.predict(checkpoint.model, training.as_input(x, checkpoint.spec)).numpy()
    assert np.allclose([convolution.pooled(network, window) for window in x], expected, atol=2e-5)
    for engine in ("reference", "cpu"):
        agreement = exporting.compare(checkpoint.model, network, engine, x)
        assert agreement.labels_differing == 0
        assert agreement.max_error < 2e-5
    rebuilt = convert.to_model(network)
    assert np.allclose(training.predict(rebuilt, training.as_input(x, checkpoint.spec)).numpy(), expected, atol=2e-5)


def test_a_bypassed_channel_passes_its_input(fresh):
    ssm = fresh().model.ssms()[0]
    ssm.bypass(list(range(8)))
    u = torch.randn(2, 8, 20)
    assert torch.equal(ssm(u), u)
    assert sum(p.numel() for p in ssm.parameters()) == 0


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

    monkeypatch.setattr(exporting, "to_network", off_by_a_little)
    with pytest.raises(RunFailed, match=r"reference engine's stream differs .* bound 0\.0001; nothing was written"):
        exporting.export(checkpoint, data, path)
    assert not path.exists()
    monkeypatch.undo()
    agreements, made_by = exporting.export(checkpoint, data, path)
    assert {a.labels_differing for a in agreements.values()} == {0}
    loaded = artifact.load(path)
    assert fingerprint(loaded.network) == fingerprint(network_of(checkpoint))
    assert loaded.provenance["scores"]["test"] == made_by["scores"]["test"]
    again = tmp_path / "again.safetensors"
    exporting.export(checkpoint, data, again)
    assert again.read_bytes() == path.read_bytes()


def test_a_rotation_keeps_lengths_and_needs_vectors_of_three():
    x = np.random.default_rng(0).standard_normal((4, 5, 6))
    turned = rotate(x, 30.0, np.random.default_rng(1))
    lengths = [np.linalg.norm(v.reshape(4, 5, 2, 3), axis=-1) for v in (x, turned)]
    assert np.allclose(*lengths)
    assert np.abs(x - turned).max() > 0.1
    with pytest.raises(UsageError, match="rotation: 4 channels"):
        rotate(x[..., :4], 30.0, np.random.default_rng(1))
