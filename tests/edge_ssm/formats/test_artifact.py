"""Artifacts: a round trip changes nothing, and every defect of a file is refused in one line."""

import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from support import ROOT
from support.networks import networks, random_network

import edge_ssm
from edge_ssm.errors import ArtifactError, EdgeSSMError, NetworkError
from edge_ssm.formats import artifact
from edge_ssm.formats import description as formats_description
from edge_ssm.model.network import fingerprint
from edge_ssm.model.validation import check

DTYPES = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4", "F16": "<f2", "I8": "<i1"}


def split(content):
    """Return the document's text and the tensors by name, read by the specification alone, without safetensors."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    document = header.pop("__metadata__")["edge_ssm"]
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        data = content[8 + length + first : 8 + length + last]
        tensors[name] = np.frombuffer(data, DTYPES[entry["dtype"]]).reshape(entry["shape"]).copy()
    return document, tensors


def join(document, tensors, digest=None):
    """Return a file of these parts, with the correct digest unless another one is given."""
    names = {np.dtype(v): k for k, v in DTYPES.items()}
    if isinstance(document, dict):
        document = json.dumps(document | {"digest": "0" * 64})
    zeroed = re.sub(r'"digest": ?"[0-9a-f]{64}"', '"digest":"' + "0" * 64 + '"', document, count=1)
    sha = hashlib.sha256(struct.pack("<Q", len(zeroed.encode())) + zeroed.encode())
    header, data = {}, b""
    for name in sorted(tensors):
        tensor = tensors[name]
        shape = ",".join(map(str, tensor.shape))
        sha.update(f"{name}\0{names[tensor.dtype]}\0{shape}\0".encode() + tensor.tobytes())
        entry = {"dtype": names[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = entry | {"data_offsets": [len(data), len(data) + tensor.nbytes]}
        data += tensor.tobytes()
    text = zeroed.replace("0" * 64, digest or sha.hexdigest())
    raw = json.dumps({"__metadata__": {"edge_ssm": text}, **header}).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + data


@pytest.fixture
def parts():
    network = random_network(
        active=[4, 6], columns=5, rows=4, mixing_dtype="int8", rank_one=1.0, discretization="bilinear"
    )
    content, _ = artifact.to_bytes(network, {"seed": 1})
    document, tensors = split(content)
    return json.loads(document), tensors


def refused(tmp_path, content):
    """Return the error message for this content: one line that names the file."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        artifact.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 500
    return message[len(str(path)) + 2 :]


def test_the_rounding_error_is_stored_and_sets_the_tolerance(tmp_path):
    network = random_network()
    artifact.save(tmp_path / "a.safetensors", network, {})
    assert b"rounding_error" not in (tmp_path / "a.safetensors").read_bytes()
    assert artifact.load(tmp_path / "a.safetensors").network.tolerance == 1e-4
    artifact.save(tmp_path / "b.safetensors", replace(network, rounding_error=0.02), {})
    loaded = artifact.load(tmp_path / "b.safetensors").network
    assert (loaded.rounding_error, loaded.tolerance) == (0.02, 0.002)
    with pytest.raises(NetworkError, match="rounding_error"):
        check(replace(network, rounding_error=-1.0))


