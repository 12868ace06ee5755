"""Checkpoints of other projects: the artifact streams what they compute; what cannot be read or streamed is refused."""

import pickle
import sys

import numpy as np
import pytest
from support import convolution

from edge_ssm.cli.app import run_command
from edge_ssm.errors import InputRefused, RunFailed, UsageError
from edge_ssm.formats import artifact
from edge_ssm.model.transforms import at_sample_rate

torch = pytest.importorskip("torch", reason="the host tool needs torch: pip install 'edge-ssm[host]'")

from support import layouts

from edge_ssm_build.cli.app import cli
from edge_ssm_build.importers import convert, verification
from edge_ssm_build.importers.architecture import read_architecture
from edge_ssm_build.importers.checkpoints import read_checkpoint
from edge_ssm_build.training import loop, scoring

S4 = {"kernel": "s4", "init": "legs", "discretization": "bilinear", "l_kernel": 50}
FORMS = {
    "minimal S4D": ({"init": "legs"}, layouts.minimal_s4d, {}),
    "minimal S4D, prenorm, batch": ({"prenorm": True, "norm": "batch"}, layouts.minimal_s4d, {}),
    "S4Block diag zoh": ({"init": "legs"}, layouts.block_stack, {"discretization": "zoh"}),
    "S4Block diag bilinear": ({"discretization": "bilinear"}, layouts.block_stack, {"discretization": "bilinear"}),
    "S4Block dplr": (S4, layouts.block_stack, {}),
    "S4Block dplr, N 64": (S4 | {"d_state": 64}, layouts.block_stack, {}),
    "S4oP S4D": ({}, layouts.s4op, {}),
    "S4oP S4": (S4, layouts.s4op, {}),
}


@pytest.fixture
def write_checkpoint(fresh, data, tmp_path):
    """A function: form -> (our checkpoint, the file in the other layout, the arch file). Pruned where asked."""

    def make(form, pruned=False, epochs=2, **changes):
        options, layout, stated = FORMS[form]
        checkpoint = fresh(epochs=epochs, **({"d_state": 16} | options))
        loop.fit(checkpoint, data, checkpoint.recipe)
        if pruned:
            for ssm, channels in zip(checkpoint.model.ssms(), ([1, 4], [0, 1, 2, 3, 4, 5, 7]), strict=True):
                ssm.bypass(channels)
        path, arch = tmp_path / "model.pth", tmp_path / "arch.toml"
        torch.save(layout(checkpoint.model), path)
        fields = {
            "prenorm": checkpoint.model.config.prenorm,
            "pooling": "mean",
            "window": 50,
            "channels": list(checkpoint.spec.channels),
            "labels": list(checkpoint.labels),
            "mean": checkpoint.spec.mean.tolist(),
            "std": checkpoint.spec.std.tolist(),
        }
        arch.write_text(layouts.arch_toml(**(fields | stated | changes)))
        return checkpoint, path, arch

    return make


def read(path, arch, form="auto"):
    return read_checkpoint(path, form, read_architecture(arch))


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("form", sorted(FORMS))
def test_every_form_streams_what_it_computed(write_checkpoint, data, tmp_path, form, pruned):
    if pruned and not form.startswith("S4oP"):
        pytest.skip("only S4oP prunes")
    ours, path, arch = write_checkpoint(form, pruned)
    checkpoint = read(path, arch)
    network = convert.to_network(checkpoint)
    # Against torch's own forward pass on recorded windows, which knows nothing of the import.
    x, _ = scoring.split_windows(data, "test", 50)
    expected = scoring.predict(ours.model, scoring.as_input(x[:6], ours.spec)).numpy()
    own = [verification.checkpoint_outputs(checkpoint, w).mean(axis=0) for w in x[:6]]
    assert np.abs(np.array(own) - expected).max() < 2e-5
    # Against the tests' convolution, which knows nothing of either.
    assert np.abs(np.array([convolution.pooled(network, w) for w in x[:2]]) - expected[:2]).max() < 2e-5
    _, deviations = convert.import_checkpoint(checkpoint, path, tmp_path / "m.safetensors")
    assert {a.engine for a in deviations} == {"reference", "cpu"}
    assert max(a.error for a in deviations) < 1e-4
    loaded = artifact.load(tmp_path / "m.safetensors")
    assert loaded.provenance["imported"]["form"] == checkpoint.format_name
    assert [len(b.ssm.active) for b in loaded.network.blocks] == [len(a) for a in ours.model.active()]


