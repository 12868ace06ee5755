"""Training and fine-tuning: one loop for both, which can be killed at any time and resumes where it stopped."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
    """Return AdamW with two groups: the SSM parameters have their own learning rate and no weight decay."""
    ssm_parameters = [p for ssm in model.ssms() for p in ssm.ssm_parameters() if p.numel()]
    ids = {id(p) for p in ssm_parameters}
    others = [p for p in model.parameters() if id(p) not in ids and p.numel()]
    groups = [
        {"params": others, "lr": recipe.lr, "weight_decay": recipe.weight_decay},
        {"params": ssm_parameters, "lr": recipe.ssm_lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]])


def _rate(step: int, steps: int, warmup: float) -> float:
    """Return the share of the full learning rate: linear warm-up, then a cosine down to zero."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def _epoch_windows(data: Dataset, recipe: Recipe, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return windows of the training split: half-overlapping with a random phase if ``jitter``, else tumbling."""
    train = data.splits["train"]
    if recipe.jitter:
        hop = max(1, recipe.window // 2)
        x, y = windows(train, recipe.window, hop, lambda spare: int(rng.integers(spare + 1)))
    else:
        x, y = windows(train, recipe.window, recipe.window)
    return (rotate(x, recipe.rotation, rng) if recipe.rotation else x), y


def _batches(x: Tensor, y: Tensor, recipe: Recipe, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches of windows and labels, with random gains and noise as in the recipe."""
    for chosen in torch.randperm(len(x), generator=generator).split(recipe.batch):
        part = x[chosen]
        if recipe.scaling:
            factor = torch.randn(len(chosen), 1, x.shape[2], generator=generator) * recipe.scaling
            part = part * torch.exp(factor)
        if recipe.noise:
            part = part + torch.randn(part.shape, generator=generator) * recipe.noise
        yield part, y[chosen]


TEMPERATURE = 2.0
"""Temperature of the distillation, which gives small probabilities of the teacher more weight (arXiv 1503.02531)."""


def _loss(logits: Tensor, labels: Tensor, x: Tensor, recipe: Recipe, teacher: SSMNetwork | None) -> Tensor:
    """Return the cross-entropy, mixed with the divergence from the teacher's logits if there is a teacher."""
    loss = nn.functional.cross_entropy(logits, labels)
    if teacher is None or not recipe.distill:
        return loss
    with torch.no_grad():
        target = nn.functional.log_softmax(teacher(x) / TEMPERATURE, dim=-1)
    student = nn.functional.log_softmax(logits / TEMPERATURE, dim=-1)
    divergence = nn.functional.kl_div(student, target, log_target=True, reduction="batchmean") * TEMPERATURE**2
    return (1 - recipe.distill) * loss + recipe.distill * divergence


class _Training:
    """State of a training run between two epochs."""

    def __init__(self, checkpoint: Checkpoint, data: Dataset, recipe: Recipe, teacher: SSMNetwork | None) -> None:
        self.model, self.spec = checkpoint.model, checkpoint.spec
        self.data, self.recipe, self.teacher = data, recipe, teacher
        x, y = split_windows(data, "validation", recipe.window)
        self.validation = as_input(x, self.spec), torch.from_numpy(y)
        self.optimizer = _optimizer(self.model, recipe)
        self.learning_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.next_epoch = 0
        self.best: Score | None = None
        self.best_state = copy.deepcopy(self.model.state_dict())

    def settings(self) -> dict[str, Any]:
        """Return what the state belongs to: a run with other settings must not resume from it."""
        return {"recipe": asdict(self.recipe), "config": asdict(self.model.present_config())}

    def restore(self, path: Path) -> None:
        """Continue from a saved state. Raise InputRefused if a run with other settings wrote it."""
        state, settings = read_torch(path), self.settings()
        if {name: state.get(name) for name in settings} != settings:
            raise InputRefused(f"{path}: left by a run with other settings; use another output folder or delete it")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.next_epoch = state["epoch"] + 1
        self.best, self.best_state = Score(**state["best"]), state["best_state"]

    def save(self, path: Path) -> None:
        """Write the state after the last finished epoch."""
        assert self.best is not None
        progress = {
            "epoch": self.next_epoch - 1,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": asdict(self.best),
            "best_state": self.best_state,
        }
        write_torch(path, self.settings() | progress)

    def run_epoch(self) -> tuple[float, Score]:
        """Train for one epoch; return the loss of its last batch and the validation score after it.

        All of an epoch's randomness comes from (seed, epoch), so that a resumed run equals an uninterrupted one.
        """
        recipe, epoch = self.recipe, self.next_epoch
        seed = recipe.seed * 1_000_003 + epoch
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # dropout draws from the global generator
        x, y = _epoch_windows(self.data, recipe, np.random.default_rng([recipe.seed, epoch]))
        inputs, targets = as_input(x, self.spec), torch.from_numpy(y)
        steps = -(-len(x) // recipe.batch)
        self.model.train()
        for i, (part, labels) in enumerate(_batches(inputs, targets, recipe, generator)):
            share = _rate(epoch * steps + i, recipe.epochs * steps, recipe.warmup)
            loss = self._step(part, labels, share)
            if not torch.isfinite(loss):
                raise RunFailed(
                    f"training: the loss is {loss.item()} in epoch {epoch + 1}, step {i + 1}; lower --lr, check data"
                )
        reached = score(self.model, *self.validation)
        if self.best is None or reached.is_better_than(self.best):
            self.best, self.best_state = reached, copy.deepcopy(self.model.state_dict())
        self.next_epoch += 1
        return loss.item(), reached

    def _step(self, x: Tensor, labels: Tensor, share: float) -> Tensor:
        """Update the parameters on one batch with this share of the learning rates. Return the loss.

        With a loss that is not finite, the parameters are left unchanged.
        """
        for group, rate in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
            group["lr"] = rate * share
        loss = _loss(self.model(x), labels, x, self.recipe, self.teacher)
        if torch.isfinite(loss):
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
            self.optimizer.step()
        return loss

    def finish(self) -> Score:
        """Load the parameters of the best epoch and return its validation score."""
        self.model.load_state_dict(self.best_state)
        self.model.eval()
        return self.best if self.best is not None else score(self.model, *self.validation)


def fit(
    checkpoint: Checkpoint,
    data: Dataset,
    recipe: Recipe,
    resume: Path | None = None,
    progress: str | None = None,
    teacher: SSMNetwork | None = None,
) -> Score:
    """Train ``checkpoint.model`` in place and leave it at its best validation epoch.

    Parameters
    ----------
    checkpoint
        The network to train, and its normalisation.
    data
        Data set; the training and the validation split are used.
    recipe
        Settings of this run. They may differ from the checkpoint's own, as in fine-tuning.
    resume
        File that the state is written to after every epoch. A run that finds it continues from there, with the result
        of a run that was never interrupted.
    progress
        Label of the progress bar; None for no bar.
    teacher
        Network in evaluation mode from which ``recipe.distill`` takes logits.

    Returns
    -------
    Score
        The validation score of the best epoch.

    Raises
    ------
    RunFailed
        If the loss is no longer finite.
    InputRefused
        If the state in ``resume`` was written with other settings.
    """
    training = _Training(checkpoint, data, recipe, teacher)
    if resume is not None and resume.exists():
        training.restore(resume)
    epochs = range(training.next_epoch, recipe.epochs)
    bar = tqdm(epochs, initial=epochs.start, total=recipe.epochs, desc=progress, disable=progress is None)
    for _ in bar:
        loss, reached = training.run_epoch()
        assert training.best is not None
        bar.set_postfix(
            loss=f"{loss:.3f}",
            validation=f"{reached.balanced_accuracy:.3f}",
            best=f"{training.best.balanced_accuracy:.3f}",
        )
        if resume is not None:
            training.save(resume)
    return training.finish()
