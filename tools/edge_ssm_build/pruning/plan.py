"""Remove whole SSM operators in steps, with fine-tuning, as a nested family of networks: S4oP, and better ones.

S4oP (arXiv 2606.18096): at each rate several seeds draw different channels out of those still active; each candidate
is fine-tuned for an eighth of the original epochs; the best by validation is the member of that rate and the start of
the next one. What is pruned stays pruned. Here the choice, what a removed operator becomes, and what else goes with it
are parts of a ``Plan``; S4oP is the plan {random, depth, identity}.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_ssm.errors import UsageError
from edge_ssm.model.network import MIXING_DTYPES, MixingDtype
from edge_ssm_build.data.datasets import Dataset
from edge_ssm_build.export import quantization
from edge_ssm_build.pruning import states
from edge_ssm_build.pruning.calibration import Statistics, measure, refit_mixing, windows
from edge_ssm_build.pruning.importance import BUDGETS, BYPASSES, SCORES, Budget, Bypass, Measured, allocate, lowest
from edge_ssm_build.training.checkpoint import Checkpoint, Recipe
from edge_ssm_build.training.loop import fit
from edge_ssm_build.training.network import SSMNetwork
from edge_ssm_build.training.scoring import Score, as_input, score, split_windows

FINE_TUNE_SHARE = 1 / 8
MAX_SEED = 1 << 31


@dataclass(frozen=True)
class Plan:
    """How a family is made. Shares have one entry a rate."""

    rates: tuple[float, ...]
    """Of all operators, the share removed."""
    seeds: tuple[int, ...]
    choice: str = "random"
    budget: Budget = "depth"
    bypass: Bypass = "identity"
    columns: tuple[float, ...] = ()
    """Of all mixing columns, the share removed; with bypass ``zero`` those of the removed operators go anyway."""
    rows: tuple[float, ...] = ()
    """Of all mixing rows."""
    states: tuple[float, ...] = ()
    """Of the states that the unpruned network has in the channels that are left."""
    states_method: str = "h2"
    mixing_dtype: MixingDtype = "float32"
    refit: bool = False
    """Refit the mixing by ridge regression before fine-tuning."""
    distill: float = 0.0
    """Weight of the unpruned network's logits in fine-tuning."""
    epochs: int = 1
    """Of fine-tuning, a candidate."""


@dataclass(frozen=True)
class Method:
    """A named choice with the options that suit it; the command line may set each otherwise."""

    choice: str
    budget: Budget = "global"
    bypass: Bypass = "gain"
    seeds: tuple[int, ...] = (0,)
    refit: bool = False
    distill: float = 0.0
    columns: str = "0"
    rows: str = "0"
    states: str = "0"
    """Shares, as ``shares`` reads them."""


METHODS: dict[str, Method] = {
    "s4op": Method("random", "depth", "identity", (0, 1, 2)),
    **{name: Method(name) for name in SCORES},
    "best": Method("sensitivity", refit=True, distill=0.5),
    "compact": Method("sensitivity", refit=True, distill=0.5, columns="0.75*rate", rows="0.75*rate", states="0.7"),
    "smallest": Method("sensitivity", refit=True, distill=0.5, columns="rate", rows="rate", states="0.8"),
}


def shares(text: str, rates: Sequence[float], option: str) -> tuple[float, ...]:
    """One share a rate: of ``rate``, ``F*rate``, a number, or as many numbers as there are rates; () for none at all.

    Raises UsageError for anything else.
    """
    factor, star, word = text.rpartition("*")
    try:
        if word == "rate":
            numbers = [float(factor if star else 1) * rate for rate in rates]
        else:
            numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        numbers *= len(rates)
    if len(numbers) != len(rates) or any(not 0 <= n < 1 for n in numbers) or numbers != sorted(numbers):
        raise UsageError(
            f"{option} {text!r}: expected rate, 0.5*rate, a share from 0 to below 1, or {len(rates)} ascending ones"
        )
    return tuple(numbers) if any(numbers) else ()


