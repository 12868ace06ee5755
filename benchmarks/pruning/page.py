"""From results.json to README.md and the pictures: every figure of the page is computed here."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RATES = (0.1, 0.3, 0.5, 0.7, 0.9)
ORDER = ("s4op", "magnitude", "taylor", "energy", "h2", "sensitivity", "best", "compact", "smallest", "narrow")
MEANING = {
    "s4op": "S4oP: random choice, the best of three seeds at each rate by validation; depth law, identity bypass",
    "magnitude": "norm of C and D; global budget, fitted gain",
    "taylor": "first-order change of the loss; global budget, fitted gain",
    "energy": "output energy of operator minus fitted gain, times the norm of its mixing column; global budget",
    "h2": "H2 norm of operator minus fitted gain; global budget",
    "sensitivity": "energy of operator minus fitted gain, times the loss's mean squared slope there; global budget",
    "best": "as sensitivity; mixing refitted by ridge regression, half of the loss from the unpruned network's logits",
    "compact": "as best; also removes mixing columns and rows at 0.75 of the rate, and 70 % of the states",
    "smallest": "as best; also removes mixing columns and rows at the rate itself, and 80 % of the states (large only)",
    "narrow": "a narrower network trained from scratch, with at most the multiply-adds of compact and as many epochs",
}


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _percent(rows: Sequence[Row], key: str = "accuracy") -> str:
    values = [100 * row[key] for row in rows]
    return f"{_mean(values):.1f} ± {_spread(values):.1f}" if values else ""


def _step(rows: Sequence[Row]) -> str:
    return f"{_mean([row['step_us'] for row in rows]):.2f}" if rows else ""


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = "| " + " | ".join("---" for _ in head) + " |"
    return "\n".join(
        ["| " + " | ".join(line) + " |" for line in (head,)] + [rule] + [f"| {' | '.join(x)} |" for x in lines]
    )


class Results:
    """The rows of results.json, by task and kernel."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.cells = list(dict.fromkeys((row["task"], row["kernel"]) for row in rows))
        self.main = [cell for cell in self.cells if "large" not in cell[0]]

    def of(self, cell: tuple[str, str], method: str, rate: float) -> list[Row]:
        """Return the rows of a (task, kernel), a method and a rate, one per seed."""
        return [
            row
            for row in self.rows
            if (row["task"], row["kernel"]) == cell and row["method"] == method and row["rate"] == rate
        ]

    def loss(self, cell: tuple[str, str], method: str, rate: float) -> list[float]:
        """Return the percentage points lost against the unpruned network of the same seed, one per seed."""
        return [100 * (row["base_accuracy"] - row["accuracy"]) for row in self.of(cell, method, rate)]


def _base(results: Results, cell: tuple[str, str]) -> str:
    rows = list({row["seed"]: row for row in results.rows if (row["task"], row["kernel"]) == cell}.values())
    return _percent(rows, "base_accuracy")


def _accuracy_tables(results: Results) -> str:
    parts = []
    for cell in results.main:
        lines = []
        for method in ORDER:
            cells = [results.of(cell, method, rate) for rate in RATES]
            if any(cells):
                lines.append([method, *(_percent(rows) for rows in cells), *(_step(rows) for rows in cells)])
        any_row = next(row for row in results.rows if (row["task"], row["kernel"]) == cell)
        head = ["method", *(f"{rate:.0%}" for rate in RATES), *(f"us at {rate:.0%}" for rate in RATES)]
        seeds = len({row["seed"] for row in results.rows if (row["task"], row["kernel"]) == cell})
        parts.append(
            f"### {cell[0]}, {cell[1].upper()}\n\nUnpruned {_base(results, cell)} % over {seeds} seeds, "
            f"step {any_row['base_step_us']:.2f} us.\n\n{_table(head, lines)}"
        )
    return "\n\n".join(parts)


def _goal_table(results: Results) -> str:
    lines = []
    for cell in results.main:
        line = [f"{cell[0]}, {cell[1].upper()}"]
        for rate, allowed in ((0.7, 1.0), (0.9, 5.0)):
            ours, theirs = results.loss(cell, "best", rate), results.loss(cell, "s4op", rate)
            if not ours or not theirs:
                line += [""] * 4
                continue
            ahead, spread = _mean(theirs) - _mean(ours), max(_spread(ours), _spread(theirs))
            line += [f"{_mean(ours):.1f} ± {_spread(ours):.1f}", "yes" if _mean(ours) <= allowed else "**no**"]
            line += [f"{_mean(theirs):.1f} ± {_spread(theirs):.1f}", "yes" if ahead > spread else "**no**"]
        lines.append(line)
    head = ["task", "best at 70 %", "<= 1", "S4oP at 70 %", "ahead by more than the spread"]
    head += ["best at 90 %", "<= 5", "S4oP at 90 %", "ahead by more than the spread"]
    return _table(head, lines)


