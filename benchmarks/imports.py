"""Imported checkpoints of every form: the stream's logits against the checkpoint's own convolution in float64.

    python benchmarks/imports.py [--output benchmarks/imports.json]

For each form, N and age (fresh HiPPO initialisation, or trained on the `watch` recordings) a checkpoint is written in
the layout of its project, imported, and streamed for 1,000 and 20,000 samples of the CPU engine and the reference. Also
times a step of a rank-one network beside a diagonal one of the same N. Writes the table of docs/import.md between its
marks.
Needs the `host` extra; exit status 1 if a logit is off by over 1e-4.
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
from edge_ssm_build.importers import checkpoints as importers_checkpoints
from edge_ssm_build.importers import convert, verification
from edge_ssm_build.pruning.executors import prepare_process
from edge_ssm_build.training import checkpoint as checkpoints
from edge_ssm_build.training import loop
from edge_ssm_build.training.network import Config

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "host"))
import layouts

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


def saved_checkpoints(data: datasets.Dataset, n: int, options: dict[str, object]) -> dict[str, checkpoints.Checkpoint]:
    shape = {"d_input": len(data.channels), "d_output": len(data.labels), "d_model": 16, "d_state": n, **options}
    recipe = checkpoints.Recipe(window=WINDOW, epochs=3)
    made = {}
    for age in ("fresh", "trained"):
        made[age] = checkpoints.new_checkpoint(data, "watch", Config(**shape), recipe)
    loop.fit(made["trained"], data, recipe)
    return made


def errors(folder: Path, checkpoint: checkpoints.Checkpoint, layout: Any, stated: dict[str, str]) -> dict[str, float]:
    path, arch = folder / "model.pth", folder / "arch.toml"
    torch.save(layout(checkpoint.model), path)
    spec = checkpoint.spec
    fields = {"prenorm": False, "pooling": "mean", "window": WINDOW, "channels": list(spec.channels)}
    arch.write_text(layouts.arch_toml(**fields, mean=spec.mean.tolist(), std=spec.std.tolist(), **stated))
    read = importers_checkpoints.read(path, "auto", importers_checkpoints.read_arch(arch))
    network = convert.to_network(read)
    found = {}
    for steps in (1000, 20_000):
        x = verification.samples_for(network, steps)
        for agreement in verification.against_checkpoint(network, read, x):
            found[f"{agreement.engine} {steps}"] = agreement.error
    return found | {"rank_one": sum(int(b.ssm.rank_one.sum()) for b in network.blocks)}


def step_ratio() -> float:
    """A rank-one step over a diagonal one, H = 128, N = 64, 4 layers."""
    engines = [create("cpu", step_table.synthetic(128, 4, 128, 32, 128, "float32", low)) for low in (True, False)]
    rank_one, diagonal = step_table.measure(engines, np.random.default_rng(0).standard_normal((100, 1)))
    return rank_one / diagonal


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "imports.json")
    arguments = parser.parse_args()
    prepare_process()
    data, rows = datasets.load("watch"), []
    with tempfile.TemporaryDirectory() as folder:
        for n in (16, 32, 64):
            made: dict[str, dict[str, checkpoints.Checkpoint]] = {}
            for form, (options, layout, stated) in FORMS.items():
                key = json.dumps(options)
                made.setdefault(key, saved_checkpoints(data, n, options))
                for age, checkpoint in made[key].items():
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
