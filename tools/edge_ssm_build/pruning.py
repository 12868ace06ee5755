"""S4oP (arXiv 2606.18096): remove whole SSM operators in steps, with fine-tuning, as a nested family of networks.

At each rate several seeds draw different channels out of those still active; each candidate is fine-tuned for an
eighth of the original epochs; the best by validation is the member of that rate and the start of the next one. What is
pruned stays pruned. A removed channel is bypassed: its input goes on to GELU and mixing as it is.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edge_ssm import atomic
from edge_ssm.errors import UsageError
from edge_ssm.network import cost
from edge_ssm_build.convert import to_network
from edge_ssm_build.datasets import Dataset
from edge_ssm_build.model import SSMNetwork
from edge_ssm_build.training import Checkpoint, Recipe, Score, fit, load_checkpoint, save_checkpoint

Budget = Literal["depth", "uniform"]
BUDGETS: tuple[Budget, ...] = ("depth", "uniform")
FINE_TUNE_SHARE = 1 / 8


def allocate(h: int, layers: int, total: int, budget: Budget, start: Sequence[int] | None = None) -> list[int]:
    """How many operators each layer has lost when ``total`` are gone, at most h - 1 a layer.

    ``depth`` is S4oP's law: layer i, from 1 on, takes a share proportional to 2^i, and layer 0 only what the full
    others leave. Given one at a time to the layer that lags furthest behind its share, so that a larger total never
    gives a layer back what a smaller one took; ``start`` is where to go on from.
    """
    weights = (
        [1.0] * layers if budget == "uniform" else [0.0 if i == 0 and layers > 1 else 2.0**i for i in range(layers)]
    )
    removed = list(start) if start is not None else [0] * layers
    for _ in range(total - sum(removed)):
        open_layers = [i for i in range(layers) if removed[i] < h - 1]
        weighted = [i for i in open_layers if weights[i] > 0] or open_layers
        if not weighted:
            raise UsageError(
                f"rate: removing {total} of {h * layers} operators would empty a layer; at least one stays in each"
            )
        chosen = min(weighted, key=lambda i: ((removed[i] + 1) / (weights[i] or 1.0), -i))
        removed[chosen] += 1
    return removed


Choice = Callable[[SSMNetwork, list[int], np.random.Generator], list[list[int]]]
"""Which channels go: (network, how many more in each layer, randomness) -> channels a layer."""


def draw(model: SSMNetwork, counts: list[int], rng: np.random.Generator) -> list[list[int]]:
    """S4oP's choice: at random among those still active."""
    return [
        sorted(rng.choice(np.array(active), size=count, replace=False).tolist())
        for active, count in zip(model.active(), counts, strict=True)
    ]


CHOICES: dict[str, Choice] = {"s4op": draw}


@dataclass(frozen=True)
class Plan:
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    method: str = "s4op"
    budget: Budget = "depth"
    epochs: int = 1
    """Of fine-tuning, a candidate."""


@dataclass(frozen=True)
class Member:
    """One network of the family."""

    rate: float
    seed: int | None
    """Of the candidate that won; None for the unpruned network."""
    checkpoint: str
    active: list[int]
    """Active channels a layer."""
    validation: Score
    parameters: int
    multiply_adds: int


def plan(checkpoint: Checkpoint, rates: Sequence[float], seeds: Sequence[int], method: str, budget: Budget) -> Plan:
    """Raises UsageError for rates that are not ascending within (0, 1), no seeds, or an unknown method."""
    if not rates or any(not 0 < r < 1 for r in rates) or list(rates) != sorted(set(rates)):
        raise UsageError(f"rates: {list(rates)}, expected ascending numbers between 0 and 1, such as 0.1,0.3,0.5")
    if not seeds or len(set(seeds)) != len(seeds):
        raise UsageError(f"seeds: {list(seeds)}, expected one or more different whole numbers")
    if method not in CHOICES:
        raise UsageError(f"method {method!r}: unknown, expected {', '.join(CHOICES)}")
    config = checkpoint.model.config
    if any(len(active) < config.d_model for active in checkpoint.model.active()):
        raise UsageError("checkpoint: already pruned; begin with the unpruned one, its rates are nested")
    for rate in rates:
        allocate(config.d_model, config.n_layers, round(rate * config.d_model * config.n_layers), budget)
    epochs = max(1, round(checkpoint.recipe.epochs * FINE_TUNE_SHARE))
    return Plan(tuple(rates), tuple(seeds), method, budget, epochs)


