"""The fuzz targets of benchmarks/fuzz on their small corpus. The long run is ``python benchmarks/fuzz/run.py``."""

import random
import re

import pytest
from fuzz_targets import CORPUS, TARGETS

from edge_ssm.errors import EdgeSSMError
from edge_ssm.formats import artifact
from edge_ssm.io.codecs.registry import FORMATS

SEEDS = sorted(path for path in CORPUS.rglob("*") if path.is_file())


def survives(fuzz, data):
    """What a target may do with any bytes: return, or refuse in one line."""
    try:
        fuzz(data)
    except EdgeSSMError as error:
        assert str(error)


def test_every_target_has_seeds_and_every_seed_a_target():
    assert {path.parent.name for path in SEEDS} == set(TARGETS)
    assert set(FORMATS) <= set(TARGETS)
    assert sum(path.stat().st_size for path in SEEDS) < 32_000


def test_the_seeds_of_artifacts_are_artifacts():
    for path in (CORPUS / "artifact").glob("*.safetensors"):
        artifact.load(path)


def test_a_full_run_is_ten_million_inputs():
    assert sum(target.inputs for target in TARGETS.values()) >= 10_000_000


@pytest.mark.parametrize("path", SEEDS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_seed_and_its_neighbours(path):
    """The seed, its beginnings and some random changes of it: what a fuzzer tries first."""
    fuzz, data = TARGETS[path.parent.name].build(), path.read_bytes()
    survives(fuzz, data)
    rng = random.Random(path.name)
    for _ in range(100):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        survives(fuzz, bytes(changed))
        survives(fuzz, data[: rng.randrange(len(data) + 1)])


def test_content_behind_a_digest_or_a_signature_is_reached():
    """An untouched base loads; a signed statement is opened."""
    TARGETS["artifact-content"].build()(b"")
    TARGETS["signature-content"].build()(b"")
    TARGETS["signature"].build()((CORPUS / "signature" / "valid").read_bytes())
    with pytest.raises(EdgeSSMError) as caught:
        # The document's member `window` is 0, behind a digest that is right.
        TARGETS["artifact-content"].build()(bytes([0, 1, 11, 7, 0]))
    assert re.search(r"document: .*window", str(caught.value))
    with pytest.raises(EdgeSSMError, match=r"statement: .*predicate"):
        # The statement's last member is an empty string, signed rightly.
        TARGETS["signature-content"].build()(bytes([1, 3, 0, 6, 19, 0]))


BAD_TARGETS = """
import sys, time, ctypes
from pathlib import Path
import fuzz_process, fuzz_targets

def entered(name, act):
    fuzz_targets.register(name, 1, 8)(lambda: act)

def at_fifty(act):
    count = 0
    def fuzz(data):
        nonlocal count
        count += 1
        if count == 50:
            act()
    return fuzz

entered("raises", at_fifty(lambda: {}["x"]))
entered("allocates", at_fifty(lambda: bytearray(1 << 30)))
entered("crashes", at_fifty(lambda: ctypes.string_at(0)))
entered("hangs", at_fifty(lambda: time.sleep(60)))
fuzz_process.main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "crashes", "hangs", "finding"),
    [
        ("raises", 1, 0, "exception-"),
        ("allocates", 1, 0, "exception-"),
        ("crashes", 1, 0, "crash-"),
        ("hangs", 0, 1, "timeout-"),
    ],
)
def test_a_target_that_does_harm_is_seen_and_fuzzing_goes_on(tmp_path, monkeypatch, name, crashes, hangs, finding):
    pytest.importorskip("atheris")
    import run

    script = tmp_path / "bad.py"
    script.write_text(BAD_TARGETS)
    monkeypatch.setenv("PYTHONPATH", str(run.HERE))
    # One that ends the process is met again fifty inputs after each start: 80 inputs meet it once.
    row = run.fuzz(name, 80, 1, tmp_path / "work", script)
    assert (row["inputs"] >= 79, row["crashes"], row["hangs"]) == (True, crashes, hangs), row
    (found, *_) = sorted(run.findings(tmp_path / "work" / name))
    assert found.startswith(finding)
