"""Compile the CUDA kernels to PTX: ``python -m edge_ssm.engines.cuda.compiler TARGET FOLDER``. No GPU is needed.

``cache`` runs this module in a separate process. TARGET is a compute capability such as sm_87. The folder receives
``NAME.ptx`` for each of KERNELS. Compiling needs numba-cuda, and NVRTC of a CUDA version that the device's driver
supports.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from edge_ssm.engines.cuda import cache as cuda_cache

KERNELS = ("run-1", "run-8", "serve")
"""``run`` for groups of one lane, which has the shortest step, and for groups of eight lanes, which has the highest
throughput; and ``serve``."""


def compile_kernel(name: str, capability: tuple[int, int]) -> tuple[bytes, str]:
    """Compile one of KERNELS for a compute capability (major, minor). Return the PTX and the name of its entry."""
    from numba import cuda as numba_cuda
    from numba import types

    from edge_ssm.engines.cuda.kernels import kernels

    cuda: Any = numba_cuda
    pointer: Any = types.CPointer
    f32, i32, i64 = types.float32, types.int32, types.int64
    pointers = [
        pointer(f32),
        pointer(types.float16),
        pointer(types.int8),
        pointer(i32),
        pointer(f32),
        pointer(f32),
        pointer(f32),
    ]
    kind, _, lanes = name.partition("-")
    run, serve = kernels(int(lanes or 1))
    pointers += [pointer(i64), pointer(i64)] if kind == "serve" else []
    # Atomic additions need an array instead of a pointer.
    counters = types.Array(types.int64, 1, "C")
    signature = types.void(*pointers, i32, i32, i32, i32, pointer(f32), counters)
    text, _ = cuda.compile(
        serve if kind == "serve" else run, signature, cc=capability, device=False, output="ptx", abi="numba"
    )
    content = text if isinstance(text, bytes) else text.encode()
    entry = re.search(rb"\.visible \.entry (\w+)\(", content)
    assert entry is not None
    return content.rstrip(b"\0"), entry[1].decode()


def capability(target: str) -> tuple[int, int]:
    """Return the compute capability (major, minor) of a target such as sm_87."""
    number = int(target.removeprefix("sm_"))
    return number // 10, number % 10


def main() -> None:
    """Compile all kernels for the target named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    for name in KERNELS:
        ptx, entry = compile_kernel(name, capability(arguments.target))
        content = cuda_cache.encode(ptx, arguments.target, name, entry)
        (arguments.folder / f"{name}.ptx").write_bytes(content)


if __name__ == "__main__":
    main()
