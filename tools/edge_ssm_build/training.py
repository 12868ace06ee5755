"""Training and fine-tuning: one loop, the same for both, that can be killed at any moment and goes on where it was."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from edge_ssm import files
from edge_ssm.errors import InputRefused, RunFailed, UsageError
from edge_ssm.model.network import InputSpec
from edge_ssm_build.datasets import Array, Dataset, SplitName, windows
from edge_ssm_build.model import Config, LayerShape, SSMNetwork
from edge_ssm_build.rotation import rotate

CHECKPOINT_VERSION = 2


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. Everything that the result depends on, beside data and Config, stands here."""

    window: int
    epochs: int
    seed: int = 0
    batch: int = 32
    lr: float = 4e-3
    ssm_lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises; then it falls along a cosine."""
    clip: float = 1.0
    jitter: bool = True
    """Draw the training windows' starts anew in every epoch, where recordings are longer than a window."""
    noise: float = 0.0
    """Standard deviation of noise added to normalised training windows."""
    scaling: float = 0.0
    """Standard deviation of the log of a factor a training window and channel."""
    rotation: float = 0.0
    """Standard deviation, in degrees, of a random rotation of training windows (``rotation.rotate``)."""
    distill: float = 0.0
    """Weight of a teacher's logits in the loss (arXiv 1503.02531); the labels have the rest."""


@dataclass
class Checkpoint:
    """A network and how it came to be: what train and prune write and every other command reads."""

    model: SSMNetwork
    recipe: Recipe
    spec: InputSpec
    data: str
    """The data set's name or path, as given."""
    labels: tuple[str, ...]
    source: str
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry a training or pruning stage: method, seed, epochs, validation score."""


def input_spec(data: Dataset) -> InputSpec:
    """Channels and normalisation, from the training split alone."""
    samples = np.concatenate(data.splits["train"].x)
    std = samples.std(axis=0)
    return InputSpec(
        channels=data.channels,
        mean=samples.mean(axis=0),
        std=np.where(std > 0, std, 1.0),
        units=data.units,
        sample_rate_hz=data.sample_rate_hz,
    )


def split_windows(data: Dataset, split: SplitName, window: int) -> tuple[Array, Array]:
    """The split's tumbling windows, (n, window, d_input) in the sensor's units, and labels: for scores."""
    return windows(data.splits[split], window, window)


def as_input(x: Array, spec: InputSpec, dtype: type[np.floating[Any]] = np.float32) -> Tensor:
    """Normalised windows, (n, window, d_input): float32 as a network trains on them, or another ``dtype``."""
    return torch.from_numpy(((x - spec.mean) / spec.std).astype(dtype))


@torch.no_grad()
def predict(model: SSMNetwork, x: Tensor, batch: int = 256) -> Tensor:
    """Logits (n, d_output) in convolution mode."""
    model.eval()
    return torch.cat([model(part) for part in x.split(batch)])


BATCH_VALUES = 2**20
"""Values of one signal of a block in a batch of ``predict_exactly``, 8 MiB; several of them are alive at a time."""


def predict_exactly(model: SSMNetwork, x: Tensor) -> Tensor:
    """Logits in convolution mode with everything in float64: what streams are compared with. ``model`` stays as it is.

    A network in float32 is off by 1e-5 and more itself, too much to judge a bound of 1e-4 by.
    """
    batch = max(1, BATCH_VALUES // max(1, x.shape[1] * model.config.d_model))
    return predict(copy.deepcopy(model).double(), x.double(), batch)


@dataclass(frozen=True)
class Score:
    accuracy: float
    balanced_accuracy: float
    """Mean over the classes of the share that is found."""
    loss: float
    windows: int


def score_logits(logits: Tensor, y: Tensor) -> Score:
    """Logits (n, d_output) against class numbers (n,)."""
    right = logits.argmax(dim=1) == y
    found = [right[y == label].float().mean().item() for label in y.unique()]
    loss = nn.functional.cross_entropy(logits, y).item()
    return Score(right.float().mean().item(), float(np.mean(found)), loss, len(y))


def score(model: SSMNetwork, x: Tensor, y: Tensor) -> Score:
    return score_logits(predict(model, x), y)


# --- checkpoints -----------------------------------------------------------------------------------------------


def write_torch(path: Path, content: Any) -> None:
    """torch.save, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    files.write(path, buffer.getvalue())