@pytest.mark.parametrize(("real", "dt"), [("softplus", "exp"), ("relu", "softplus"), ("none", "softplus")])
def test_parameter_transforms(write_checkpoint, data, real, dt):
    form = "S4Block diag zoh"
    ours, path, arch = write_checkpoint(form, real_transform=real, dt_transform=dt)
    torch.save(layouts.block_stack(ours.model, real=real, dt=dt), path)
    x, _ = scoring.split_windows(data, "test", 50)
    expected = scoring.predict(ours.model, scoring.as_input(x[:3], ours.spec)).numpy()
    network = convert.to_network(read(path, arch))
    assert np.abs(np.array([convolution.pooled(network, w) for w in x[:3]]) - expected).max() < 1e-4


@pytest.mark.parametrize("form", ["S4Block diag bilinear", "S4Block dplr"])
def test_tied_systems_are_copied_to_every_channel(write_checkpoint, tmp_path, form):
    ours, path, arch = write_checkpoint(form)
    torch.save(layouts.block_stack(ours.model, tied=True), path)
    network, deviations = convert.import_checkpoint(read(path, arch), path, tmp_path / "m.safetensors")
    A = network.blocks[0].ssm.A.reshape(8, -1)
    assert (A[0] == A).all()
    assert max(a.error for a in deviations) < 1e-4


def test_a_step_of_its_own_for_each_state(write_checkpoint, tmp_path):
    ours, path, arch = write_checkpoint("S4Block diag zoh")
    torch.save(layouts.block_stack(ours.model, untied_dt=True), path)
    _, deviations = convert.import_checkpoint(read(path, arch), path, tmp_path / "m.safetensors")
    assert max(a.error for a in deviations) < 1e-4


def test_a_truncated_C_is_undone_for_streams_longer_than_it(write_checkpoint):
    _, path, arch = write_checkpoint("S4Block dplr")
    checkpoint = read(path, arch)
    assert checkpoint.layers[0].l_kernel == 50
    network = convert.to_network(checkpoint)
    x = verification.random_samples(network, 3000)
    assert max(a.error for a in verification.compare_with_checkpoint(network, checkpoint, x)) < 1e-4
    state = torch.load(path)
    for i in range(2):
        state[f"s4_layers.{i}.layer.kernel.l_kernel"] = torch.tensor(0)
    torch.save(state, path)
    other = convert.to_network(read(path, arch))
    assert np.abs(other.blocks[0].ssm.C - network.blocks[0].ssm.C).max() > 1e-3


def fourier(checkpoint):
    """HiPPO-Fourier's (A, P, B) in place of LegS: its eigenvectors are well apart."""
    for ssm in checkpoint.model.ssms():
        k, m, _ = ssm.C.shape
        n = torch.arange(m)
        with torch.no_grad():
            ssm.log_A_real.copy_(torch.log(torch.full((k, m), 0.1)))
            ssm.A_imag.copy_((2 * torch.pi * n + 0.1).expand(k, m))
            ssm.P.copy_(torch.view_as_real(torch.ones(m, dtype=torch.complex64)).expand(k, m, 2))
            ssm.B.copy_(ssm.P)


def test_each_channel_takes_the_form_that_float32_holds(write_checkpoint, tmp_path):
    _, path, arch = write_checkpoint("S4Block dplr, N 64", epochs=1)
    legs, deviations = convert.import_checkpoint(read(path, arch), path, tmp_path / "legs.safetensors")
    assert all(b.ssm.rank_one.all() for b in legs.blocks)
    assert max(a.error for a in deviations) < 1e-4
    ours, path, arch = write_checkpoint("S4Block dplr", epochs=1)
    fourier(ours)
    torch.save(layouts.block_stack(ours.model), path)
    network, deviations = convert.import_checkpoint(read(path, arch), path, tmp_path / "fourier.safetensors")
    assert not any(b.ssm.rank_one.any() for b in network.blocks)
    assert max(a.error for a in deviations) < 1e-4


