"""Pruning measured: S4oP's random choice, every other method, and narrower networks trained from scratch.

    python benchmarks/pruning/run.py train --work DIR [--tasks digits+...] [--kernels s4d+s4] [--seeds 0+1+2]
    python benchmarks/pruning/run.py measure --work DIR
    python benchmarks/pruning/run.py page

``train`` makes every network. That takes more than an hour with two processes on two cores; processes share the work
through the folder, and a later call resumes. ``measure`` times one step of each network on the CPU engine, interleaved
with its unpruned network, and writes results.json. ``page`` makes the tables of README.md and the pictures from that.
Needs the ``host`` extra.

Every network of a family is trained on the training split, chosen on the validation split and scored on the test split;
nothing is chosen by the test score. Each artifact is written as the command writes it: its stream is compared with the
network in float64 and scored, and their agreement is recorded. A network whose artifact fails has no score; ``measure``
names it and exits with status 1. Accuracies are balanced ones (mean recall over classes).
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

HERE = Path(__file__).parent
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A data set and the networks that are trained and pruned on it."""

    data: str
    """Name of the data set."""
    window: int
    """Samples per window."""
    epochs: int
    d_model: int = 64
    d_state: int = 32
    n_layers: int = 2
    methods: tuple[str, ...] = ()
    """Methods to run; empty for all of ``MAIN``."""
    rates: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)


TASKS = {
    "digits": Task("digits", 64, 32),
    "ecg5000": Task("ecg5000", 140, 40),
    "watch": Task("watch", 100, 10),
    "forda": Task("forda", 500, 6, d_model=32),
    # The "ecg" shape of the engine benchmarks, for which the overhead of a call is small.
    "digits, large": Task("digits", 64, 24, 128, 64, 4, ("smallest",), (0.3, 0.5, 0.6, 0.7, 0.8)),
    "watch, large": Task("watch", 100, 10, 128, 64, 4, ("smallest",), (0.3, 0.5, 0.6, 0.7, 0.8)),
    "ecg5000, large": Task("ecg5000", 140, 24, 128, 64, 4, ("smallest",), (0.3, 0.5, 0.6, 0.7, 0.8)),
}

NARROW_RATES = (0.5, 0.7, 0.9)
"""Rates for which a narrower network is trained."""
STATE_SHARES = (0.4, 0.5, 0.6, 0.7, 0.8)
"""Shares of all states that are removed without retraining."""
MAX_SEEDS = 10
METHODS = ("s4op", "magnitude", "taylor", "energy", "h2", "sensitivity", "best", "compact", "smallest", "narrow")
MAIN = tuple(name for name in METHODS if name != "smallest")


