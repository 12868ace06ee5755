"""Training and fine-tuning: one loop, the same for both, that can be killed at any moment and goes on where it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from edge_ssm.errors import InputRefused, RunFailed
from edge_ssm_build.data.datasets import Array, Dataset, windows
from edge_ssm_build.data.rotation import rotate
from edge_ssm_build.training.checkpoint import Checkpoint, Recipe, read_torch, write_torch
from edge_ssm_build.training.network import SSMNetwork
from edge_ssm_build.training.scoring import Score, as_input, score, split_windows


def _optimizer(model: SSMNetwork, recipe: Recipe) -> torch.optim.AdamW:
    own = [p for ssm in model.ssms() for p in ssm.ssm_parameters() if p.numel()]
    ids = {id(p) for p in own}
    rest = [p for p in model.parameters() if id(p) not in ids and p.numel()]
    groups = [
        {"params": rest, "lr": recipe.lr, "weight_decay": recipe.weight_decay},
        {"params": own, "lr": recipe.ssm_lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]])


def _rate(step: int, steps: int, warmup: float) -> float:
    """Share of the full learning rate: linear warm-up, then a cosine down to zero."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _epoch_windows(data: Dataset, recipe: Recipe, rng: np.random.Generator) -> tuple[Array, Array]:
    """Half-overlapping windows of the training split, their phase drawn anew when ``jitter``."""
    train = data.splits["train"]
    if recipe.jitter:
        hop = max(1, recipe.window // 2)
        x, y = windows(train, recipe.window, hop, lambda spare: int(rng.integers(spare + 1)))
    else:
        x, y = windows(train, recipe.window, recipe.window)
    return (rotate(x, recipe.rotation, rng) if recipe.rotation else x), y


def _batches(x: Tensor, y: Tensor, recipe: Recipe, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    for chosen in torch.randperm(len(x), generator=generator).split(recipe.batch):
        part = x[chosen]
        if recipe.scaling:
            factor = torch.randn(len(chosen), 1, x.shape[2], generator=generator) * recipe.scaling
            part = part * torch.exp(factor)
        if recipe.noise:
            part = part + torch.randn(part.shape, generator=generator) * recipe.noise
        yield part, y[chosen]


TEMPERATURE = 2.0
"""Of distillation: softens the teacher's probabilities, so that the smaller ones count (arXiv 1503.02531)."""


def _loss(logits: Tensor, labels: Tensor, x: Tensor, recipe: Recipe, teacher: SSMNetwork | None) -> Tensor:
    loss = nn.functional.cross_entropy(logits, labels)
    if teacher is None or not recipe.distill:
        return loss
    with torch.no_grad():
        target = nn.functional.log_softmax(teacher(x) / TEMPERATURE, dim=-1)
    own = nn.functional.log_softmax(logits / TEMPERATURE, dim=-1)
    apart = nn.functional.kl_div(own, target, log_target=True, reduction="batchmean") * TEMPERATURE**2
    return (1 - recipe.distill) * loss + recipe.distill * apart


def fit(
    checkpoint: Checkpoint,
    data: Dataset,
    recipe: Recipe,
    resume: Path | None = None,
    progress: str | None = None,
    teacher: SSMNetwork | None = None,
) -> Score:
    """Train ``checkpoint.model`` in place and leave it at its best validation epoch; returns that epoch's score.

    With ``resume`` the state after every epoch is kept in that file, and a run that finds it goes on from there, with
    the result of one that was never interrupted: every epoch's randomness comes from (seed, epoch) alone.
    ``teacher`` is the network, in evaluation mode, that ``recipe.distill`` takes logits from.
    Raises RunFailed if the loss is no longer finite.
    """
    model, spec = checkpoint.model, checkpoint.spec
    x_val, y_val = split_windows(data, "validation", recipe.window)
    validation = (as_input(x_val, spec), torch.from_numpy(y_val))
    optimizer = _optimizer(model, recipe)
    rates = [group["lr"] for group in optimizer.param_groups]
    first, best, best_state = 0, None, copy.deepcopy(model.state_dict())
    if resume is not None and resume.exists():
        raw = read_torch(resume)
        settings = {"recipe": asdict(recipe), "config": asdict(model.present_config())}
        if {name: raw.get(name) for name in settings} != settings:
            raise InputRefused(f"{resume}: left by a run with other settings; use another output folder or delete it")
        model.load_state_dict(raw["model"])
        optimizer.load_state_dict(raw["optimizer"])
        first, best, best_state = raw["epoch"] + 1, Score(**raw["best"]), raw["best_state"]
    bar = tqdm(range(first, recipe.epochs), initial=first, total=recipe.epochs, desc=progress, disable=progress is None)
    for epoch in bar:
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
        torch.manual_seed(recipe.seed * 1_000_003 + epoch)  # dropout draws from the global one
        x, y = _epoch_windows(data, recipe, np.random.default_rng([recipe.seed, epoch]))
        inputs, targets = as_input(x, spec), torch.from_numpy(y)
        steps = -(-len(x) // recipe.batch)
        model.train()
        for i, (part, labels) in enumerate(_batches(inputs, targets, recipe, generator)):
            share = _rate(epoch * steps + i, recipe.epochs * steps, recipe.warmup)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share
            loss = _loss(model(part), labels, part, recipe, teacher)
            if not torch.isfinite(loss):
                raise RunFailed(
                    f"training: the loss is {loss.item()} in epoch {epoch + 1}, step {i + 1}; lower --lr, check data"
                )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
        reached = score(model, *validation)
        if best is None or (reached.balanced_accuracy, -reached.loss) > (best.balanced_accuracy, -best.loss):
            best, best_state = reached, copy.deepcopy(model.state_dict())
        bar.set_postfix(
            loss=f"{loss.item():.3f}",
            validation=f"{reached.balanced_accuracy:.3f}",
            best=f"{best.balanced_accuracy:.3f}",
        )
        if resume is not None:
            write_torch(
                resume,
                {
                    "recipe": asdict(recipe),
                    "config": asdict(model.present_config()),
                    "epoch": epoch,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "best": asdict(best),
                    "best_state": best_state,
                },
            )
    model.load_state_dict(best_state)
    model.eval()
    return best if best is not None else score(model, *validation)
