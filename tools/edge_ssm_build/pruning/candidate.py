"""One candidate of a plan: a network with operators, columns, rows and states removed, and fine-tuned."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from edge_ssm_build.data.datasets import Dataset
from edge_ssm_build.export.quantization import round_mixing
from edge_ssm_build.pruning import states
from edge_ssm_build.pruning.calibration import Statistics, measure, refit_mixing
from edge_ssm_build.pruning.importance import SCORES, Bypass, Measured, allocate, lowest
from edge_ssm_build.pruning.plan import Plan
from edge_ssm_build.training.checkpoint import Checkpoint, Recipe
from edge_ssm_build.training.loop import fit
from edge_ssm_build.training.network import SSMNetwork
from edge_ssm_build.training.scoring import Score, as_input, calibration_windows, score, split_windows


def make_candidate(
    start: Checkpoint,
    base: Checkpoint,
    data: Dataset,
    plan: Plan,
    step: int,
    seed: int,
    resume: Path | None = None,
    progress: str | None = None,
) -> tuple[Checkpoint, Score]:
    """Prune and fine-tune one candidate.

    Parameters
    ----------
    start
        The member of the previous rate; it is not changed.
    base
        The unpruned network, the teacher in distillation.
    data
        Data set of the checkpoint.
    plan
        The plan of the family.
    step
        Index of the rate in the plan.
    seed
        Seed of the random choice and of the fine-tuning.
    resume, progress
        As in ``training.loop.fit``.

    Returns
    -------
    tuple
        The candidate and its validation score.
    """
    candidate = replace(start, model=copy.deepcopy(start.model), history=list(start.history))
    prune_network(candidate.model, start, data, plan, step, seed)
    recipe: Recipe = replace(start.recipe, epochs=plan.epochs, seed=seed, distill=plan.distill)
    reached = fit(candidate, data, recipe, resume, progress, base.model.eval() if plan.distill else None)
    if plan.mixing_dtype != "float32":
        x, y = split_windows(data, "validation", recipe.window)
        validation = as_input(x, candidate.spec)
        round_mixing(candidate.model, plan.mixing_dtype, calibration_windows(candidate, data)[0], validation)
        reached = score(candidate.model, validation, torch.from_numpy(y))
    candidate.history.append(
        {"stage": "prune", **asdict(plan), "rate": plan.rates[step], "seed": seed, "validation": asdict(reached)}
    )
    return candidate, reached


def prune_network(model: SSMNetwork, checkpoint: Checkpoint, data: Dataset, plan: Plan, step: int, seed: int) -> None:
    """Remove operators, columns, rows and states from ``model``, in place, up to rate number ``step``.

    ``checkpoint`` provides the window and the normalisation of the model.
    """
    config, window = model.config, checkpoint.recipe.window
    x, y = calibration_windows(checkpoint, data)

    def measure_blocks() -> list[Measured]:
        statistics = measure(model, x, y)
        return [Measured(b, s, plan.bypass, window) for b, s in zip(model.layers(), statistics, strict=True)]

    rng = np.random.default_rng([seed, round(plan.rates[step] * 10_000)])
    reference = copy.deepcopy(model)
    needs_statistics = plan.choice != "random" or plan.bypass != "identity"
    measured = measure_blocks() if needs_statistics else []
    total = round(plan.rates[step] * config.d_model * config.n_layers)
    channels = choose_operators(model, measured, plan, total, rng)
    bypass_operators(model, channels, [m.statistics for m in measured], plan.bypass)
    if plan.columns:
        _drop_columns(model, measure_blocks(), plan.columns[step])
    if plan.rows:
        _drop_rows(model, measure_blocks(), plan.rows[step])
    if plan.states:
        count = sum(len(active) for active in model.active())
        pairs = max(count, round((1 - plan.states[step]) * count * config.d_state / 2))
        states.reduce(model, measure(model, x, y), window, pairs, plan.states_method)
    if plan.refit:
        refit_mixing(model, reference, x)


def choose_operators(
    model: SSMNetwork, measured: list[Measured], plan: Plan, total: int, rng: np.random.Generator
) -> list[list[int]]:
    """Return the channels of each layer to remove next, so that ``total`` operators are removed altogether.

    ``measured`` has one entry per layer; it is not used for a random choice.
    """
    config, active = model.config, [list(channels) for channels in model.active()]
    before = [config.d_model - len(channels) for channels in active]
    if plan.budget == "global":
        return lowest([SCORES[plan.choice](m) for m in measured], active, total - sum(before), keep=1)
    after = allocate(config.d_model, config.n_layers, total, plan.budget, before)
    counts = [b - a for a, b in zip(before, after, strict=True)]
    if plan.choice == "random":
        return [
            sorted(rng.choice(np.array(channels), size=count, replace=False).tolist())
            for channels, count in zip(active, counts, strict=True)
        ]
    scores = [SCORES[plan.choice](m) for m in measured]
    return [
        lowest([score], [channels], count, keep=1)[0]
        for score, channels, count in zip(scores, active, counts, strict=True)
    ]


def bypass_operators(
    model: SSMNetwork, channels: list[list[int]], statistics: list[Statistics], bypass: Bypass
) -> None:
    """Replace the operators of these channels of each layer, in place, by the bypass.

    ``statistics`` has one entry per layer; it is not used for the identity.
    """
    for i, (block, removed) in enumerate(zip(model.layers(), channels, strict=True)):
        if not removed:
            continue
        if bypass == "identity":
            block.ssm.bypass(removed)
        elif bypass == "gain":
            block.ssm.bypass(removed, statistics[i].gain[removed])
        else:
            block.mixing.drop_columns(removed, statistics[i].mean[removed])
            block.ssm.bypass(removed)
            block.ssm.fix(removed, 0.0)


def _drop_columns(model: SSMNetwork, measured: list[Measured], share: float) -> None:
    """Remove the mixing columns of bypassed channels whose variation affects the loss least."""
    h = model.config.d_model
    bypassed = [sorted(set(b.mixing.columns.tolist()) - set(b.ssm.active.tolist())) for b in model.layers()]
    before = sum(h - len(b.mixing.columns) for b in model.layers())
    count = round(share * h * len(bypassed)) - before
    chosen = lowest([m.statistics.taylor_zero for m in measured], bypassed, count, keep=0)
    for block, channels, m in zip(model.layers(), chosen, measured, strict=True):
        block.mixing.drop_columns(channels, m.statistics.mean[channels])
        block.ssm.fix(channels, 0.0)


def _drop_rows(model: SSMNetwork, measured: list[Measured], share: float) -> None:
    """Remove the mixing rows whose variation affects the loss least."""
    h = model.config.d_model
    rows = [block.mixing.rows.tolist() for block in model.layers()]
    count = round(share * h * len(rows)) - sum(h - len(remaining) for remaining in rows)
    chosen = lowest([m.statistics.row_taylor for m in measured], rows, count, keep=1)
    for block, channels, m in zip(model.layers(), chosen, measured, strict=True):
        block.mixing.drop_rows(channels, m.statistics.row_mean[channels])