@dataclass(frozen=True)
class Cell:
    """One base network: a task, a kernel and a seed, with its data and its folder."""

    task: Task
    kernel: str
    seed: int
    data: Any
    folder: Path

    def config(self, d_model: int) -> Any:
        """Return the configuration of a network with so many channels."""
        from edge_ssm_build.training.network import Config

        task = self.task
        shape = {"d_model": d_model, "d_state": task.d_state, "n_layers": task.n_layers}
        if self.kernel == "s4":
            shape |= {"kernel": "s4", "discretization": "bilinear", "init": "legs", "l_kernel": task.window}
        return Config(d_input=len(self.data.channels), d_output=len(self.data.labels), **shape)

    def train(self, epochs: int, d_model: int) -> Any:
        """Return a trained checkpoint."""
        from edge_ssm_build.training.checkpoint import Recipe, new_checkpoint
        from edge_ssm_build.training.loop import fit

        recipe = Recipe(window=self.task.window, epochs=epochs, seed=self.seed)
        checkpoint = new_checkpoint(self.data, self.task.data, self.config(d_model), recipe)
        score = fit(checkpoint, self.data, recipe)
        checkpoint.history.append({"stage": "train", "seed": self.seed, "epochs": epochs, "validation": asdict(score)})
        return checkpoint

    def row(self, checkpoint: Any, name: str, **known: Any) -> Row:
        """Write the artifact and return its size, test score and agreement; it is timed later.

        A network whose artifact cannot be written has no score, only the reason.
        """
        from edge_ssm.model.cost import cost
        from edge_ssm_build.export.artifact import export_artifact, network_of
        from edge_ssm_build.pruning.family import FAILURES

        try:
            agreements, provenance = export_artifact(checkpoint, self.data, self.folder / f"{name}.safetensors")
        except FAILURES as error:
            return known | {"artifact": None, "failure": str(error)}
        score, total = provenance["scores"]["test"], cost(network_of(checkpoint))
        return known | {
            "artifact": f"{name}.safetensors",
            "accuracy": score["balanced_accuracy"],
            "plain_accuracy": score["accuracy"],
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

    def claim(self, part: str) -> bool:
        """Return True if this process is to make the part: it is not done, and no other process is making it."""
        if (self.folder / f"{part}.json").exists():
            return False
        try:
            os.close(os.open(self.folder / f"{part}.lock", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def finish(self, part: str, rows: list[Row]) -> None:
        """Write the rows of a part, print its accuracies and release the claim."""
        from edge_ssm import files

        files.write(self.folder / f"{part}.json", json.dumps(rows).encode())
        (self.folder / f"{part}.lock").unlink()
        accuracies = (f"{100 * r['accuracy']:.1f}" if r["artifact"] else "failed" for r in rows)
        print(self.folder.name, part, *accuracies, flush=True)


def _folder(work: Path, task: str, kernel: str, seed: int) -> Path:
    return work / f"{task.replace(', ', '-')}-{kernel}-{seed}"


def _plan(method: str, base: Any, rates: tuple[float, ...]) -> Any:
    from edge_ssm_build.pruning.plan import METHODS, make_plan

    return make_plan(METHODS[method], rates, base)


def _family(cell: Cell, method: str, base: Any) -> list[Row]:
    """Return one row per rate of a method's family."""
    from edge_ssm_build.pruning.candidate import make_candidate

    plan = _plan(method, base, cell.task.rates)
    if method == "s4op":
        # Three candidates per rate, with other seeds for each base network.
        plan = replace(plan, seeds=tuple(3 * cell.seed + i for i in range(3)))
    else:
        plan = replace(plan, seeds=(cell.seed,))
    current, rows = base, []
    for step, rate in enumerate(cell.task.rates):
        candidates = [make_candidate(current, base, cell.data, plan, step, seed) for seed in plan.seeds]
        current, _ = max(candidates, key=lambda candidate: candidate[1].rank)
        rows.append(cell.row(current, f"{method}-{rate:g}", rate=rate))
    return rows


def _narrow(cell: Cell, base: Any) -> list[Row]:
    """Return one row per rate of networks trained from scratch.

    Each is as narrow as needed to do no more multiply-adds than ``compact`` does at that rate, and is trained for as
    many epochs as training and pruning took up to that rate.
    """
    compact = json.loads((cell.folder / "compact.json").read_text())
    fine_tune = _plan("compact", base, cell.task.rates).epochs
    rows = []
    for i, (rate, row) in enumerate(zip(cell.task.rates, compact, strict=True)):
        if rate not in NARROW_RATES or row["artifact"] is None:
            continue
        width = _width_within(cell, base, row["multiply_adds"])
        checkpoint = cell.train(cell.task.epochs + fine_tune * (i + 1), width)
        rows.append(cell.row(checkpoint, f"narrow-{rate:g}", rate=rate, width=width))
    return rows


def _width_within(cell: Cell, base: Any, multiply_adds: int) -> int:
    """Return the largest number of channels with which a network needs no more multiply-adds than this."""
    from edge_ssm.model.cost import cost
    from edge_ssm_build.export.artifact import network_of
    from edge_ssm_build.training.network import SSMNetwork

    width = cell.task.d_model
    while width > 1:
        trial = replace(base, model=SSMNetwork(cell.config(width)))
        if cost(network_of(trial)).multiply_adds <= multiply_adds:
            break
        width -= 1
    return width


def _states_alone(cell: Cell, base: Any) -> list[Row]:
    """Return rows of networks with fewer states and no retraining, by each method that the kernel allows."""
    from edge_ssm_build.pruning import states
    from edge_ssm_build.pruning.calibration import measure
    from edge_ssm_build.training.scoring import calibration_windows

    statistics = measure(base.model, *calibration_windows(base, cell.data))
    pairs = sum(int(ssm.pairs.sum()) for ssm in base.model.ssms())
    rows = []
    for method in ("h2",) if base.model.config.kernel == "s4" else states.METHODS:
        for share in STATE_SHARES:
            reduced = replace(base, model=copy.deepcopy(base.model))
            states.reduce(reduced.model, statistics, base.recipe.window, round(pairs * (1 - share)), method)
            rows.append(cell.row(reduced, f"states-{method}-{share:g}", rate=share, method=f"states-{method}"))
    return rows


def train(arguments: argparse.Namespace) -> None:
    """Make every network that is neither made nor being made by another process."""
    from edge_ssm_build.data import datasets
    from edge_ssm_build.pruning.executors import prepare_process

    prepare_process()
    for seed in arguments.seeds:
        for name in arguments.tasks:
            task, data = TASKS[name], datasets.load(TASKS[name].data)
            for kernel in arguments.kernels:
                folder = _folder(arguments.work, name, kernel, seed)
                folder.mkdir(parents=True, exist_ok=True)
                _train_cell(Cell(task, kernel, seed, data, folder), arguments.methods)


def _train_cell(cell: Cell, methods: list[str]) -> None:
    """Make the base network of a cell and its networks by each method."""
    from edge_ssm_build.training.checkpoint import load_checkpoint, save_checkpoint

    task, folder = cell.task, cell.folder
    if cell.claim("base"):
        base = cell.train(task.epochs, task.d_model)
        save_checkpoint(folder / "base.pt", base)
        cell.finish("base", [cell.row(base, "base", rate=0.0)])
    if not (folder / "base.json").exists():
        return  # another process is making it; a later call makes the remaining parts
    base = load_checkpoint(folder / "base.pt")
    if not task.methods and cell.claim("states"):
        cell.finish("states", _states_alone(cell, base))
    for method in [m for m in task.methods or MAIN if m in methods]:
        if method == "narrow" and not (folder / "compact.json").exists():
            continue
        if cell.claim(method):
            cell.finish(method, _narrow(cell, base) if method == "narrow" else _family(cell, method, base))


def measure(arguments: argparse.Namespace) -> None:
    """Time a step of every network and write results.json. Exit with the names of networks that failed."""
    from edge_ssm import files

    rows, failures = [], []
    for name in TASKS:
        for kernel in ("s4d", "s4"):
            for seed in range(MAX_SEEDS):
                folder = _folder(arguments.work, name, kernel, seed)
                if (folder / "base.json").exists():
                    cell_rows, cell_failures = _measure_cell(folder, {"task": name, "kernel": kernel, "seed": seed})
                    rows += cell_rows
                    failures += cell_failures
    lines = ",\n".join(json.dumps(row) for row in rows)
    files.write(HERE / "results.json", f"[\n{lines}\n]\n".encode())
    if failures:
        sys.exit("\n".join([f"{len(failures)} networks are not in results.json:", *failures]))


def _measure_cell(folder: Path, key: Row) -> tuple[list[Row], list[str]]:
    """Return the rows of a cell with step times, and a line per network that failed."""
    from edge_ssm.engines.registry import create
    from edge_ssm.formats import artifact
    from edge_ssm.profiler import step_table

    base_row = json.loads((folder / "base.json").read_text())[0]
    networks, failures = [], []
    for part in sorted(folder.glob("*.json")):
        part_rows = [{"method": part.stem} | row for row in json.loads(part.read_text())]
        failures += [
            f"{folder.name}, {row['method']} {row['rate']:g}: {row['failure']}"
            for row in part_rows
            if not row["artifact"]
        ]
        networks += [row for row in part_rows if row["rate"] and row["artifact"]]
    if base_row["artifact"] is None:
        return [], failures
    loaded = [artifact.load(folder / row["artifact"]).network for row in [base_row, *networks]]
    spec = loaded[0].input
    samples = spec.mean + spec.std * np.random.default_rng(0).standard_normal((100, loaded[0].d_input))
    base_us, *steps_us = step_table.measure([create("cpu", network) for network in loaded], samples)
    print(folder.name, f"unpruned {base_us:.2f} us, {len(networks)} networks", flush=True)
    rows = []
    for row, step_us in zip(networks, steps_us, strict=True):
        known = {"task": key["task"], "kernel": key["kernel"], "method": row["method"], "rate": row["rate"]}
        known |= {"seed": key["seed"], "accuracy": row["accuracy"], "base_accuracy": base_row["accuracy"]}
        known |= {"step_us": round(step_us, 3), "base_step_us": round(base_us, 3)}
        rest = {name: value for name, value in row.items() if name not in known and name != "artifact"}
        base = {f"base_{name}": base_row[name] for name in ("plain_accuracy", "parameters", "multiply_adds")}
        rows.append(known | rest | base)
    return rows, failures


def main() -> None:
    """Run one of the three commands."""

    def names(text: str) -> list[str]:
        return text.split("+")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["train", "measure", "page"])
    parser.add_argument("--work", type=Path, default=Path("runs/pruning"), help="folder of the networks")
    parser.add_argument("--tasks", type=names, default=list(TASKS), help="names of tasks, separated by +")
    parser.add_argument("--kernels", type=names, default=["s4d", "s4"], help="s4d, s4 or s4d+s4")
    parser.add_argument("--methods", type=names, default=list(METHODS), help="names of methods, separated by +")
    parser.add_argument(
        "--seeds", type=lambda text: [int(s) for s in names(text)], default=[0, 1, 2], help="separated by +"
    )
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
