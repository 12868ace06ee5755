"""Fuzz one target in this process until a number of inputs is done, or a hard end. ``run.py`` starts it.

    python fuzz_process.py TARGET INPUTS SEED FOLDER

FOLDER has ``progress`` (fuzz_targets.PROGRESS) and gets ``corpus/`` and a file a finding. An exception is a finding
and the fuzzing goes on; a crash of the interpreter, a hang or too much memory ends the process, as libFuzzer does.
"""

from __future__ import annotations

import hashlib
import mmap
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import atheris

# Coverage guides the fuzzer through our own code, and through the TOML parser, which is Python as well.
with atheris.instrument_imports(include=["edge_ssm", "tomllib", "tomli"]):
    import fuzz_targets

    import edge_ssm.errors

TIMEOUT_S = 5
"""An input that takes longer hangs. Python prints its traceback then."""
RSS_LIMIT_MB = 600
GROWTH_LIMIT_MB = 300
"""Of the address space after start: a larger allocation raises MemoryError, which is a finding even if it is not
touched."""
MAX_FINDINGS = 50


def address_space() -> int:
    """Bytes of address space in use."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _escaped(word: str) -> str:
    """As libFuzzer's dictionaries want it."""
    return "".join(f"\\x{byte:02x}" for byte in word.encode())


def main(name: str, inputs: int, seed: int, folder: Path) -> None:
    target = fuzz_targets.TARGETS[name]
    fuzz = target.build()
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    with open(folder / "progress", "r+b") as file:
        progress = mmap.mmap(file.fileno(), fuzz_targets.PROGRESS.size)
    done, crashes, slowest = fuzz_targets.PROGRESS.unpack(progress)
    seen: set[str] = set()
    clock = time.perf_counter_ns

    def one(data: bytes) -> None:
        nonlocal done, crashes, slowest
        began = clock()
        try:
            fuzz(data)
        except edge_ssm.errors.EdgeSSMError:
            pass
        except BaseException as error:
            crashes += 1
            place = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} {place.filename}:{place.lineno}"
            if kind not in seen and len(seen) < MAX_FINDINGS:
                seen.add(kind)
                stem = folder / f"exception-{hashlib.sha256(kind.encode()).hexdigest()[:12]}"
                stem.write_bytes(data)
                stem.with_suffix(".txt").write_text(traceback.format_exc()[-10_000:])
        done += 1
        slowest = max(slowest, clock() - began)
        fuzz_targets.PROGRESS.pack_into(progress, 0, done, crashes, slowest)

    limit = address_space() + (GROWTH_LIMIT_MB << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    options: dict[str, Any] = {
        "runs": inputs,
        "seed": seed,
        "max_len": target.max_len,
        "timeout": TIMEOUT_S,
        "rss_limit_mb": RSS_LIMIT_MB,
        "malloc_limit_mb": GROWTH_LIMIT_MB,
        "artifact_prefix": f"{folder}/",
        "reload": 0,
        "print_funcs": 0,
        "print_final_stats": 1,
    }
    if target.words:
        options["dict"] = folder / "words"
        options["dict"].write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))
    seeds = [str(target.seeds)] if target.seeds.is_dir() else []
    atheris.Setup([sys.argv[0], *(f"-{k}={v}" for k, v in options.items()), str(corpus), *seeds], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