@pytest.mark.parametrize("form", ["minimal S4D", "S4Block dplr, N 64"])
@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.slow
def test_another_sample_rate_is_the_convolution_discretised_anew(write_checkpoint, form, factor):
    _, path, arch = write_checkpoint(form, sample_rate_hz=50.0)
    network = at_sample_rate(convert.to_network(read(path, arch)), 50.0 * factor)
    assert network.window == 50 * factor
    assert max(a.error for a in verification.compare_with_convolution(network, 1000)) < 1e-4
    x = verification.random_samples(network, 120)
    # And against the tests' own convolution, whose matrices know only dt.
    expected = convolution.outputs(network, x)
    assert np.abs(verification.network_outputs(network, x) - expected).max() < 1e-9


def test_tokens(write_checkpoint, fresh, tmp_path):
    _, path, arch = write_checkpoint("S4oP S4D")
    content = torch.load(path)
    state = content["model_state_dict"]
    del state["embedding.bias"]
    state["embedding.weight"] = torch.randn(11, 8)
    torch.save(content, path)
    arch.write_text(layouts.arch_toml(prenorm=False, window=50))
    network, deviations = convert.import_checkpoint(read(path, arch), path, tmp_path / "m.safetensors")
    assert network.encoder.embedding.shape == (11, 8)
    assert max(a.error for a in deviations) < 1e-4


def changed(path, **changes):
    """Save the state dictionary with keys changed; None removes one."""
    content = torch.load(path)
    state = content.get("model_state_dict", content)
    for name, value in changes.items():
        key = name.replace("__", ".")
        if value is None:
            del state[key]
        else:
            state[key] = value
    torch.save(content, path)


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("minimal S4D", {"decoder__bias": None}, "decoder.bias is missing"),
        ("minimal S4D", {"s4_layers__0__kernel__log_dt": torch.zeros(5)}, r"shape \(5,\), expected \(8,\)"),
        ("minimal S4D", {"s4_layers__0__D": torch.full((8,), torch.nan)}, "holds a non-finite value"),
        ("minimal S4D", {"attention__weight": torch.zeros(3)}, "unknown keys attention.weight"),
        ("minimal S4D", {"s4_layers__0__output_linear__0__weight": torch.zeros(9, 8, 1)}, r"shape \(9, 8\), expected"),
        ("S4Block diag zoh", {"s4_layers__0__input_gate__0__weight": torch.zeros(8, 8)}, "belongs to a gate"),
        ("S4Block diag zoh", {"s4_layers__0__input_linear__weight": torch.zeros(8, 8)}, "belongs to a bottleneck"),
        ("S4Block diag zoh", {"s4_layers__0__layer__kernel__C": torch.zeros(2, 8, 8, 2)}, "bidirectional"),
        ("S4Block diag zoh", {"s4_layers__0__layer__D": torch.zeros(2, 8)}, "only channels = 1"),
        ("S4Block dplr", {"s4_layers__0__layer__kernel__P": torch.zeros(2, 8, 8, 2)}, "has rank 2"),
        ("S4Block dplr", {"s4_layers__0__layer__kernel__inv_dt": torch.zeros(8, 8)}, "dt_tie = False"),
        ("S4oP S4D", {"s4d_layers__0__D": torch.zeros(7)}, r"shape \(8, 8, 2\), expected \(7, any, 2\)"),
    ],
)
def test_what_can_not_be_read_or_streamed_is_refused_with_its_name(write_checkpoint, tmp_path, form, change, message):
    _, path, arch = write_checkpoint(form, epochs=1)
    changed(path, **change)
    with pytest.raises(InputRefused, match=message) as caught:
        convert.import_checkpoint(read(path, arch), path, tmp_path / "m.safetensors")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": None}, "ARCH window: missing"),
        ({"prenorm": None}, "ARCH prenorm: missing"),
        ({"discretization": None}, "ARCH discretization: missing"),
        ({"d_model": 9}, "ARCH d_model: 9, but .* has 8"),
        ({"n_layers": 3}, "ARCH n_layers: 3, but .* has 2"),
        ({"kernel": "dplr"}, "ARCH kernel: dplr, but .* has diag"),
        ({"norm": "batch"}, "ARCH norm: batch, but .* has layer"),
        ({"mean": [0.0]}, "ARCH mean: 1 given, expected 6"),
        ({"labels": ["a"]}, "ARCH labels: 1 given"),
    ],
)
def test_what_the_arch_must_say(write_checkpoint, tmp_path, change, message):
    _, path, arch = write_checkpoint("S4Block diag zoh", epochs=1)
    lines = [line for line in arch.read_text().splitlines() if line.split(" = ")[0] not in change]
    lines += layouts.arch_toml(**{k: v for k, v in change.items() if v is not None}).splitlines()
    arch.write_text("\n".join(lines))
    with pytest.raises(UsageError, match=message):
        convert.import_checkpoint(read(path, arch), path, tmp_path / "m.safetensors")


