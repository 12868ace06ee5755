"""Imported checkpoints of every format: the stream's logits against the checkpoint's own convolution in float64.

    python benchmarks/imports.py [--output benchmarks/imports.json]

For each format, N and age (HiPPO initialisation, or trained on the `watch` recordings), a checkpoint is written in the
layout of its project, imported, and streamed for 1,000 and 20,000 samples through the CPU engine and the reference. The
step of a rank-one network is timed next to that of a diagonal one with the same N. The table of docs/import.md is
rewritten between its marks. Needs the `host` extra. The exit status is 1 if a logit is off by more than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_ssm.engines.registry import create
from edge_ssm.profiler import step_table
from edge_ssm_build.data import datasets
from edge_ssm_build.importers.architecture import read_architecture
from edge_ssm_build.importers.checkpoints import read_checkpoint
from edge_ssm_build.importers.convert import to_network
from edge_ssm_build.importers.verification import compare_with_checkpoint, random_samples
from edge_ssm_build.pruning.executors import prepare_process
from edge_ssm_build.training.checkpoint import Checkpoint, Recipe, new_checkpoint
from edge_ssm_build.training.loop import fit
from edge_ssm_build.training.network import Config

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from support import layouts

WINDOW = 100
DIAGONAL, BILINEAR = {"init": "legs"}, {"init": "legs", "discretization": "bilinear"}
RANK_ONE = {"kernel": "s4", "init": "legs", "discretization": "bilinear", "l_kernel": WINDOW}
FORMS = {
    "minimal S4D": (DIAGONAL, layouts.minimal_s4d, {}),
    "S4Block diag, zoh": (DIAGONAL, layouts.block_stack, {"discretization": "zoh"}),
    "S4Block diag, bilinear": (BILINEAR, layouts.block_stack, {"discretization": "bilinear"}),
    "S4Block dplr": (RANK_ONE, layouts.block_stack, {}),
    "S4oP S4D": (DIAGONAL, layouts.s4op, {}),
    "S4oP S4": (RANK_ONE, layouts.s4op, {}),
}


def make_checkpoints(data: datasets.Dataset, n: int, options: dict[str, object]) -> dict[str, Checkpoint]:
    """Return checkpoints with N = n by age: "fresh" and "trained"."""
    shape = {"d_input": len(data.channels), "d_output": len(data.labels), "d_model": 16, "d_state": n, **options}
    recipe = Recipe(window=WINDOW, epochs=3)
    checkpoints = {age: new_checkpoint(data, "watch", Config(**shape), recipe) for age in ("fresh", "trained")}
    fit(checkpoints["trained"], data, recipe)
    return checkpoints


def errors(folder: Path, checkpoint: Checkpoint, layout: Any, stated: dict[str, str]) -> dict[str, float]:
    """Return the largest error of a logit by engine and number of samples, and the number of rank-one channels."""
    path, arch = folder / "model.pth", folder / "arch.toml"
    torch.save(layout(checkpoint.model), path)
    spec = checkpoint.spec
    fields = {"prenorm": False, "pooling": "mean", "window": WINDOW, "channels": list(spec.channels)}
    arch.write_text(layouts.arch_toml(**fields, mean=spec.mean.tolist(), std=spec.std.tolist(), **stated))
    imported = read_checkpoint(path, "auto", read_architecture(arch))
    network = to_network(imported)
    result = {}
    for steps in (1000, 20_000):
        x = random_samples(network, steps)
        for deviation in compare_with_checkpoint(network, imported, x):
            result[f"{deviation.engine} {steps}"] = deviation.error
    return result | {"rank_one": sum(int(b.ssm.rank_one.sum()) for b in network.blocks)}


def step_ratio() -> float:
    """Return the duration of a rank-one step over that of a diagonal one, with H = 128, N = 64 and 4 layers."""
    engines = [
        create("cpu", step_table.synthetic(128, 4, 128, 32, 128, "float32", rank_one)) for rank_one in (True, False)
    ]
    rank_one_us, diagonal_us = step_table.measure(engines, np.random.default_rng(0).standard_normal((100, 1)))
    return rank_one_us / diagonal_us


def main() -> None:
    """Measure every format, write the JSON file and the table, and exit with 1 if a logit is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "imports.json", help="JSON file to write")
    arguments = parser.parse_args()
    prepare_process()
    data, rows = datasets.load("watch"), []
    with tempfile.TemporaryDirectory() as folder:
        for n in (16, 32, 64):
            checkpoints: dict[str, dict[str, Checkpoint]] = {}
            for form, (options, layout, stated) in FORMS.items():
                key = json.dumps(options)
                if key not in checkpoints:
                    checkpoints[key] = make_checkpoints(data, n, options)
                for age, checkpoint in checkpoints[key].items():
                    row = {"form": form, "N": n, "age": age, **errors(Path(folder), checkpoint, layout, stated)}
                    rows.append(row)
                    print(row, flush=True)
    ratio = step_ratio()
    print(f"a rank-one step takes {ratio:.2f} times a diagonal one")
    arguments.output.write_text(json.dumps({"step_ratio": ratio, "rows": rows}, indent=1) + "\n")
    names = ["checkpoint", "N", "parameters", "1,000 samples", "20,000 samples", "rank-one channels of 32"]
    table = [names, ["---"] * len(names)]
    for r in rows:
        figures = [f"{r['cpu 1000']:.1e}", f"{r['cpu 20000']:.1e}", str(r["rank_one"])]
        table.append([str(r["form"]), str(r["N"]), str(r["age"]), *figures])
    text = "".join(f"| {' | '.join(line)} |\n" for line in table)
    page = ROOT / "docs" / "import.md"
    before, rest = page.read_text().split("<!-- table -->\n", 1)
    _, after = rest.split("<!-- end -->\n", 1)
    page.write_text(f"{before}<!-- table -->\n{text}<!-- end -->\n{after}")
    compared = [f"{engine} {steps}" for engine in ("cpu", "reference") for steps in (1000, 20_000)]
    sys.exit(any(not r[name] <= 1e-4 for r in rows for name in compared))


if __name__ == "__main__":
    main()