@given(network=networks())
def test_an_artifact_survives_a_round_trip(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("a") / "m.safetensors"
    provenance = {"seeds": [1, 2], "note": "ü\n\0", "nested": {"a": None}}
    digest = artifact.save(path, network, provenance)
    loaded = artifact.load(path)
    assert fingerprint(loaded.network) == fingerprint(network)
    assert loaded.provenance == provenance
    assert loaded.digest == digest
    assert artifact.to_bytes(network, provenance) == (path.read_bytes(), digest)


def test_a_reader_written_from_the_specification_agrees(tmp_path):
    network = random_network(active=[3, 5], ragged=True, columns=5, rows=2, mixing_dtype="float16")
    content, digest = artifact.to_bytes(network, {})
    text, tensors = split(content)
    rejoined = join(text, tensors)
    assert json.loads(split(rejoined)[0])["digest"] == digest
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with safe_open(path, framework="np") as file:
        assert set(file.keys()) == set(tensors)
        assert all(np.array_equal(file.get_tensor(name), tensors[name]) for name in tensors)
    path.write_bytes(rejoined)
    assert fingerprint(artifact.load(path).network) == fingerprint(network)


def test_the_reader_in_the_documentation_runs(tmp_path):
    page = (ROOT / "docs" / "artifact.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.S).group(1)
    network = random_network(active=[3, 5], columns=5, mixing_dtype="int8", rank_one=0.5, discretization="bilinear")
    path = tmp_path / "m.safetensors"
    artifact.save(path, network, {})
    namespace = {}
    exec(code, namespace)
    document, tensors = namespace["read"](path)
    assert document["d_model"] == 6
    assert np.array_equal(tensors["blocks.0.ssm.active"], network.blocks[0].ssm.active)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="digest"):
        namespace["read"](path)


@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused_wherever_it_ends(cut, tmp_path_factory):
    content, _ = artifact.to_bytes(random_network(), {})
    refused(tmp_path_factory.mktemp("a"), content[: int(cut * len(content))])


@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_changed_byte_is_never_accepted_silently(place, flip, tmp_path_factory):
    content, _ = artifact.to_bytes(random_network(), {"a": "b"})
    changed = bytearray(content)
    changed[int(place * len(content))] ^= flip
    path = tmp_path_factory.mktemp("a") / "bad.safetensors"
    path.write_bytes(changed)
    try:
        loaded = artifact.load(path)
    except ArtifactError as error:
        assert "\n" not in str(error)
    else:
        # Only bytes outside the document and the tensors may differ: white space of the header.
        assert fingerprint(loaded.network) == fingerprint(random_network())


@given(content=st.binary(max_size=300))
def test_any_bytes_are_refused(content, tmp_path_factory):
    refused(tmp_path_factory.mktemp("a"), content)
    framed = struct.pack("<Q", len(content)) + content
    refused(tmp_path_factory.mktemp("a"), framed)


@pytest.mark.parametrize("claim", [2**60, 2**63, 2**64 - 1, artifact.MAX_HEADER_BYTES + 1])
def test_a_header_of_impossible_size_allocates_no_memory(tmp_path, claim):
    assert "header claims" in refused(tmp_path, struct.pack("<Q", claim) + b"{}" * 50)


def test_deeply_nested_or_foreign_documents_are_refused(tmp_path, parts):
    document, tensors = parts
    deep = json.dumps(document | {"provenance": {}}).replace(
        '"provenance": {}', '"provenance": ' + "[" * 90000 + "]" * 90000
    )
    assert "document" in refused(tmp_path, join(deep, tensors))
    assert "document" in refused(tmp_path, join("[1, 2", tensors))
    assert "document" in refused(tmp_path, join('{"format_version": "1"}', tensors))
    raw = json.dumps({}).encode()
    assert "no `edge_ssm` document" in refused(tmp_path, struct.pack("<Q", len(raw)) + raw)


def nested(levels):
    value = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


def test_provenance_has_a_limited_depth(tmp_path, parts):
    """Deeper provenance could be loaded but not displayed (found by fuzzing). A writer refuses it too, and a cycle."""
    document, tensors = parts
    path = tmp_path / "m.safetensors"
    path.write_bytes(join(document | {"provenance": {"a": nested(63)}}, tensors))
    description = formats_description.describe(artifact.load(path))
    assert json.loads(json.dumps(description)) == description
    assert "provenance" in formats_description.render(description)
    for levels in (64, 300, 900):
        deep = json.dumps(document | {"provenance": {"a": nested(levels)}})
        assert "provenance: more than 64 levels" in refused(tmp_path, join(deep, tensors))
        with pytest.raises(ArtifactError, match="provenance: more than 64 levels"):
            artifact.to_bytes(random_network(), {"a": nested(levels)})
    circle = {}
    circle["a"] = circle
    with pytest.raises(ArtifactError, match="provenance: more than 64 levels"):
        artifact.to_bytes(random_network(), circle)


def test_provenance_cannot_control_a_terminal(tmp_path):
    path = tmp_path / "m.safetensors"
    artifact.save(path, random_network(), {"a\x1b[2J": ["\x1b]0;x\x07", {"b": "c\nd\x9bm"}], "ü": "é"})
    text = formats_description.render(formats_description.describe(artifact.load(path)))
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "b: c?d?m" in text
    assert "ü: é" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 1}, r"format_version 1 is unknown, expected 2; export"),
        ({"format_version": 3}, r"format_version 3 is unknown, expected 2; update"),
        ({"d_model": 7}, r"tensor .*: shape"),
        ({"d_model": 1 << 20}, r"tensor .*: shape"),
        ({"d_model": 1 << 60}, r"document: .*d_model"),
        ({"d_model": -1}, r"document: .*d_model"),
        ({"d_model": 6.5}, r"document: .*d_model"),
        ({"window": 0}, r"document: .*window"),
        ({"pooling": "max"}, r"document: .*pooling"),
        ({"discretization": "euler"}, r"document: .*discretization"),
        ({"surprise": 1}, r"document: .*surprise"),
        ({"labels": ["a", "a", "b"]}, r"labels: names are repeated"),
        ({"labels": ["a", "b\n", "c"]}, r"document: .*labels"),
        ({"labels": ["a", "\x1b[2J", "c"]}, r"document: .*labels"),
        ({"labels": ["a"]}, r"labels: 1 given, expected 3"),
        ({"encoder": "token", "vocabulary": 4}, r"tensor encoder.embedding: missing"),
        ({"blocks": []}, r"tensor .* not called for"),
        ({"pooling": "none"}, r"window: a network without pooling"),
    ],
)
def test_a_wrong_document_is_refused(tmp_path, parts, change, message):
    document, tensors = parts
    assert re.search(message, refused(tmp_path, join(document | change, tensors)))