@pytest.mark.parametrize("text", ["window = ", "window = 0", "colour = 1", 'norm = "rms"', "\xff"])
def test_a_broken_arch_is_refused(tmp_path, text):
    (tmp_path / "a.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputRefused, match=r"a\.toml: "):
        read_architecture(tmp_path / "a.toml")


def test_a_pickle_with_code_is_refused_and_never_run(write_checkpoint, tmp_path):
    _, path, arch = write_checkpoint("minimal S4D", epochs=1)

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Hostile()}, path)
    with pytest.raises(InputRefused, match="damaged, or not a checkpoint"):
        read(path, arch)
    for bad in (path.read_bytes()[:200], b"", b"garbage", pickle.dumps(Hostile())):
        path.write_bytes(bad)
        with pytest.raises(InputRefused, match="damaged, or not a checkpoint"):
            read(path, arch)
    assert not (tmp_path / "ran").exists()
    for content in ([1, 2], {"a": 1}, {}, {"x.weight": torch.zeros(2)}):
        torch.save(content, path)
        with pytest.raises(InputRefused):
            read(path, arch)


def test_an_artifact_that_disagrees_is_not_written(write_checkpoint, tmp_path, monkeypatch):
    _, path, arch = write_checkpoint("minimal S4D", epochs=1)
    checkpoint = read(path, arch)
    honest = convert.to_network

    def wrong(read_checkpoint):
        network = honest(read_checkpoint)
        network.decoder.bias[0] += 1e-3
        return network

    monkeypatch.setattr(convert, "to_network", wrong)
    with pytest.raises(RunFailed, match="nothing was written"):
        convert.import_checkpoint(checkpoint, path, tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["edge-ssm-build", *map(str, arguments)])
    status = run_command(cli, "edge-ssm-build")
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.slow
def test_import_and_verify_by_hand(write_checkpoint, tmp_path, demo_stream, monkeypatch, capsys):
    _, path, arch = write_checkpoint("S4oP S4", pruned=True)
    model = tmp_path / "m.safetensors"
    arguments = [path, "--from", "s4op", "--arch", arch, "--output", model, "--input", demo_stream]
    status, out, err = call(monkeypatch, capsys, "import", *arguments)
    assert status == 0, err
    assert "active [6, 1]" in out
    assert "cpu: 8400 samples" in out
    status, out, err = call(monkeypatch, capsys, "verify", model, path, "--arch", arch, "--drift", 2000)
    assert status == 0, err
    assert out.count("  ok") == 5
    _, other, other_arch = write_checkpoint("S4oP S4", pruned=True, epochs=3)
    status, out, err = call(monkeypatch, capsys, "verify", model, other, "--arch", other_arch, "--drift", 0)
    assert status == 1
    assert "TOO LARGE" in out
    assert "off by more than 0.0001" in err
    status, _, err = call(monkeypatch, capsys, "verify", model, path)
    assert status == 2
    assert "go together" in err
    status, _, err = call(monkeypatch, capsys, "import", path, "--from", "mamba", "--arch", arch, "--output", model)
    assert status == 2
    assert "--from 'mamba': unknown" in err