def _candidate(
    start: Checkpoint, data: Dataset, todo: Plan, rate: float, seed: int, folder: Path
) -> tuple[Checkpoint, Score]:
    """One candidate, fine-tuned; taken from disk where an earlier run finished it."""
    path = folder / f"rate-{rate:g}-seed-{seed}.pt"
    if path.exists():
        done = load_checkpoint(path)
        return done, Score(**done.history[-1]["validation"])
    candidate = replace(start, model=copy.deepcopy(start.model), history=list(start.history))
    config = candidate.model.config
    total = round(rate * config.d_model * config.n_layers)
    before = [config.d_model - len(active) for active in candidate.model.active()]
    after = allocate(config.d_model, config.n_layers, total, todo.budget, before)
    rng = np.random.default_rng([seed, round(rate * 10_000)])
    counts = [b - a for a, b in zip(before, after, strict=True)]
    for ssm, channels in zip(candidate.model.ssms(), CHOICES[todo.method](candidate.model, counts, rng), strict=True):
        ssm.bypass(channels)
    recipe: Recipe = replace(start.recipe, epochs=todo.epochs, seed=seed)
    resume = path.with_suffix(".resume")
    reached = fit(candidate, data, recipe, resume, progress=f"rate {rate:g} seed {seed}")
    candidate.history.append(
        {
            "stage": "prune",
            "method": todo.method,
            "budget": todo.budget,
            "bypass": "identity",
            "rate": rate,
            "seed": seed,
            "candidates": len(todo.seeds),
            "epochs": todo.epochs,
            "validation": asdict(reached),
        }
    )
    save_checkpoint(path, candidate)
    resume.unlink(missing_ok=True)
    return candidate, reached


def _member(checkpoint: Checkpoint, rate: float, seed: int | None, name: str, reached: Score) -> Member:
    total = cost(to_network(checkpoint.model, checkpoint.spec, checkpoint.recipe.window, checkpoint.labels))
    active = [len(a) for a in checkpoint.model.active()]
    return Member(rate, seed, name, active, reached, total.parameters, total.multiply_adds)


def prune(start: Checkpoint, data: Dataset, todo: Plan, output: Path) -> list[Member]:
    """The family, smallest rate first; writes ``rate-R.pt`` a rate and ``family.json`` into ``output``.

    Every finished candidate is kept in ``output/candidates``, so that the same command goes on after a kill.
    Raises UsageError if ``output`` holds a search with another plan or checkpoint.
    """
    candidates = output / "candidates"
    candidates.mkdir(parents=True, exist_ok=True)
    _claim(
        output / "plan.json",
        asdict(todo) | {"start": start.history, "recipe": asdict(start.recipe), "data": start.data},
    )
    members = []
    current = start
    for rate in todo.rates:
        finished = [(*_candidate(current, data, todo, rate, seed, candidates), seed) for seed in todo.seeds]
        current, reached, seed = max(finished, key=lambda c: (c[1].balanced_accuracy, -c[1].loss))
        name = f"rate-{rate:g}.pt"
        save_checkpoint(output / name, current)
        members.append(_member(current, rate, seed, name, reached))
    family = {"version": 1, "method": todo.method, "budget": todo.budget, "members": [asdict(m) for m in members]}
    atomic.write(output / "family.json", (json.dumps(family, indent=1) + "\n").encode())
    return members


def _claim(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, sort_keys=True)
    if path.exists() and path.read_text() != text:
        raise UsageError(
            f"{path.parent}: holds a search with another plan or checkpoint; use another --output or delete it"
        )
    atomic.write(path, text.encode())
