"""Snapshots: what is written is what is read, and whatever is wrong with one is refused."""

import json

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.networks import networks, random_network, samples_for
from support.service_runs import decisions, start
from support.streams import Stream

from edge_ssm.errors import SnapshotError
from edge_ssm.service import snapshot as service_snapshot


def snapshot_bytes(network, cut=27, engine="reference"):
    samples = samples_for(network, 0, 60)
    pipeline = Stream(network, engine=engine).feed(samples[:cut]).pipeline
    state, snapshot = pipeline.state()
    shapes = [(len(x), x.shape[1]) for x in snapshot.state]
    document = service_snapshot.Document("d" * 64, snapshot.fingerprint, shapes, state, "s", {"offset": 5}, {}, 1e9)
    return service_snapshot.to_bytes(document, snapshot), document, snapshot


@given(networks())
def test_a_snapshot_comes_back_as_it_was(network):
    content, document, snapshot = snapshot_bytes(network)
    found, state = service_snapshot.from_bytes(content)
    assert found == document
    assert all((a == b).all() for a, b in zip(state.state, snapshot.state, strict=True))


def test_a_snapshot_that_is_damaged_anywhere_is_refused():
    content, _, _ = snapshot_bytes(random_network())
    rng = np.random.default_rng(0)
    for _ in range(300):
        place = int(rng.integers(len(content)))
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(SnapshotError):
            service_snapshot.from_bytes(bytes(changed))
    for length in range(0, len(content), 13):
        with pytest.raises(SnapshotError):
            service_snapshot.from_bytes(content[:length])


@given(st.data())
def test_a_snapshot_made_up_with_a_right_checksum_breaks_nothing(data):
    """Whoever can write the file can compute its checksum."""
    import hashlib
    import struct

    content, document, _ = snapshot_bytes(random_network())
    plain = json.loads(msgspec.json.encode(document))
    pipeline = plain["loop"]
    where = data.draw(st.sampled_from([plain, pipeline, pipeline["windows"]]))
    key = data.draw(st.sampled_from(sorted(where)))
    where[key] = data.draw(
        st.recursive(
            st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
            max_leaves=4,
        )
    )
    head = json.dumps(plain).encode()
    body = struct.pack("<Q", len(head)) + head + content[40:][8 + struct.unpack_from("<Q", content, 40)[0] :]
    forged = service_snapshot.MAGIC + hashlib.sha256(body).digest() + body
    stream = Stream(random_network())
    try:
        found, state = service_snapshot.from_bytes(forged)
        stream.pipeline.restore(found.loop, state)
    except SnapshotError:
        return
    stream.feed(samples_for(random_network(), 1, 30))


def test_the_rate_is_of_this_run_alone():
    stream = Stream(random_network(window=10), 10)
    stream.feed(samples_for(stream.pipeline.engine.network, 0, 30))
    again = Stream(random_network(window=10), 10)
    again.pipeline.restore(*stream.pipeline.state())
    again.feed(samples_for(stream.pipeline.engine.network, 0, 20))
    counters = again.pipeline.counters
    assert counters.samples - counters.earlier == 20


def test_a_damaged_snapshot_is_set_aside_and_said(small, tmp_path):
    (tmp_path / "snapshot").write_bytes(b"EDGESSM\x01" + bytes(100))
    run = start(small / "m.safetensors", "--input", small / "s.csv", "--state", tmp_path, "--output", tmp_path / "o")
    _, said = run.communicate(timeout=60)
    assert run.returncode == 0
    assert "snapshot: damaged (its checksum differs)" in said
    assert (tmp_path / "snapshot.refused").exists()
    assert len(decisions(tmp_path / "o")[0]) == 2000


def test_a_snapshot_of_another_model_is_refused(small, tmp_path):
    for model in ("m", "other"):
        run = start(
            small / f"{model}.safetensors", "--input", small / "s.csv", "--state", tmp_path, "--output", "/dev/null"
        )
        _, said = run.communicate(timeout=60)
    assert "snapshot: of artifact" in said