def plan_of(method: Method, rates: Sequence[float], checkpoint: Checkpoint) -> Plan:
    """The method's plan for these rates. Raises UsageError as ``check_plan`` does."""
    todo = Plan(
        rates=tuple(rates),
        seeds=method.seeds,
        choice=method.choice,
        budget=method.budget,
        bypass=method.bypass,
        columns=shares(method.columns, rates, "--columns"),
        rows=shares(method.rows, rates, "--rows"),
        states=shares(method.states, rates, "--states"),
        refit=method.refit,
        distill=method.distill,
    )
    return check_plan(checkpoint, todo)


def check_plan(checkpoint: Checkpoint, todo: Plan) -> Plan:
    """The plan with its epochs filled in. Raises UsageError for one that can't be carried out."""
    rates = todo.rates
    if not rates or any(not 0 < r < 1 for r in rates) or list(rates) != sorted(set(rates)):
        raise UsageError(f"rates: {list(rates)}, expected ascending numbers between 0 and 1, such as 0.1,0.3,0.5")
    seeds = todo.seeds
    if not seeds or len(set(seeds)) != len(seeds) or not all(0 <= seed < MAX_SEED for seed in seeds):
        raise UsageError(f"seeds: {list(seeds)}, expected one or more different whole numbers from 0 to {MAX_SEED - 1}")
    for name, value, known in (
        ("method", todo.choice, ("random", *SCORES)),
        ("budget", todo.budget, BUDGETS),
        ("bypass", todo.bypass, BYPASSES),
        ("states method", todo.states_method, states.METHODS),
        ("mixing dtype", todo.mixing_dtype, MIXING_DTYPES),
    ):
        if value not in known:
            raise UsageError(f"{name} {value!r}: unknown, expected {', '.join(known)}")
    if todo.choice == "random" and todo.budget == "global":
        raise UsageError("budget 'global': a random choice has no scores to compare layers by; use depth or uniform")
    if not 0 <= todo.distill <= 1:
        raise UsageError(f"distill: {todo.distill}, expected a weight from 0 to 1")
    config = checkpoint.model.config
    if todo.states and todo.states_method != "h2" and config.kernel == "s4":
        raise UsageError(f"states method {todo.states_method!r}: needs a diagonal kernel; h2 reduces s4 as well")
    if checkpoint.model.present_config().shapes() != replace(config, layers=None).shapes():
        raise UsageError("checkpoint: already pruned; begin with the unpruned one, its rates are nested")
    operators = config.d_model * config.n_layers
    counts = [round(rate * operators) for rate in rates]
    if counts[0] == 0 or len(set(counts)) != len(counts):
        raise UsageError(f"rates: {list(rates)} remove {counts} of {operators} operators; each must remove more")
    for count in counts:
        allocate(config.d_model, config.n_layers, count, todo.budget)
    return replace(todo, epochs=max(1, round(checkpoint.recipe.epochs * FINE_TUNE_SHARE)))


# --- one candidate ---------------------------------------------------------------------------------------------


def _choose(model: SSMNetwork, measured: list[Measured], todo: Plan, total: int, rng: Any) -> list[list[int]]:
    """The channels of each layer that go next, so that ``total`` operators are gone in all."""
    config, active = model.config, [list(channels) for channels in model.active()]
    before = [config.d_model - len(channels) for channels in active]
    more = total - sum(before)
    if todo.budget == "global":
        return lowest([SCORES[todo.choice](m) for m in measured], active, more, keep=1)
    after = allocate(config.d_model, config.n_layers, total, todo.budget, before)
    counts = [b - a for a, b in zip(before, after, strict=True)]
    if todo.choice == "random":
        return [
            sorted(rng.choice(np.array(channels), size=count, replace=False).tolist())
            for channels, count in zip(active, counts, strict=True)
        ]
    scores = [SCORES[todo.choice](m) for m in measured]
    return [
        lowest([score], [channels], count, keep=1)[0]
        for score, channels, count in zip(scores, active, counts, strict=True)
    ]


def _bypass(model: SSMNetwork, channels: list[list[int]], statistics: list[Statistics], bypass: Bypass) -> None:
    """``statistics`` is not read for identity."""
    for i, (block, gone) in enumerate(zip(model.layers(), channels, strict=True)):
        if not gone:
            continue
        if bypass == "identity":
            block.ssm.bypass(gone)
        elif bypass == "gain":
            block.ssm.bypass(gone, statistics[i].gain[gone])
        else:
            block.mixing.drop_columns(gone, statistics[i].mean[gone])
            block.ssm.bypass(gone)
            block.ssm.fix(gone, 0.0)