def changed(tensors, name, index, value):
    copy = {key: tensor.copy() for key, tensor in tensors.items()}
    copy[name][index] = value
    return copy


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("blocks.0.ssm.active", 3, 6, "blocks.0.ssm.active: index 6 is out of range, expected 0 to 5"),
        ("blocks.0.ssm.active", 0, -1, "index -1 is out of range"),
        ("blocks.0.ssm.active", 0, 2**62, "out of range"),
        ("blocks.1.ssm.active", 1, 0, "repeated or not ascending"),
        ("blocks.1.ssm.active", 0, 5, "repeated or not ascending"),
        ("blocks.0.mixing.bias", 0, np.nan, "blocks.0.mixing.bias: holds a non-finite value"),
        ("blocks.0.ssm.A", (0, 1), np.inf, "blocks.0.ssm.A: holds a non-finite value"),
        ("blocks.0.ssm.A", (0, 0), 0.5, r"blocks.0.ssm.A: unstable: Re A = 0.5 at channel"),
        ("blocks.0.ssm.A", (0, 0), 0.0, r"unstable"),
        ("blocks.0.ssm.dt", 0, 0.0, "blocks.0.ssm.dt: a step size is not positive"),
        ("blocks.0.ssm.dt", 0, -1.0, "not positive"),
        ("input.std", 0, 0.0, "input.std: a value is not positive"),
        ("input.mean", 0, np.nan, "input.mean: holds a non-finite value"),
        ("blocks.0.ssm.pairs", 0, 0, r"blocks.0.ssm.pairs: a value is not from 1 to"),
        ("blocks.0.ssm.pairs", 0, 2**62, r"blocks.0.ssm.pairs: a value is not from 1 to"),
        ("blocks.0.ssm.pairs", 0, 1, r"blocks.0.ssm.A: shape \(12,\), expected \(10,\)"),
        ("blocks.0.ssm.P", (0, 0), np.nan, "blocks.0.ssm.P: holds a non-finite value"),
        ("blocks.0.mixing.columns", 0, 6, r"blocks.0.mixing.columns: index 6 is out of range"),
        ("blocks.0.mixing.rows", 0, 5, r"blocks.0.mixing.rows: indices are repeated or not ascending"),
        ("blocks.0.mixing.scale", 0, 0.0, r"blocks.0.mixing.scale: a value is not positive"),
        ("blocks.0.mixing.scale", 0, np.nan, r"blocks.0.mixing.scale: holds a non-finite value"),
        ("decoder.bias", 0, -np.inf, "decoder.bias: holds a non-finite value"),
    ],
)
def test_tensors_with_wrong_values_are_refused(tmp_path, parts, name, index, value, message):
    document, tensors = parts
    assert re.search(message, refused(tmp_path, join(document, changed(tensors, name, index, value))))


