"""Training checkpoints: the network, its recipe, its history and their file format."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_ssm import files
from edge_ssm.errors import InputRefused, UsageError
from edge_ssm.model.network import InputSpec
from edge_ssm_build.data.datasets import Dataset
from edge_ssm_build.training.network import Config, LayerShape, SSMNetwork

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


def write_torch(path: Path, content: Any) -> None:
    """torch.save, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    files.write(path, buffer.getvalue())


def read_torch(path: Path) -> Any:
    """A file of tensors and plain values. Raises InputRefused for any other: no pickled code is ever run."""
    try:
        with files.open_regular_file(path) as file:  # Given a path, torch would go by the ending of its name.
            return torch.load(file, weights_only=True)
    except FileNotFoundError:
        raise InputRefused(f"{path}: no such file") from None
    except OSError as error:
        raise InputRefused(f"{path}: {files.read_problem(error)}") from None
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