def _drop_columns(model: SSMNetwork, measured: list[Measured], share: float) -> None:
    """Of bypassed channels, the columns whose variation matters least to the loss."""
    h = model.config.d_model
    candidates = [sorted(set(b.mixing.columns.tolist()) - set(b.ssm.active.tolist())) for b in model.layers()]
    gone = sum(h - len(b.mixing.columns) for b in model.layers())
    more = round(share * h * len(candidates)) - gone
    chosen = lowest([m.statistics.taylor_zero for m in measured], candidates, more, keep=0)
    for block, channels, m in zip(model.layers(), chosen, measured, strict=True):
        block.mixing.drop_columns(channels, m.statistics.mean[channels])
        block.ssm.fix(channels, 0.0)


def _drop_rows(model: SSMNetwork, measured: list[Measured], share: float) -> None:
    h = model.config.d_model
    candidates = [block.mixing.rows.tolist() for block in model.layers()]
    more = round(share * h * len(candidates)) - sum(h - len(rows) for rows in candidates)
    chosen = lowest([m.statistics.row_taylor for m in measured], candidates, more, keep=1)
    for block, channels, m in zip(model.layers(), chosen, measured, strict=True):
        block.mixing.drop_rows(channels, m.statistics.row_mean[channels])


def operate(model: SSMNetwork, checkpoint: Checkpoint, data: Dataset, todo: Plan, step: int, seed: int) -> None:
    """Take out of ``model``, in place, what rate number ``step`` asks for: operators, columns, rows, states."""
    config, window = model.config, checkpoint.recipe.window
    x, y = windows(checkpoint, data)

    def measured() -> list[Measured]:
        found = measure(model, x, y)
        return [Measured(b, s, todo.bypass, window) for b, s in zip(model.layers(), found, strict=True)]

    rng = np.random.default_rng([seed, round(todo.rates[step] * 10_000)])
    reference = copy.deepcopy(model)
    blind = todo.choice == "random" and todo.bypass == "identity"
    now = [] if blind else measured()
    total = round(todo.rates[step] * config.d_model * config.n_layers)
    _bypass(model, _choose(model, now, todo, total, rng), [m.statistics for m in now], todo.bypass)
    if todo.columns:
        _drop_columns(model, measured(), todo.columns[step])
    if todo.rows:
        _drop_rows(model, measured(), todo.rows[step])
    if todo.states:
        channels = sum(len(active) for active in model.active())
        pairs = max(channels, round((1 - todo.states[step]) * channels * config.d_state / 2))
        states.reduce(model, measure(model, x, y), window, pairs, todo.states_method)
    if todo.refit:
        refit_mixing(model, reference, x)


def candidate(
    start: Checkpoint,
    base: Checkpoint,
    data: Dataset,
    todo: Plan,
    step: int,
    seed: int,
    resume: Path | None = None,
    progress: str | None = None,
) -> tuple[Checkpoint, Score]:
    """One candidate of rate number ``step``: pruned out of ``start``, fine-tuned, with ``base`` as its teacher."""
    made = replace(start, model=copy.deepcopy(start.model), history=list(start.history))
    operate(made.model, start, data, todo, step, seed)
    recipe: Recipe = replace(start.recipe, epochs=todo.epochs, seed=seed, distill=todo.distill)
    reached = fit(made, data, recipe, resume, progress, base.model.eval() if todo.distill else None)
    if todo.mixing_dtype != "float32":
        x, y = split_windows(data, "validation", recipe.window)
        shown = as_input(x, made.spec)
        quantization.round_mixing(made.model, todo.mixing_dtype, windows(made, data)[0], shown)
        reached = score(made.model, shown, torch.from_numpy(y))
    made.history.append(
        {"stage": "prune", **asdict(todo), "rate": todo.rates[step], "seed": seed, "validation": asdict(reached)}
    )
    return made, reached
