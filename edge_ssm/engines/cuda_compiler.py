"""The CUDA kernels as PTX, for any GPU, without one: ``python -m edge_ssm.engines.cuda_compiler TARGET FOLDER``.

Runs in a process of its own, as ``compiler`` does. TARGET is sm_87 and the like; the folder gets ``LANES.ptx`` for each
number of lanes that a kernel is made for. Needs numba-cuda and NVRTC of the toolkit that the device's driver knows.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from edge_ssm.engines import cuda_store

LANES = (1, 8)
"""Lanes that a group of blocks takes: one for the shortest step, eight for the most samples a second."""


def compiled(lanes_together: int, capability: tuple[int, int]) -> tuple[bytes, str]:
    """(PTX, name of its entry)."""
    from numba import cuda as numba_cuda
    from numba import types

    from edge_ssm.engines.cuda_kernel import kernel

    cuda: Any = numba_cuda
    at: Any = types.CPointer
    f32, i32 = types.float32, types.int32
    pointers = [at(f32), at(types.float16), at(types.int8), at(i32), at(f32), at(f32), at(f32)]
    # Atomic additions want an array.
    counters = types.Array(types.int64, 1, "C")
    signature = types.void(*pointers, i32, i32, i32, i32, at(f32), counters)
    text, _ = cuda.compile(kernel(lanes_together), signature, cc=capability, device=False, output="ptx", abi="numba")
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
    for lanes in LANES:
        ptx, entry = compiled(lanes, capability(arguments.target))
        content = cuda_store.encoded(ptx, arguments.target, lanes, entry)
        (arguments.folder / f"{lanes}.ptx").write_bytes(content)


if __name__ == "__main__":
    main()
