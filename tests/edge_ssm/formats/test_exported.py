"""Exported ONNX and TFLite files: they step like the network, hold all that a stream needs, and defects are refused."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache

import msgspec
import numpy as np
import pytest
from support import commands
from support.networks import random_network, samples_for

from edge_ssm.engines import registry
from edge_ssm.engines.registry import ENGINES, EngineOptions, create
from edge_ssm.errors import ArtifactError, EngineUnavailable, UsageError
from edge_ssm.formats import artifact, containers, exported, loading
from edge_ssm.model.network import fingerprint
from edge_ssm.model.transforms import quantised

pytest.importorskip("onnx", reason="makes ONNX graphs: pip install onnx")
pytest.importorskip("onnxruntime", reason="runs them: pip install 'edge-ssm[onnx]'")
pytest.importorskip("flatbuffers", reason="makes TFLite graphs: pip install flatbuffers")
pytest.importorskip("ai_edge_litert", reason="runs them: pip install 'edge-ssm[tflite]'")

KINDS = ["onnx", "tflite"]
REACH = 14.0
"""Larger than any input of a mixing in these tests."""
RUN = [sys.executable, "-c", "from edge_ssm.cli.app import main; main()"]


def sealed(network, kind, weights="float32", reach=(), chunk=1):
    content, digest = artifact.to_bytes(network, {"made": "for a test"})
    graph = exported.build(kind, network, weights, reach, chunk)
    return exported.to_bytes(graph, network, content, digest, exported.MeasuredError(0.0, 0, "nothing"))


def call(*arguments):
    return commands.run([*RUN, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@cache
def long_stream(form, percent):
    """Return a network, 20,000 samples, and the reference engine's outputs."""
    left = round(20 * (1 - percent / 100))
    options = {"discretization": "bilinear", "rank_one": 1.0} if form == "S4" else {}
    network = random_network(3, h=20, pairs=8, active=[left] * 2, **options)
    samples = samples_for(network, 4, 20_000)
    return network, samples, create("reference", network).chunk(samples)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["S4D", "S4"])