def _speed_table(results: Results) -> str:
    lines = []
    for cell in results.cells:
        method = "compact" if cell in results.main else "smallest"
        for rate in sorted({row["rate"] for row in results.rows if row["method"] == method}):
            rows = results.of(cell, method, rate)
            if rows and rate >= 0.3:
                ratio = _mean([row["base_step_us"] / row["step_us"] for row in rows])
                saved = _mean([1 - row["step_us"] / row["base_step_us"] for row in rows])
                macs = _mean([1 - row["multiply_adds"] / row["base_multiply_adds"] for row in rows])
                lost = results.loss(cell, method, rate)
                lines.append(
                    [
                        f"{cell[0]}, {cell[1].upper()}",
                        method,
                        f"{rate:.0%}",
                        f"{_mean(lost):.1f} ± {_spread(lost):.1f}",
                        f"{_mean([r['base_step_us'] for r in rows]):.2f}",
                        _step(rows),
                        f"{ratio:.1f}",
                        f"{macs:.0%}",
                        f"{saved:.0%}",
                        f"{saved / macs:.2f}",
                    ]
                )
    head = [
        "task",
        "method",
        "rate",
        "points lost",
        "unpruned us",
        "us",
        "times faster",
        "multiply-adds saved",
        "time saved",
    ]
    return _table([*head, "time / multiply-adds"], lines)


def _states_table(results: Results) -> str:
    lines = []
    shares = (0.4, 0.5, 0.6, 0.7, 0.8)
    for cell in results.main:
        for method in ("modal", "last", "aire", "h2"):
            found = [results.loss(cell, f"states-{method}", share) for share in shares]
            if any(found):
                cells = [f"{_mean(lost):.1f}" if lost else "" for lost in found]
                lines.append([f"{cell[0]}, {cell[1].upper()}", method, *cells])
    return _table(["task", "method", *(f"{share:.0%}" for share in shares)], lines)


def _narrow_table(results: Results) -> str:
    lines = []
    for cell in results.main:
        for rate in RATES:
            narrow, compact = results.of(cell, "narrow", rate), results.of(cell, "compact", rate)
            if narrow and compact:
                ahead = 100 * (_mean([r["accuracy"] for r in compact]) - _mean([r["accuracy"] for r in narrow]))
                lines.append(
                    [
                        f"{cell[0]}, {cell[1].upper()}",
                        f"{rate:.0%}",
                        f"{_mean([r['width'] for r in narrow]):.0f}",
                        _percent(narrow),
                        _percent(compact),
                        f"{ahead:+.1f}",
                        _step(narrow),
                        _step(compact),
                    ]
                )
    head = ["task", "rate", "its width", "narrow", "compact", "compact ahead by", "narrow us", "compact us"]
    return _table(head, lines)


def _pictures(results: Results, folder: Path) -> None:
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(task for task, _ in results.main))
    axes_of: dict[str, tuple[str, Callable[[float, Sequence[Row]], float]]] = {
        "rates": ("operators removed", lambda rate, rows: rate),
        "latency": ("step, us", lambda rate, rows: _mean([row["step_us"] for row in rows])),
    }
    for name, (label, x_of) in axes_of.items():
        figure = Figure(figsize=(3.6 * len(tasks), 6.4), layout="constrained")
        axes = figure.subplots(2, len(tasks), squeeze=False)
        for i, kernel in enumerate(("s4d", "s4")):
            for j, task in enumerate(tasks):
                axis, cell = axes[i][j], (task, kernel)
                for method in ("s4op", "magnitude", "energy", "best", "compact", "narrow"):
                    points = [(rate, rows) for rate in RATES if (rows := results.of(cell, method, rate))]
                    if points:
                        axis.errorbar(
                            [x_of(rate, rows) for rate, rows in points],
                            [100 * _mean([row["accuracy"] for row in rows]) for _, rows in points],
                            [100 * _spread([row["accuracy"] for row in rows]) for _, rows in points],
                            marker="o",
                            markersize=3,
                            capsize=2,
                            label=method,
                        )
                axis.set_title(f"{task}, {kernel.upper()}", fontsize=10)
                axis.grid(alpha=0.3)
                axis.set_xlabel(label)
        axes[0][0].set_ylabel("balanced test accuracy, %")
        axes[0][0].legend(fontsize=8)
        figure.savefig(folder / f"{name}.png", dpi=100, metadata={"Software": None})


def write(source: Path, folder: Path) -> None:
    """Write README.md and the pictures into a folder, from results.json and the folder's notes.md."""
    results = Results(json.loads(source.read_text()))
    notes = (folder / "notes.md").read_text()
    methods = _table(["method", "what it is"], [[name, MEANING[name]] for name in ORDER])
    page = f"""# Pruning results

`python benchmarks/pruning/run.py page` writes this page from [results.json](results.json) and [notes.md](notes.md).

Scores are balanced test accuracies (mean recall over classes) in percent, given as mean ± standard deviation over
seeds. Each seed is another base network. A step is one sample through the whole network on the CPU engine, timed side
by side with the unpruned network.

{notes}

![Accuracy against the share of operators removed](rates.png)
![Accuracy against step latency](latency.png)

{methods}

## The goals

At 70 %, `best` should lose at most 1 point, and at 90 % at most 5. At both rates it should beat S4oP's choice by more
than the larger of the two spreads.

{_goal_table(results)}

## Time saved when more than operators is removed

{_speed_table(results)}

## States alone, without any retraining

The table shows the points lost when this share of all states is removed. `h2` refits poles and residues. A rank-one
kernel (S4) cannot lose single modes.

{_states_table(results)}

## A narrower network instead

{_narrow_table(results)}

## All figures

{_accuracy_tables(results)}
"""
    (folder / "README.md").write_text(page)
    _pictures(results, folder)
