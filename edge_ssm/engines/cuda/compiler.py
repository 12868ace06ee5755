"""The CUDA kernels as PTX, for any GPU, without one: ``python -m edge_ssm.engines.cuda.compiler TARGET FOLDER``.

Runs in a process of its own, as ``compiler`` does. TARGET is sm_87 and the like; the folder gets ``NAME.ptx`` for each
of KERNELS. Needs numba-cuda and NVRTC of the toolkit that the device's driver knows.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from edge_ssm.engines.cuda import cache as cuda_cache

KERNELS = ("run-1", "run-8", "serve")
"""``run`` for groups of one lane, for the shortest step, and of eight, for the most samples a second; ``serve``."""


def compiled(name: str, capability: tuple[int, int]) -> tuple[bytes, str]:
    """(PTX, name of its entry)."""
    from numba import cuda as numba_cuda
    from numba import types

    from edge_ssm.engines.cuda.kernels import kernels

    cuda: Any = numba_cuda
    at: Any = types.CPointer
    f32, i32, i64 = types.float32, types.int32, types.int64
    pointers = [at(f32), at(types.float16), at(types.int8), at(i32), at(f32), at(f32), at(f32)]
    kind, _, lanes = name.partition("-")
    run, serve = kernels(int(lanes or 1))
    pointers += [at(i64), at(i64)] if kind == "serve" else []
    # Atomic additions want an array.
    counters = types.Array(types.int64, 1, "C")
    signature = types.void(*pointers, i32, i32, i32, i32, at(f32), counters)
    text, _ = cuda.compile(
        serve if kind == "serve" else run, signature, cc=capability, device=False, output="ptx", abi="numba"
    )
    content = text if isinstance(text, bytes) else text.encode()
    found = re.search(rb"\.visible \.entry (\w+)\(", content)
    assert found is not None
    return content.rstrip(b"\0"), found[1].decode()


def capability(target: str) -> tuple[int, int]:
    number = int(target.removeprefix("sm_"))
    return number // 10, number % 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    for name in KERNELS:
        ptx, entry = compiled(name, capability(arguments.target))
        content = cuda_cache.encoded(ptx, arguments.target, name, entry)
        (arguments.folder / f"{name}.ptx").write_bytes(content)


if __name__ == "__main__":
    main()