@pytest.mark.parametrize("percent", [0, 50, 90])
def test_a_long_stream_agrees_with_the_reference(kind, form, percent):
    network, samples, exact = long_stream(form, percent)
    assert np.abs(create(kind, network).chunk(samples) - exact).max() <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_pruning_makes_the_graph_smaller(kind):
    sizes = [
        len(exported.build(kind, random_network(h=32, pairs=16, active=[k] * 2, columns=k, rows=k)).content)
        for k in (32, 16, 3)
    ]
    assert sizes[0] > 1.5 * sizes[1] > 1.5 * 1.5 * sizes[2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", [random_network(ragged=True, h=16, pairs=9), random_network(vocabulary=7)])
def test_a_chunk_graph_computes_the_same_bits(kind, network):
    samples = samples_for(network, 0, 23)
    graph = exported.build(kind, network, chunk=exported.ANY_LENGTH if kind == "onnx" else 4)
    stepped = create(kind, network).chunk(samples)
    engine = create(kind, network, EngineOptions(graph=graph))
    assert np.array_equal(engine.chunk(samples), stepped)
    engine.reset()
    assert np.array_equal(np.stack([engine.step(x) for x in samples]), stepped)
    engine.reset()
    assert np.array_equal(np.concatenate([engine.chunk(samples[:5]), engine.chunk(samples[5:])]), stepped)


@pytest.mark.parametrize("kind", KINDS)
def test_smaller_weights_are_off_by_their_rounding_alone(kind):
    network = random_network(1, h=33, pairs=5, rows=20)
    samples = samples_for(network, 0, 300)
    for weights, bound in (("float16", 1e-4), ("int8", 0.1)):
        blocks = tuple(replace(b, mixing=quantised(b.mixing, weights)) for b in network.blocks)
        exact = create("reference", replace(network, blocks=blocks)).chunk(samples)
        graph = exported.build(kind, network, weights, [REACH] * len(network.blocks))
        assert np.abs(create(kind, network, EngineOptions(graph=graph)).chunk(samples) - exact).max() <= bound


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_its_artifact_and_what_a_stream_needs(kind, tmp_path):
    network = random_network(2, window=12, rate=25.0)
    path = tmp_path / f"m.{kind}"
    path.write_bytes(sealed(network, kind, "int8", [3.0, 3.0]))
    model = loading.load(path)
    assert fingerprint(model.network) == fingerprint(network)
    assert model.resolve_engine("auto") == kind
    assert model.resolve_engine("cpu") == "cpu"
    content, digest = artifact.to_bytes(network, {"made": "for a test"})
    assert model.artifact == replace(artifact.parse(content), network=model.network)
    text = path.read_bytes()[slice(*containers.metadata(path.read_bytes(), kind)["edge_ssm"])]
    document = json.loads(text)
    assert document["source_digest"] == digest
    assert document["form"]["fingerprint"] == fingerprint(network)
    assert document["form"]["states"][0][0]["channels"] == list(range(6))
    stream = document["stream"]
    assert (stream["window"], stream["pooling"], stream["task"]) == (12, "mean", "classification")
    assert stream["labels"] == ["class 0", "class 1", "class 2"]
    assert stream["input"]["channels"] == ["c0", "c1"]
    assert stream["input"]["sample_rate_hz"] == 25.0
    assert stream["input"]["mean"] == network.input.mean.tolist()


def test_the_onnx_package_and_runtime_read_the_same_metadata():
    import onnx
    import onnxruntime

    content = sealed(random_network(), "onnx")
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    found = {entry.key: entry.value for entry in model.metadata_props}
    session = onnxruntime.InferenceSession(content)
    assert session.get_modelmeta().custom_metadata_map == found
    assert set(found) == {exported.DOCUMENT_KEY, exported.ARTIFACT_KEY}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_a_snapshot_moves_from_a_file_to_the_cpu_engine_and_back(kind, weights, tmp_path):
    network = random_network(5, ragged=True, discretization="bilinear", rank_one=0.5)
    path = tmp_path / f"m.{kind}"
    path.write_bytes(sealed(network, kind, weights, [5.0] * 2))
    model = loading.load(path)
    samples = samples_for(network, 0, 40)
    first, cpu = create(kind, model.network, EngineOptions(graph=model.graph)), create("cpu", network)
    first.chunk(samples[:20])
    cpu.restore(first.snapshot())
    exact = create("reference", network)
    exact.restore(first.snapshot())
    assert np.abs(cpu.chunk(samples[20:]) - exact.chunk(samples[20:])).max() <= 1e-4
    back = create(kind, model.network, EngineOptions(graph=model.graph))
    back.restore(first.snapshot())
    assert np.array_equal(back.chunk(samples[20:]), first.chunk(samples[20:]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_runs_as_its_artifact_does(kind, demo_model, demo_stream, tmp_path):
    source = artifact.load(demo_model)
    graph = exported.build(kind, source.network)
    measured = exported.MeasuredError(0.0, 0, "nothing")
    path = tmp_path / f"demo.{kind}"
    path.write_bytes(exported.to_bytes(graph, source.network, demo_model.read_bytes(), source.digest, measured))

    def decisions(*arguments):
        done = call("run", *arguments, "--stream", "--input", demo_stream, "--logits")
        assert done.returncode == 0, done.stderr
        return done.stderr, [json.loads(line) for line in done.stdout.splitlines()]

    said, found = decisions(path)
    assert f"engine {kind} (" in said.splitlines()[0]
    _, expected = decisions(demo_model, "--engine", "cpu")
    assert [d["label"] for d in found] == [d["label"] for d in expected]
    assert np.abs(np.array([d["logits"] for d in found]) - [d["logits"] for d in expected]).max() <= 1e-4
    assert decisions(path, "--engine", "cpu")[1] == expected
    # Another rate is another graph; overlapping windows are several lanes.
    said, found = decisions(path, "--sample-rate", "25", "--hop", "40", "--threads", "2")
    assert "2 threads" in said
    _, expected = decisions(demo_model, "--engine", "cpu", "--sample-rate", "25", "--hop", "40")
    assert [d["label"] for d in found] == [d["label"] for d in expected]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_inspect_and_profile_accept_a_file(kind, tmp_path):
    path = tmp_path / f"m.{kind}"
    path.write_bytes(sealed(random_network(), kind))
    done = call("inspect", path, "--json")
    described = json.loads(done.stdout)["graph"]
    assert (described["kind"], described["weights"], described["file_bytes"]) == (
        kind,
        "float32",
        len(path.read_bytes()),
    )
    assert f"exported    {kind}" in call("inspect", path).stdout
    report = tmp_path / "r.json"
    quick = ["--quick", "--rounds", "2", "--block-seconds", "0.2", "--meter", "none", "--no-paced", "--json", report]
    done = call("profile", path, "--threads", "1", *quick)
    assert done.returncode in (0, 1), done.stderr  # 1: the machine changed meanwhile
    assert json.loads(report.read_text())["engine"] == kind
    assert any(note.startswith(f"engine {kind}: ") for note in json.loads(report.read_text())["notes"])


@pytest.mark.parametrize("kind", KINDS)
def test_silence_leaves_no_subnormal_state(kind):
    network = random_network(7, h=16, layers=1, dt_min=1e-2)
    network = replace(network, encoder=replace(network.encoder, bias=np.zeros_like(network.encoder.bias)))
    engine = create(kind, network)
    engine.step(network.input.mean + 1.0)
    engine.chunk(np.tile(network.input.mean, (60_000, 1)))
    values = np.concatenate([s.view(np.float32).ravel() for s in engine.snapshot().state])
    assert not ((values != 0) & (np.abs(values) < np.finfo(np.float32).tiny)).any()
    assert np.abs(values).max() < 1e-30
    engine.step(network.input.mean)
    assert np.float32(1e-40) * np.float32(1.0) != 0  # the caller's own arithmetic keeps its subnormals


# --- refusals --------------------------------------------------------------------------------------------------


def foreign(kind):
    """Return a model without metadata, as another tool writes it."""
    return exported.build(kind, random_network()).content


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", ["run", "inspect", "profile"])
def test_a_foreign_file_is_refused_in_one_line(kind, command, tmp_path):
    path = tmp_path / f"foreign.{kind}"
    path.write_bytes(foreign(kind))
    done = call(command, path)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert f"{path}: no `edge_ssm` metadata; a foreign {kind} model, expected one of edge-ssm-build export" in line


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused(kind, tmp_path):
    content = sealed(random_network(h=4, pairs=2, layers=1), kind)
    path = tmp_path / f"m.{kind}"
    rng = np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(content)
        at = int(rng.integers(len(content)))
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"m\.(onnx|tflite): "):
            loading.load(path)
    for end in [*range(200), *range(200, len(content), 53)]:
        path.write_bytes(content[:end])
        with pytest.raises(ArtifactError, match=r"m\.(onnx|tflite): "):
            loading.load(path)
    for other in (b"\xff" * 64, bytes(64), content + b"\0", b"\x1c\0\0\0TFL3" + b"\xff" * 100, os.urandom(10_000)):
        path.write_bytes(other)
        with pytest.raises(ArtifactError):
            loading.load(path)


def rewritten(content, kind, change):
    """Return the file with a changed document and the digest that belongs to it."""
    begin, end = containers.metadata(content, kind)["edge_ssm"]
    document = json.loads(content[begin:end])
    change(document)
    document["measured"]["samples_from"] = ""  # room for what became longer
    document["digest"] = "0" * 64
    text = msgspec.json.encode(document).ljust(end - begin)
    assert len(text) == end - begin
    content = content[:begin] + text + content[end:]
    at = content.index(b"0" * 64, begin)
    return content[:at] + hashlib.sha256(content).hexdigest().encode() + content[at + 64 :]


def test_a_document_that_contradicts_the_file_is_refused():
    content = sealed(random_network(h=12, pairs=2, layers=1), "tflite")

    def refused(change, match):
        with pytest.raises(ArtifactError, match=match):
            exported.parse(rewritten(content, "tflite", change), "tflite")

    assert exported.parse(rewritten(content, "tflite", lambda d: None), "tflite").graph.spec.chunk == 1
    refused(lambda d: d["stream"].update(window=11), "stream: contradicts the artifact")
    refused(lambda d: d["form"].update(fingerprint="1" * 64), "form.fingerprint: ")
    refused(lambda d: d.update(source_digest="1" * 64), "source_digest: ")
    refused(lambda d: d["form"]["states"][0][0].update(pairs=1), "form.states.0: 1 pairs, expected 2 or more")
    refused(lambda d: d["form"]["states"][0][0]["channels"].pop(), "expected each of the 12 channels once")
    refused(lambda d: d["form"].update(chunk=-1), "chunk")
    refused(lambda d: d["measured"].update(max_error=-1.0), r"measured\.max_error")
    refused(lambda d: d["measured"].update(samples=-1), r"measured\.samples")
    refused(lambda d: d.update(format_version=9), "format_version 9 is unknown, expected 1; update")


@pytest.mark.parametrize(
    ("measured", "problem"),
    [
        (exported.MeasuredError(0.0, 1, "x" * 201), r"measured\.samples_from"),
        (
            exported.MeasuredError(0.0, 1, "walk.csv)\n  signature   by key 1"),
            "samples_from: is not one line of text; export",
        ),
        (exported.MeasuredError(-0.5, 1, ""), r"measured\.max_error"),
        (exported.MeasuredError(0.5, -1, ""), r"measured\.samples"),
    ],
)
def test_the_measurement_in_a_file_cannot_forge_a_line(measured, problem):
    network = random_network(h=4, pairs=2, layers=1)
    content, digest = artifact.to_bytes(network, {})
    sealed_so = exported.to_bytes(exported.build("tflite", network), network, content, digest, measured)
    with pytest.raises(ArtifactError, match=problem):
        exported.parse(sealed_so, "tflite")


def test_an_infinite_error_is_refused():
    content = sealed(random_network(h=4, pairs=2, layers=1), "tflite")
    begin, end = containers.metadata(content, "tflite")["edge_ssm"]
    huge = content[begin:end].replace(b'"max_error":0.0', b'"max_error":1e999').replace(b'"nothing"', b'"nothi"')
    changed = content[:begin] + huge + content[end:]
    place = changed.index(json.loads(huge)["digest"].encode())
    changed = changed[:place] + exported.ZEROS.encode() + changed[place + 64 :]
    changed = changed[:place] + hashlib.sha256(changed).hexdigest().encode() + changed[place + 64 :]
    with pytest.raises(ArtifactError, match=r"max_error|out of range"):
        exported.parse(changed, "tflite")


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_file_is_called_empty(kind, tmp_path):
    (tmp_path / f"m.{kind}").touch()
    with pytest.raises(ArtifactError, match=rf"m\.{kind}: is empty; copy it again"):
        loading.load(tmp_path / f"m.{kind}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_that_contradicts_its_document_is_refused(kind):
    network, other = random_network(h=12, pairs=2, layers=1), random_network(h=12, pairs=4, layers=1)
    wrong = replace(exported.build(kind, network), content=exported.build(kind, other).content)
    with pytest.raises(ArtifactError, match=r"tensor blocks\.0\.re0 is \(12, 4\), expected \(12, 2\)"):
        create(kind, network, EngineOptions(graph=wrong))
    for content in (b"", b"TFL3TFL3TFL3", wrong.content[:200]):
        with pytest.raises(ArtifactError, match=f"{kind} graph: .* refuses it"):
            create(kind, network, EngineOptions(graph=replace(wrong, content=content)))


def test_threads_are_refused_for_engines_without_them():
    network = random_network()
    for name in ("cpu", "reference", "auto"):
        with pytest.raises(UsageError, match="--threads: "):
            create(name, network, EngineOptions(threads=2))
    with pytest.raises(UsageError, match="threads: 1000, expected 1 to 256"):
        create("onnx", network, EngineOptions(threads=1000))


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    for name, package in (("onnx", "onnxruntime"), ("tflite", "ai_edge_litert or tflite_runtime")):
        gone = replace(ENGINES[name], requires=tuple(f"no_{part}" for part in ENGINES[name].requires[0].split("|")[:1]))
        monkeypatch.setitem(registry.ENGINES, name, gone)
        with pytest.raises(EngineUnavailable) as caught:
            create(name, random_network())
        assert f"package no_{package.split()[0]} is missing; pip install 'edge-ssm[{name}]'" in str(caught.value)


@pytest.mark.parametrize(("kind", "package"), [("onnx", "onnx"), ("tflite", "flatbuffers")])
def test_without_the_package_that_writes_graphs_files_still_run(kind, package, tmp_path):
    network = random_network()
    path = tmp_path / f"m.{kind}"
    path.write_bytes(sealed(network, kind))
    artifact.save(tmp_path / "m.safetensors", network, {})
    (tmp_path / "s.csv").write_text("0,0\n" * 20)
    hidden = f"import sys; sys.modules[{package!r}] = None; from edge_ssm.cli.app import main; main()"

    def run(*arguments):
        command = [sys.executable, "-c", hidden, "run", "--input", tmp_path / "s.csv", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert run(path).returncode == 0
    done = run(tmp_path / "m.safetensors", "--engine", kind)
    assert done.returncode == 1
    assert f"needs the package {package}; pip install" in done.stderr
    assert f"edge-ssm-build export MODEL --to {kind}" in done.stderr
    assert "or take --engine cpu" in run(path, "--sample-rate", "10").stderr


def test_a_gpu_build_without_a_gpu_is_one_warning_and_the_cpu(tmp_path):
    from edge_ssm.engines.graph.onnx import CPU, CUDA, select_providers

    assert select_providers([CPU]) == ([CPU], "")
    asked, warning = select_providers([CUDA, CPU], nodes=(str(tmp_path / "none"),))
    assert asked == [CPU]
    assert "no GPU here" in warning
    assert "runs on the CPU" in warning
    assert select_providers([CUDA, CPU], nodes=(str(tmp_path),)) == ([CUDA, CPU], "")


def test_doctor_reports_the_runtimes():
    findings = {f["name"]: f for f in json.loads(call("doctor", "--json").stdout)["findings"]}
    assert findings["onnx runtime"]["ok"]
    assert "artifacts run too (onnx " in findings["onnx runtime"]["found"]
    assert findings["litert"]["ok"]
    assert "artifacts run too (flatbuffers " in findings["litert"]["found"]


def test_the_runtimes_are_imported_only_when_they_are_used(demo_model):
    code = (
        "import sys; from edge_ssm.formats import loading as models; models.load(sys.argv[1]); "
        "print(sorted({'onnx', 'onnxruntime', 'ai_edge_litert', 'flatbuffers', 'torch', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, demo_model], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- found by testers ------------------------------------------------------------------------------------------


def streams(*arguments):
    command = [sys.executable, "-c", "from edge_ssm.cli.app import main; main()", "run", *map(str, arguments)]
    return commands.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def demo_files(tmp_path_factory, demo_model):
    folder = tmp_path_factory.mktemp("demo")
    for kind in ("onnx", "tflite"):
        code = "from edge_ssm_build.cli.app import main; main()"
        command = [sys.executable, "-c", code, "export", demo_model, "--to", kind, "--output", folder / f"m.{kind}"]
        commands.run(command, check=True, capture_output=True, timeout=120)
    (folder / "m.safetensors").write_bytes(demo_model.read_bytes())
    return folder


def test_a_snapshot_moves_from_an_artifact_to_its_exports_and_back(demo_files, demo_stream, tmp_path):
    lines = demo_stream.read_text().splitlines(keepends=True)
    log = tmp_path / "log.csv"
    for i, name in enumerate(("m.onnx", "m.tflite", "m.safetensors", "m.onnx")):
        with log.open("a") as file:
            file.write("".join(lines[max(1, 500 * i) if i else 0 : 500 * (i + 1)]))
        done = streams(demo_files / name, "--input", log, "--state", tmp_path / "state", "--output", tmp_path / "out")
        assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [line["event"] for line in found if "event" in line] == ["resumed"] * 3
    whole = tmp_path / "whole"
    streams(demo_files / "m.safetensors", "--input", log, "--output", whole)
    expected = [json.loads(line) for line in whole.read_text().splitlines()]
    made = [line for line in found if "event" not in line]
    assert [(d["start"], d["label"]) for d in made] == [(d["start"], d["label"]) for d in expected]


def resealed(model, claims=None):
    """Return a changed ONNX model with other claims in its document and a new digest, which anybody can compute."""
    (entry,) = [entry for entry in model.metadata_props if entry.key == exported.DOCUMENT_KEY]
    document = json.loads(entry.value)
    document["measured"].update(claims or {})
    document["digest"] = exported.ZEROS
    entry.value = msgspec.json.encode(document).decode()
    content = model.SerializeToString()
    place = content.index(exported.ZEROS.encode(), containers.metadata(content, "onnx")[exported.DOCUMENT_KEY][0])
    return content[:place] + hashlib.sha256(content).hexdigest().encode() + content[place + 64 :]


@pytest.mark.slow
@pytest.mark.parametrize("claims", [{}, {"max_error": 1e9}])
@pytest.mark.parametrize("weights", ["float32", "float16", "int8"])
def test_a_graph_that_was_exchanged_is_refused(demo_files, demo_stream, tmp_path, weights, claims):
    """Anybody can compute the digest and claim an error, but cannot fake what the graph computes."""
    import onnx
    from onnx import numpy_helper

    build = [
        sys.executable,
        "-c",
        "from edge_ssm_build.cli.app import main; main()",
        "export",
        demo_files / "m.safetensors",
    ]
    path = tmp_path / "x.onnx"
    command = [*build, "--to", "onnx", "--weights", weights, "--output", path]
    commands.run(command, check=True, capture_output=True, timeout=120)
    assert streams(path, "--input", demo_stream).returncode == 0
    model = onnx.load(path)
    tensors = [t for t in model.graph.initializer if numpy_helper.to_array(t).dtype == np.float32]
    largest = max(tensors, key=lambda tensor: numpy_helper.to_array(tensor).size)
    largest.CopyFrom(numpy_helper.from_array(np.float32(5) * numpy_helper.to_array(largest), largest.name))
    path.write_bytes(resealed(model, claims))
    done = streams(path, "--input", demo_stream)
    assert done.returncode == 2
    assert "self-test failed, its outputs are off by" in done.stderr


@pytest.mark.parametrize("command", [["run", "--stream"], ["profile", "--quick"]])
def test_a_graph_that_never_ends_is_refused_and_the_command_ends(demo_files, demo_stream, tmp_path, command):
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(demo_files / "m.onnx")
    for node in model.graph.node:
        node.output[:] = ["before" if name == "output" else name for name in node.output]
    shapes = [("c", TensorProto.BOOL, []), ("v", TensorProto.FLOAT, [1, 7])]
    inputs = [helper.make_tensor_value_info(*of) for of in [("i", TensorProto.INT64, []), *shapes]]
    outputs = [helper.make_tensor_value_info(f"{name} out", *of) for name, *of in shapes]
    body = [helper.make_node("Identity", [name], [f"{name} out"]) for name in ("c", "v")]
    constants = {"trips": np.array(2**62), "on": np.array(True)}
    model.graph.initializer.extend([numpy_helper.from_array(value, name) for name, value in constants.items()])
    loop = helper.make_graph(body, "body", inputs, outputs)
    model.graph.node.append(helper.make_node("Loop", ["trips", "on", "before"], ["output"], body=loop))
    path = tmp_path / "endless.onnx"
    path.write_bytes(resealed(model))
    soon = "from edge_ssm.engines import verification as v; v.LIMIT_S = 0.5; from edge_ssm.cli.app import main; main()"
    arguments = [*command, path, "--input", demo_stream]
    done = subprocess.run([sys.executable, "-c", soon, *arguments], capture_output=True, text=True, timeout=60)
    said = f"edge-ssm: error: {path}: self-test failed, no answer within 0.5 s; export it again\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "tflite"])
def test_an_exported_file_is_recognised_by_its_content_and_can_be_signed(demo_files, demo_stream, tmp_path, kind):
    pytest.importorskip("cryptography")
    odd = tmp_path / "model.bin"
    odd.write_bytes((demo_files / f"m.{kind}").read_bytes())
    build = [sys.executable, "-c", "from edge_ssm_build.cli.app import main; main()"]
    commands.run([*build, "keygen", "--output", tmp_path / "k"], check=True, capture_output=True, timeout=60)
    private = next(p for p in tmp_path.iterdir() if p.name.startswith("k") and "pub" not in p.name)
    public = next(p for p in tmp_path.iterdir() if p.name.startswith("k") and "pub" in p.name)
    commands.run([*build, "sign", odd, "--key", private], check=True, capture_output=True, timeout=60)
    done = streams(odd, "--input", demo_stream, "--require-signature", public, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert f"engine {kind}" in done.stderr


@pytest.mark.parametrize(
    ("name", "problem"), [("none", "no such file"), ("", "not a regular file"), ("m.onnx", "already")]
)
def test_a_failed_export_is_explained_in_one_line(demo_files, tmp_path, name, problem):
    build = [sys.executable, "-c", "from edge_ssm_build.cli.app import main; main()"]
    command = [*build, "export", demo_files / name, "--to", "onnx", "--output", tmp_path / "x.onnx"]
    done = commands.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert problem in line
