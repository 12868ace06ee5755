"""Measure what the CUDA kernels need of a multiprocessor, with the toolkit's assembler. No GPU is needed.

    python benchmarks/gpu/resources.py [--target sm_87] [--output benchmarks/gpu/sm_87.json]

``registers`` is per thread; a block has 256 threads. ``shared_bytes`` is the kernel's static shared memory; what a
network needs is dynamic shared memory, whose size is set at launch.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from edge_ssm.engines.cuda import cache as cuda_cache


def resources(target: str, folder: Path | None = None) -> list[dict[str, Any]]:
    """Return one row per kernel, of those in ``folder`` or compiled for ``target``."""
    with tempfile.TemporaryDirectory() as temporary:
        if folder is None:
            kernels = cuda_cache.compile_and_keep(target, Path(temporary))[1]
        else:
            paths = folder.glob(f"*{cuda_cache.SUFFIX}")
            files = [cuda_cache.decode(path.read_bytes()) for path in paths]
            kernels = {kernel.header.kernel: kernel for kernel in files}
        rows = []
        for name, kernel in sorted(kernels.items()):
            source = Path(temporary) / "k.ptx"
            source.write_bytes(kernel.ptx)
            command = ["ptxas", f"-arch={target}", "-v", str(source), "-o", str(source.with_suffix(".cubin"))]
            listing = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", listing)
            registers = re.search(r"Used (\d+) registers", listing)
            shared = re.search(r"(\d+) bytes smem", listing)
            assert registers is not None
            rows.append(
                {
                    "kernel": name,
                    "registers": int(registers[1]),
                    "spill_bytes": sum(int(n) for sizes in spills for n in sizes),
                    "shared_bytes": int(shared[1]) if shared else 0,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", default="sm_87")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = resources(arguments.target)
    version = subprocess.run(["ptxas", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release ([\d.]+)", version)
    assert release is not None
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    output = arguments.output or Path(__file__).parent / f"{arguments.target}.json"
    output.write_text(f'{{"target": "{arguments.target}", "ptxas": "{release[1]}", "rows": [\n  {lines}\n]}}\n')
    print(output.read_text())


if __name__ == "__main__":
    main()
