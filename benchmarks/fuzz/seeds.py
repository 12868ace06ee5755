"""Write the seeds in tests/corpus/: a few small inputs for each target, which coverage then grows.

    python benchmarks/fuzz/seeds.py

Run it again when a format changes. Files of other names in the folders, reduced findings say, are left alone.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from fuzz_targets import CORPUS, ROOT, Nowhere, fuzzing_key

from edge_ssm.engines.registry import create
from edge_ssm.formats import artifact, signatures
from edge_ssm.io.codecs.framed import encode
from edge_ssm.io.messages import Frame
from edge_ssm.runtime.pipeline import Pipeline
from edge_ssm.runtime.windows import Windows
from edge_ssm.service import snapshot as service_snapshot
from edge_ssm_build.export import signing

sys.path.insert(0, str(ROOT / "tests"))
from support.networks import random_network

SMALL = {"h": 2, "pairs": 1, "layers": 1, "d_input": 1, "d_output": 2, "window": 4}


def decoders() -> dict[str, bytes]:
    rows = b'ax,ay,time,label\n1,2.5,0.1,walk\n3,,noon,"a, b"\n-1e400,nan,,x\n'
    lines = (
        b'{"ax": 1, "ay": null, "time": 3.5, "label": "walk"}\n[1, 2]\n{"values": [1e999, NaN], "time": "\\ud83d"}\n'
    )
    return {
        "csv/header": bytes([30]) + rows,
        "csv/bare": b"\0" + b"1,2\n\xef\xbb\xbf3,4\r\n1_0,x\n\n5",
        "csv/long": b"\xff" + b"1,2\n",
        "ndjson/forms": bytes([60]) + lines,
        "ndjson/deep": b"\xff" + b"[" * 60 + b"]" * 60 + b"\n[[[1], true], 12345678901234567890]",
        "f32le/frames": b"\x05" + bytes(range(0, 240, 10)) + b"\0\0\xc0\x7f",
        "i16le/frames": b"\x03" + bytes(range(0, 240, 16)),
    }


def artifacts() -> dict[str, bytes]:
    forms = {
        "linear": random_network(**SMALL),
        "lowrank": random_network(
            **{**SMALL, "h": 3},
            active=[2],
            columns=2,
            rows=1,
            mixing_dtype="int8",
            rank_one=1.0,
            discretization="bilinear",
            mixing="plain",
            norm=None,
            prenorm=True,
        ),
        "token": random_network(
            **SMALL, vocabulary=2, norm="affine", mixing_dtype="float16", pooling="last", rate=None
        ),
    }
    scripts = {
        "artifact-content/document": bytes([0, 1, 3, 0, 7, 14, 1, 4, 1, 1, 3, 40, 1, 0, 1, 0, 1, 1]),
        "artifact-content/tensors": bytes([1, 0, 3, 5, 1, 0, 0, 4, 9, 7, 2, 0, 0, 6, 2, 3, 0, 2, 3, 1, 9, 1]),
        "artifact-content/token": bytes([2, 1, 9, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]),
    }
    made = {
        f"artifact/{name}.safetensors": artifact.to_bytes(network, {"a": [1]})[0] for name, network in forms.items()
    }
    return made | scripts


def signatures_() -> dict[str, bytes]:
    statement = {
        "_type": signatures.STATEMENT_TYPE,
        "subject": [{"name": "m", "digest": {"sha256": "0" * 64}}],
        "predicateType": signatures.PREDICATE_TYPE,
        "predicate": {"artifact_digest": "1" * 64},
    }
    payload = json.dumps(statement, separators=(",", ":")).encode()
    key = fuzzing_key()
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    envelope = signing.envelope(payload, [key])
    unnamed = json.loads(envelope)
    del unnamed["signatures"][0]["keyid"]
    return {
        "signature/valid": envelope,
        "signature/unnamed": json.dumps(unnamed).encode(),
        "signature-content/statement": bytes([1, 1, 1, 0, 0, 7, 1, 0]),
        "signature-content/envelope": bytes([0, 2, 2, 1, 0, 1, 1, 5, 2, 3, 0, 6, 17, 9]),
        "signature-key/pem": key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "signature-key/der": key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
    }


def profiles_() -> dict[str, bytes]:
    """The shipped ones without their comments and most of their sources' text: a corpus of short inputs is faster."""
    text = """board = "b"
modules = ["p3767-0003"]
default = true
super = false
power_mode = '15W'
cpu = {cores = 6, max_mhz = 1.5e3}
[memory]
bandwidth_gb_s = 68.0
[power]
rails = ["VDD_IN"]
budget_w = 15
[thermal]
passive_c = 99.0
critical_c = 1_0
[gpu]
streaming_multiprocessors = 0x8
[runtime]
engines = ["cpu"]
affinity = [5]
gpu_waits = "spin"
[sources]
all = \"\"\"x\"\"\"
"""
    return {
        "profile/whole": text.encode(),
        "profile/deep": b"a = " + b"[" * 999,
        "profile/latin": b'board = "\xe9"\n',
        "profile/dates": b'a = 1979-05-27T07:32:00Z\n"b".c = [[{}], nan, +inf]\n',
    }


def service() -> dict[str, bytes]:
    text = """[model]
path = "m.safetensors"
reload = true
[source]
input = 'serial:///dev/ttyUSB0?baud=115200'
format = "framed"
stale_after = 2.5
[window]
hop = 5
[gap]
policy = "skip"
max = 0x10
[engine]
affinity = [1, 2]
[sink]
overflow = "drop-newest"
[state]
folder = "s"
[metrics]
listen = ":9464"
"""
    network = random_network(**SMALL)
    engine = create("reference", network)
    windows = Windows(network)
    pipeline = Pipeline(engine, windows, Nowhere())
    for i in range(6):
        pipeline.process(Frame(np.array([0.1 * i]), 0.5, "a", 7 + i))
    state, snapshot = pipeline.state()
    shapes = [(len(x), x.shape[1]) for x in snapshot.state]
    document = service_snapshot.Document(
        "d", snapshot.fingerprint, shapes, state, "s", {"offset": 9}, {"width": 2}, 1.5e9
    )
    frame = encode([[1, 2], [3, 4]], 7, boot=3, time_us=5)
    return {
        "configuration/whole": text.encode(),
        "configuration/inline": b"model = {path = 'm'}\nsource.input = '-'\n",
        "configuration/wrong": b"[model]\npath = 3\n[sink]\nqueue = 0\n",
        "address/mqtt": b"mqtt://host:1883/a/+/#?client_id=x&in_flight=8",
        "address/listen": b"tcp-listen://[::1]:9000",
        "address/unix": b"unix:///run/%2Fs",
        "snapshot/valid": service_snapshot.to_bytes(document, snapshot),
        "snapshot-content/changed": bytes([3, 3, 0, 1, 2, 1, 4, 9, 1, 1, 7, 5, 2, 0, 3]),
        "framed/frame": b"\x04" + frame,
        "framed-content/header": bytes([24, 1, 0, 2, 0, 1, 0, 3, 0, 7, 0, 0, 0, *range(11), 2, 5, 5]),
    }


if __name__ == "__main__":
    for made in (decoders(), artifacts(), signatures_(), profiles_(), service()):
        for name, content in made.items():
            path = CORPUS / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    total = sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file())
    print(f"{CORPUS}: {total:,} bytes")