def test_a_channel_with_an_effect_must_enter_the_mixing(tmp_path, parts):
    document, tensors = parts
    columns = tensors["blocks.0.mixing.columns"]
    absent = int(np.setdiff1d(np.arange(6), columns)[0])
    message = refused(tmp_path, join(document, changed(tensors, "blocks.0.ssm.D", absent, 0.5)))
    assert "blocks.0.mixing.columns: a channel with a gain does not enter the mixing" in message
    moved = changed(tensors, "blocks.0.ssm.D", slice(None), 0.0)
    active = int(moved["blocks.0.ssm.active"][0])
    moved["blocks.0.mixing.columns"] = np.sort(np.append(columns[columns != active], absent))
    assert "is active but does not enter the mixing" in refused(tmp_path, join(document, moved))


def test_a_rank_one_term_requires_the_bilinear_transform(tmp_path, parts):
    document, tensors = parts
    assert "needs bilinear" in refused(tmp_path, join(document | {"discretization": "zoh"}, tensors))


def test_tensors_of_a_wrong_name_dtype_or_shape_are_refused(tmp_path, parts):
    document, tensors = parts
    missing = {k: v for k, v in tensors.items() if k != "decoder.bias"}
    assert refused(tmp_path, join(document, missing)).startswith("tensor decoder.bias: missing")
    surplus = tensors | {"x" * 5000: np.zeros(1, "<f4")}
    assert "not called for" in refused(tmp_path, join(document, surplus))
    narrow = tensors | {"blocks.0.ssm.active": tensors["blocks.0.ssm.active"].astype("<i4")}
    assert "tensor blocks.0.ssm.active: dtype I32, expected I64" in refused(tmp_path, join(document, narrow))
    half = tensors | {"decoder.weight": tensors["decoder.weight"].astype("<f2")}
    assert "dtype F16, expected F32" in refused(tmp_path, join(document, half))
    turned = tensors | {"decoder.weight": np.ascontiguousarray(tensors["decoder.weight"].T)}
    assert "tensor decoder.weight: shape (6, 3), expected (3, 6)" in refused(tmp_path, join(document, turned))


def test_a_wrong_digest_is_refused(tmp_path, parts):
    document, tensors = parts
    assert "digest: the content gives" in refused(tmp_path, join(document, tensors, "0123456789abcdef" * 4))
    assert "digest" in refused(tmp_path, join(document | {"provenance": {"seed": 2}}, tensors, document["digest"]))


def test_anything_but_a_regular_file_is_refused_at_once(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (tmp_path, fifo, Path("/dev/zero"), tmp_path / "absent"):
        with pytest.raises(ArtifactError, match=r"^/.*: (not a regular file|cannot be read)"):
            artifact.load(path)


def test_an_invalid_network_is_not_written(tmp_path):
    path = tmp_path / "m.safetensors"
    network = random_network()
    with pytest.raises(EdgeSSMError, match="provenance"):
        artifact.save(path, network, {"a": object()})
    network.decoder.bias[0] = np.nan
    with pytest.raises(EdgeSSMError, match=r"decoder\.bias"):
        artifact.save(path, network, {})
    assert os.listdir(tmp_path) == []
    with pytest.raises(ArtifactError, match="cannot be written"):
        artifact.save(tmp_path / "no" / "m.safetensors", random_network(), {})


@pytest.mark.slow
def test_hostile_files_allocate_no_memory(tmp_path, parts):
    document, tensors = parts
    hostile = {"claim": struct.pack("<Q", 2**60) + b"{}", "huge": join(document | {"d_model": 1 << 20}, tensors)}
    code = """
import resource, sys
from edge_ssm.formats import artifact
from edge_ssm.errors import ArtifactError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    artifact.load(sys.argv[1])
except ArtifactError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    for name, content in hostile.items():
        path = tmp_path / name
        path.write_bytes(content)
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
        assert int(done.stdout) < 20_000  # kB


def test_the_example_in_the_package_s_documentation_runs(tmp_path, monkeypatch, capsys):
    example = textwrap.dedent(edge_ssm.__doc__.split("::\n")[1].split("\n``load")[0])
    monkeypatch.chdir(tmp_path)
    artifact.save("model.safetensors", random_network(), {})
    exec(example, {})
    assert capsys.readouterr().out.startswith("class ")
