"""edge-ssm-build export --to onnx and tflite, from an artifact and from a checkpoint."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from support import commands
from support.networks import random_network, samples_for

from edge_ssm.engines.registry import EngineOptions, create
from edge_ssm.errors import InputRefused, RunFailed
from edge_ssm.formats import artifact, exported, loading

pytest.importorskip("onnx", reason="makes ONNX graphs: pip install 'edge-ssm[export]'")
pytest.importorskip("onnxruntime", reason="runs them: pip install 'edge-ssm[export]'")
pytest.importorskip("flatbuffers", reason="makes TFLite graphs: pip install 'edge-ssm[export]'")
pytest.importorskip("ai_edge_litert", reason="runs them: pip install 'edge-ssm[export]'")

from edge_ssm_build.export import graphs

KINDS = ["onnx", "tflite"]
BUILD = [sys.executable, "-c", "from edge_ssm_build.cli.app import main; main()"]


def build(*arguments):
    return commands.run([*BUILD, *map(str, arguments)], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", ["float32", "float16", "int8"])
def test_an_artifact_is_exported_and_its_error_said(kind, weights, demo_model, demo_stream, tmp_path):
    output = tmp_path / f"demo.{kind}"
    done = build("export", demo_model, "--to", kind, "--weights", weights, "--input", demo_stream, "--output", output)
    assert done.returncode == 0, done.stderr
    assert f"{kind}: {weights} weights, 4096 samples (demo.csv): largest error " in done.stdout
    assert "0 of 20 labels differ" in done.stdout
    measured = loading.load(output).exported.document.measured
    assert measured.samples == 4096
    assert measured.max_error <= {"float32": 1e-4, "float16": 0.05, "int8": 5.0}[weights]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_exported(kind, fresh, tmp_path):
    pytest.importorskip("torch", reason="reads checkpoints")
    from edge_ssm_build.training.checkpoint import save_checkpoint

    save_checkpoint(tmp_path / "c.pt", fresh())
    output = tmp_path / f"c.{kind}"
    done = build("export", tmp_path / "c.pt", "--to", kind, "--weights", "int8", "--output", output)
    assert done.returncode == 0, done.stderr
    assert f"{kind}: int8 weights, " in done.stdout
    assert "(validation split)" in done.stdout
    model = loading.load(output)
    # The source is the rounded network: its own stream was held to torch's.
    assert model.network.blocks[0].mixing.dtype == "int8"
    assert model.artifact.provenance["history"][-1]["stage"] == "round"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_artifact_s_own_weights_are_the_default(kind, tmp_path):
    for dtype in ("float32", "float16"):
        network = random_network(mixing_dtype=dtype)
        artifact.save(tmp_path / "m.safetensors", network, {})
        graph = graphs.export_graph(tmp_path / "m.safetensors", kind)
        assert graph.weights == dtype
        assert graph.measured.max_error <= 1e-4
    mixed = replace(network, blocks=(network.blocks[0], random_network(mixing_dtype="int8").blocks[1]))
    artifact.save(tmp_path / "m.safetensors", mixed, {})
    graph = graphs.export_graph(tmp_path / "m.safetensors", kind)
    assert graph.weights == "float32"
    assert graph.measured.max_error <= 1e-4


@pytest.mark.slow
def test_a_chunk_is_in_the_file(tmp_path):
    network = random_network(window=20)
    artifact.save(tmp_path / "m.safetensors", network, {})
    for kind, chunk, size in (("onnx", "any", exported.ANY_LENGTH), ("tflite", "5", 5)):
        output = tmp_path / f"m.{kind}"
        done = build("export", tmp_path / "m.safetensors", "--to", kind, "--chunk", chunk, "--output", output)
        assert done.returncode == 0, done.stderr
        model = loading.load(output)
        assert model.graph.spec.chunk == size
        samples = samples_for(network, 0, 18)
        found = create(kind, model.network, EngineOptions(graph=model.graph)).chunk(samples)
        assert np.array_equal(found, create(kind, network).chunk(samples))


@pytest.mark.slow
def test_the_same_export_gives_the_same_bytes(demo_model):
    for kind in KINDS:
        assert graphs.export_graph(demo_model, kind).content == graphs.export_graph(demo_model, kind).content


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "onnx", "--output", "x.tflite"], "--output x.tflite: expected a name that ends in .onnx"),
        (["--to", "onnx", "--output", "no/x.onnx"], "no/x.onnx: its folder is missing"),
        (["--to", "onnx", "--chunk", "8", "--output", "x.onnx"], "an onnx graph takes any number of samples; give any"),
        (["--to", "tflite", "--chunk", "any", "--output", "x.tflite"], "expected 2 to 256 samples"),
        (["--to", "tflite", "--weights", "auto", "--output", "x.tflite"], "--weights auto: for a checkpoint only"),
        (["--to", "onnx", "--input", "none.csv", "--output", "x.onnx"], "none.csv: cannot be read"),
        (["--output", "x.safetensors"], "is an artifact already; give --to onnx or tflite"),
    ],
)
def test_wrong_use_is_one_line(arguments, message, demo_model, tmp_path):
    command = [*BUILD, "export", str(demo_model), *arguments]
    done = commands.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("link", [False, True])
def test_an_export_costs_none_of_its_inputs(link, demo_model, demo_stream, tmp_path):
    model, recording = tmp_path / "m.safetensors", tmp_path / "recording.onnx"
    model.write_bytes(demo_model.read_bytes())
    recording.write_bytes(demo_stream.read_bytes())
    output = recording
    if link:
        output = tmp_path / "link.onnx"
        output.symlink_to(model)
    done = build("export", model, "--to", "onnx", "--input", recording, "--output", output)
    assert done.returncode == 2
    lost = f"ARTIFACT {model}" if link else f"--input {recording}"
    assert f"--output {output}: is {lost} too, which would be lost; name another file" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert model.read_bytes() == demo_model.read_bytes()
    assert recording.read_bytes() == demo_stream.read_bytes()


def test_an_artifact_is_known_by_its_content(demo_model, tmp_path):
    odd = tmp_path / "m.onnx"
    odd.write_bytes(demo_model.read_bytes())
    done = build("export", odd, "--to", "tflite", "--output", tmp_path / "x.tflite")
    assert done.returncode == 0, done.stderr
    (tmp_path / "exported.safetensors").write_bytes((tmp_path / "x.tflite").read_bytes())
    done = build("export", tmp_path / "exported.safetensors", "--to", "onnx", "--output", tmp_path / "y.onnx")
    assert "exported.safetensors: is an exported file already" in done.stderr


def test_what_is_off_by_too_much_is_not_written(demo_model, tmp_path):
    output = tmp_path / "x.onnx"
    done = build("export", demo_model, "--to", "onnx", "--weights", "int8", "--error-bound", "0.1", "--output", output)
    assert done.returncode == 1
    assert "nothing was written: take larger weights" in done.stderr
    assert not output.exists()
    with pytest.raises(RunFailed, match="off by up to"):
        graphs.export_graph(demo_model, "tflite", "float16", error_bound=1e-6)
    with pytest.raises(InputRefused, match=r"none\.safetensors: cannot be read"):
        graphs.export_graph(tmp_path / "none.safetensors", "onnx")


def test_an_artifact_is_exported_without_torch(demo_model, tmp_path):
    hidden = "import sys; sys.modules['torch'] = None; from edge_ssm_build.cli.app import main; main()"
    command = [sys.executable, "-c", hidden, "export", demo_model, "--to", "onnx", "--output", tmp_path / "x.onnx"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    done = subprocess.run(
        [sys.executable, "-c", "from edge_ssm.cli.app import main; main()", "inspect", tmp_path / "x.onnx", "--json"],
        capture_output=True,
        check=True,
        timeout=120,
    )
    assert json.loads(done.stdout)["graph"]["samples"] == graphs.SAMPLES