def read_torch(path: Path) -> Any:
    """A file of tensors and plain values. Raises InputRefused for any other: no pickled code is ever run."""
    try:
        with path.open("rb") as file:  # of a path torch goes by the name's ending
            return torch.load(file, weights_only=True)
    except FileNotFoundError:
        raise InputRefused(f"{path}: no such file") from None
    except OSError as error:
        raise InputRefused(f"{path}: can't be read ({error.strerror})") from None
    except Exception as error:  # on damaged bytes its unpickler raises whatever it trips over
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise InputRefused(f"{path}: damaged, or not a checkpoint of tensors and plain values ({reason})") from None


def dump_checkpoint(checkpoint: Checkpoint) -> bytes:
    spec = checkpoint.spec
    buffer = io.BytesIO()
    torch.save(
        {
            "edge_ssm_checkpoint": CHECKPOINT_VERSION,
            "config": asdict(checkpoint.model.present_config()),
            "mixing_dtype": checkpoint.model.mixing_dtype,
            "rounding_error": checkpoint.model.rounding_error,
            "recipe": asdict(checkpoint.recipe),
            "spec": asdict(spec) | {"mean": spec.mean.tolist(), "std": spec.std.tolist()},
            "data": checkpoint.data,
            "labels": list(checkpoint.labels),
            "source": checkpoint.source,
            "history": checkpoint.history,
            "model": checkpoint.model.state_dict(),
        },
        buffer,
    )
    return buffer.getvalue()


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, dump_checkpoint(checkpoint))


def load_checkpoint(path: Path) -> Checkpoint:
    """Raises InputRefused for a missing, damaged or foreign file."""
    return _checkpoint_of(read_torch(path), str(path))


def parse_checkpoint(content: bytes, name: str) -> Checkpoint:
    """A checkpoint from ``dump_checkpoint``'s bytes; ``name`` is for errors."""
    return _checkpoint_of(torch.load(io.BytesIO(content), weights_only=True), name)


def _checkpoint_of(raw: Any, path: str) -> Checkpoint:
    if not isinstance(raw, dict) or raw.get("edge_ssm_checkpoint") != CHECKPOINT_VERSION:
        raise InputRefused(f"{path}: not a checkpoint of edge-ssm-build (version {CHECKPOINT_VERSION} expected)")
    try:
        config, spec = raw["config"], raw["spec"]
        layers = [LayerShape(**{k: tuple(v) for k, v in layer.items()}) for layer in config["layers"]]
        model = SSMNetwork(
            Config(**(config | {"layers": tuple(layers)})), raw["mixing_dtype"], raw.get("rounding_error", 0.0)
        )
        model.load_state_dict(raw["model"])
        return Checkpoint(
            model=model.eval(),
            recipe=Recipe(**raw["recipe"]),
            spec=InputSpec(
                channels=tuple(spec["channels"]),
                mean=np.array(spec["mean"]),
                std=np.array(spec["std"]),
                units=tuple(spec["units"]),
                sample_rate_hz=spec["sample_rate_hz"],
            ),
            data=raw["data"],
            labels=tuple(raw["labels"]),
            source=raw["source"],
            history=raw["history"],
        )
    except (KeyError, TypeError, ValueError, RuntimeError, UsageError) as error:
        raise InputRefused(
            f"{path}: a checkpoint with parts that do not fit ({' '.join(str(error).split())[:120]})"
        ) from None


# --- the loop --------------------------------------------------------------------------------------------------


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


def new_checkpoint(data: Dataset, name: str, config: Config, recipe: Recipe) -> Checkpoint:
    """An untrained network for a data set; its weights depend on the recipe's seed alone."""
    torch.manual_seed(recipe.seed)
    return Checkpoint(SSMNetwork(config), recipe, input_spec(data), name, data.labels, data.source)


def check_place(path: Path, made: Checkpoint) -> None:
    """Before ``made`` is trained. Raises UsageError where a checkpoint is at ``path`` that other settings or data made:
    it would be lost; InputRefused for one that can't be read."""
    if not path.exists():
        return

    def settings(of: Checkpoint) -> tuple[Any, ...]:
        spec = of.spec
        return of.model.present_config(), of.recipe, of.labels, spec.channels, spec.mean.tolist(), spec.std.tolist()

    if settings(load_checkpoint(path)) != settings(made):
        raise UsageError(f"{path}: was trained with other settings or data; use another --output or delete it")
