"""Pruning measured: S4oP's random choice, every method of ours, and narrower networks trained from scratch.

    python benchmarks/pruning/run.py train --work DIR [--tasks digits,...] [--kernels s4d,s4] [--seeds 0,1,2]
    python benchmarks/pruning/run.py measure --work DIR
    python benchmarks/pruning/run.py page

``train`` makes every network (more than an hour on two cores when two are started side by side: they share the work
through the folder, which also resumes). ``measure`` times one step of each on the CPU engine, interleaved with its
unpruned network, and writes results.json. ``page`` draws README.md's tables and the picture from that. Needs the
``host`` extra.

Every network of a family is trained on the training split, chosen on the validation split and scored here on the test
split; nothing is chosen by the test score. Each artifact is written as the command writes it: its stream is compared
with the network in float64 and scored, and how they agree is kept. A network that fails has no score; ``measure`` names
it and ends with status 1. Accuracies are balanced ones (mean recall over classes).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_ssm_build.training import checkpoint as checkpoints

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Task:
    data: str
    window: int
    epochs: int
    d_model: int = 64
    d_state: int = 32
    n_layers: int = 2
    methods: tuple[str, ...] = ()
    """Empty: all."""
    rates: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)


TASKS = {
    "digits": Task("digits", 64, 32),
    "ecg5000": Task("ecg5000", 140, 40),
    "watch": Task("watch", 100, 10),
    "forda": Task("forda", 500, 6, d_model=32),
    # The "ecg" shape of the engine benchmarks, where the call itself weighs little.
    "digits, large": Task("digits", 64, 24, 128, 64, 4, ("smallest",), (0.3, 0.5, 0.6, 0.7, 0.8)),
    "watch, large": Task("watch", 100, 10, 128, 64, 4, ("smallest",), (0.3, 0.5, 0.6, 0.7, 0.8)),
    "ecg5000, large": Task("ecg5000", 140, 24, 128, 64, 4, ("smallest",), (0.3, 0.5, 0.6, 0.7, 0.8)),
}

NARROW_RATES = (0.5, 0.7, 0.9)
METHODS = ("s4op", "magnitude", "taylor", "energy", "h2", "sensitivity", "best", "compact", "smallest", "narrow")
MAIN = tuple(name for name in METHODS if name != "smallest")


def _cell(work: Path, task: str, kernel: str, seed: int) -> Path:
    return work / f"{task.replace(', ', '-')}-{kernel}-{seed}"


def _config(task: Task, data: Any, kernel: str, d_model: int) -> Any:
    from edge_ssm_build.training.network import Config

    shape = {"d_model": d_model, "d_state": task.d_state, "n_layers": task.n_layers}
    if kernel == "s4":
        shape |= {"kernel": "s4", "discretization": "bilinear", "init": "legs", "l_kernel": task.window}
    return Config(d_input=len(data.channels), d_output=len(data.labels), **shape)


def _train(task: Task, data: Any, kernel: str, seed: int, epochs: int, d_model: int) -> Any:
    from edge_ssm_build.training import loop

    recipe = checkpoints.Recipe(window=task.window, epochs=epochs, seed=seed)
    checkpoint = checkpoints.new_checkpoint(data, task.data, _config(task, data, kernel, d_model), recipe)
    reached = loop.fit(checkpoint, data, recipe)
    checkpoint.history.append({"stage": "train", "seed": seed, "epochs": epochs, "validation": asdict(reached)})
    return checkpoint


def _row(checkpoint: Any, data: Any, name: str, folder: Path, **known: Any) -> dict[str, Any]:
    """Size and the artifact's test score and agreement; the artifact, written as the command does, is timed later.

    A network whose artifact fails has no score, only the reason.
    """
    from edge_ssm.model.cost import cost
    from edge_ssm_build.export.artifact import export
    from edge_ssm_build.pruning.search import FAILURES, network_of

    try:
        agreements, made_by = export(checkpoint, data, folder / f"{name}.safetensors")
    except FAILURES as error:
        return known | {"artifact": None, "failure": str(error)}
    reached, total = made_by["scores"]["test"], cost(network_of(checkpoint))
    return known | {
        "artifact": f"{name}.safetensors",
        "accuracy": reached["balanced_accuracy"],
        "plain_accuracy": reached["accuracy"],
        "agreement": {engine: asdict(agreement) for engine, agreement in agreements.items()},
        "validation": checkpoint.history[-1]["validation"]["balanced_accuracy"],
        "parameters": total.parameters,
        "weight_bytes": total.weight_bytes,
        "multiply_adds": total.multiply_adds,
        "active": [b.active for b in total.blocks],
        "states": [2 * b.pairs for b in total.blocks],
        "columns": [b.columns for b in total.blocks],
        "rows": [b.rows for b in total.blocks],
    }


def _plan(method: str, base: Any, rates: tuple[float, ...]) -> Any:
    from edge_ssm_build.pruning import plan

    return plan.plan_of(plan.METHODS[method], rates, base)


def _family(method: str, task: Task, base: Any, data: Any, seed: int, folder: Path) -> list[dict[str, Any]]:
    from edge_ssm_build.pruning import plan

    todo = _plan(method, base, task.rates)
    if method == "s4op":
        # Three candidates a rate, other ones for each seed of the base network.
        todo = replace(todo, seeds=tuple(3 * seed + i for i in range(3)))
    else:
        todo = replace(todo, seeds=(seed,))
    current, rows = base, []
    for step, rate in enumerate(task.rates):
        made = [plan.candidate(current, base, data, todo, step, s) for s in todo.seeds]
        current, _ = max(made, key=lambda c: (c[1].balanced_accuracy, -c[1].loss))
        rows.append(_row(current, data, f"{method}-{rate:g}", folder, rate=rate))
    return rows


def _narrow(task: Task, kernel: str, base: Any, data: Any, seed: int, folder: Path) -> list[dict[str, Any]]:
    """From scratch, as narrow as it takes to do no more multiply-adds than ``compact`` does at that rate; trained for
    as many epochs as pruning spent up to there."""
    from edge_ssm.model.cost import cost
    from edge_ssm_build.pruning.search import network_of
    from edge_ssm_build.training.network import SSMNetwork

    compact = json.loads((folder / "compact.json").read_text())
    fine_tune = _plan("compact", base, task.rates).epochs
    rows = []
    for i, (rate, row) in enumerate(zip(task.rates, compact, strict=True)):
        if rate not in NARROW_RATES or row["artifact"] is None:
            continue
        width = task.d_model
        while width > 1:
            trial = replace(base, model=SSMNetwork(_config(task, data, kernel, width)))
            if cost(network_of(trial)).multiply_adds <= row["multiply_adds"]:
                break
            width -= 1
        made = _train(task, data, kernel, seed, task.epochs + fine_tune * (i + 1), width)
        rows.append(_row(made, data, f"narrow-{rate:g}", folder, rate=rate, width=width))
    return rows


def _states_alone(base: Any, data: Any, folder: Path) -> list[dict[str, Any]]:
    """States removed without any retraining, by each method that the kernel allows."""
    from edge_ssm_build.pruning import calibration, states

    x, y = calibration.windows(base, data)
    measured = calibration.measure(base.model, x, y)
    present = sum(int(ssm.pairs.sum()) for ssm in base.model.ssms())
    rows = []
    for method in ("h2",) if base.model.config.kernel == "s4" else states.METHODS:
        for share in (0.4, 0.5, 0.6, 0.7, 0.8):
            made = replace(base, model=copy.deepcopy(base.model))
            states.reduce(made.model, measured, base.recipe.window, round(present * (1 - share)), method)
            rows.append(_row(made, data, f"states-{method}-{share:g}", folder, rate=share, method=f"states-{method}"))
    return rows


def train(arguments: argparse.Namespace) -> None:
    from edge_ssm import files
    from edge_ssm_build.data import datasets
    from edge_ssm_build.pruning.executors import prepare_process

    prepare_process()

    def claim(folder: Path, part: str) -> bool:
        """Whether this process is to do it: not done, and nobody else at it."""
        if (folder / f"{part}.json").exists():
            return False
        lock = folder / f"{part}.lock"
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def finish(folder: Path, part: str, rows: Any) -> None:
        files.write(folder / f"{part}.json", json.dumps(rows).encode())
        (folder / f"{part}.lock").unlink()
        print(
            folder.name, part, *(f"{100 * r['accuracy']:.1f}" if r["artifact"] else "failed" for r in rows), flush=True
        )

    for seed in arguments.seeds:
        for name in arguments.tasks:
            task, data = TASKS[name], datasets.load(TASKS[name].data)
            for kernel in arguments.kernels:
                folder = _cell(arguments.work, name, kernel, seed)
                folder.mkdir(parents=True, exist_ok=True)
                if claim(folder, "base"):
                    base = _train(task, data, kernel, seed, task.epochs, task.d_model)
                    checkpoints.save_checkpoint(folder / "base.pt", base)
                    finish(folder, "base", [_row(base, data, "base", folder, rate=0.0)])
                if not (folder / "base.json").exists():
                    continue  # the other process is at it; a later call takes what is left
                base = checkpoints.load_checkpoint(folder / "base.pt")
                if not task.methods and claim(folder, "states"):
                    finish(folder, "states", _states_alone(base, data, folder))
                for method in [m for m in task.methods or MAIN if m in arguments.methods]:
                    if method == "narrow" and not (folder / "compact.json").exists():
                        continue
                    if not claim(folder, method):
                        continue
                    if method == "narrow":
                        rows = _narrow(task, kernel, base, data, seed, folder)
                    else:
                        rows = _family(method, task, base, data, seed, folder)
                    finish(folder, method, rows)


def measure(arguments: argparse.Namespace) -> None:
    from edge_ssm import files
    from edge_ssm.engines.registry import create
    from edge_ssm.formats import artifact
    from edge_ssm.profiler import step_table

    rows, failed = [], []
    for name in TASKS:
        for kernel in ("s4d", "s4"):
            for seed in range(10):
                folder = _cell(arguments.work, name, kernel, seed)
                if not (folder / "base.json").exists():
                    continue
                base_row = json.loads((folder / "base.json").read_text())[0]
                made = []
                for part in sorted(folder.glob("*.json")):
                    found = [{"method": part.stem} | row for row in json.loads(part.read_text())]
                    failed += [
                        f"{folder.name}, {r['method']} {r['rate']:g}: {r['failure']}"
                        for r in found
                        if not r["artifact"]
                    ]
                    made += [row for row in found if row["rate"] and row["artifact"]]
                if base_row["artifact"] is None:
                    continue
                networks = [artifact.load(folder / row["artifact"]).network for row in [base_row, *made]]
                samples = np.random.default_rng(0).standard_normal((100, networks[0].d_input))
                samples = networks[0].input.mean + networks[0].input.std * samples
                times = step_table.measure([create("cpu", network) for network in networks], samples)
                for row, step_us in zip(made, times[1:], strict=True):
                    known = {"task": name, "kernel": kernel, "method": row["method"], "rate": row["rate"], "seed": seed}
                    known |= {"accuracy": row["accuracy"], "base_accuracy": base_row["accuracy"]}
                    known |= {"step_us": round(step_us, 3), "base_step_us": round(times[0], 3)}
                    rest = {k: v for k, v in row.items() if k not in known and k != "artifact"}
                    base = {f"base_{k}": base_row[k] for k in ("plain_accuracy", "parameters", "multiply_adds")}
                    rows.append(known | rest | base)
                print(folder.name, f"unpruned {times[0]:.2f} us, {len(made)} networks", flush=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    files.write(HERE / "results.json", f"[\n{lines}\n]\n".encode())
    if failed:
        sys.exit("\n".join([f"{len(failed)} networks are not in results.json:", *failed]))


def main() -> None:
    def listed(text: str) -> list[str]:
        return text.split("+")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["train", "measure", "page"])
    parser.add_argument("--work", type=Path, default=Path("runs/pruning"), help="networks go here; can be resumed")
    parser.add_argument("--tasks", type=listed, default=list(TASKS), help="separated by +")
    parser.add_argument("--kernels", type=listed, default=["s4d", "s4"], help="separated by +")
    parser.add_argument("--methods", type=listed, default=list(METHODS), help="separated by +")
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split("+")], default=[0, 1, 2])
    arguments = parser.parse_args()
    if arguments.command == "train":
        train(arguments)
    elif arguments.command == "measure":
        measure(arguments)
    else:
        sys.path.insert(0, str(HERE))
        from page import write

        write(HERE / "results.json", HERE)


if __name__ == "__main__":
    main()
