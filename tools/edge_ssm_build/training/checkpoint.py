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
    """Settings of a training run: with the data and the ``Config``, everything that the result depends on."""

    window: int
    """Samples per window."""
    epochs: int
    seed: int = 0
    batch: int = 32
    """Windows per batch."""
    lr: float = 4e-3
    ssm_lr: float = 1e-3
    """Learning rate of A, B, C, P and dt, which have no weight decay."""
    weight_decay: float = 0.01
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises linearly, before it falls along a cosine."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    jitter: bool = True
    """Draw the start of the training windows anew in every epoch, if recordings are longer than a window."""
    noise: float = 0.0
    """Standard deviation of the noise added to normalised training windows."""
    scaling: float = 0.0
    """Standard deviation of the logarithm of a random gain per training window and channel."""
    rotation: float = 0.0
    """Standard deviation, in degrees, of the random rotation of training windows (``rotation.rotate``)."""
    distill: float = 0.0
    """Weight of a teacher's logits in the loss (arXiv 1503.02531); the labels have the remaining weight."""


@dataclass
class Checkpoint:
    """A network with its recipe and history: the file that train and prune write and other commands read."""

    model: SSMNetwork
    recipe: Recipe
    spec: InputSpec
    data: str
    """Name or path of the data set, as on the command line."""
    labels: tuple[str, ...]
    source: str
    """Origin and licence of the data."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry per training or pruning stage: method, seed, epochs, validation score."""


def input_spec(data: Dataset) -> InputSpec:
    """Return channels and normalisation; mean and deviation are those of the training split."""
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
    """Write an object with ``torch.save``, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    files.write(path, buffer.getvalue())


def read_torch(path: Path) -> Any:
    """Read a file of tensors and plain values. Raise InputRefused for any other; no pickled code is ever run."""
    try:
        with files.open_regular_file(path) as file:  # given a path, torch would go by its suffix
            return torch.load(file, weights_only=True)
    except FileNotFoundError:
        raise InputRefused(f"{path}: no such file") from None
    except OSError as error:
        raise InputRefused(f"{path}: {files.read_problem(error)}") from None
    except Exception as error:  # torch's unpickler raises many types on damaged bytes
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise InputRefused(f"{path}: damaged, or not a checkpoint of tensors and plain values ({reason})") from None


def dump_checkpoint(checkpoint: Checkpoint) -> bytes:
    """Return the bytes of a checkpoint file."""
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
    """Write a checkpoint atomically; missing parent folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, dump_checkpoint(checkpoint))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint. Raise InputRefused if the file is missing, damaged or of another kind."""
    return _checkpoint_of(read_torch(path), str(path))


def parse_checkpoint(content: bytes, name: str) -> Checkpoint:
    """Return the checkpoint that ``dump_checkpoint`` wrote as bytes; ``name`` stands for it in error messages."""
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
    """Return an untrained network for a data set; its weights depend only on the recipe's seed."""
    torch.manual_seed(recipe.seed)
    return Checkpoint(SSMNetwork(config), recipe, input_spec(data), name, data.labels, data.source)


def check_overwrite(path: Path, checkpoint: Checkpoint) -> None:
    """Check, before training, that writing ``checkpoint`` to ``path`` would not destroy the result of another run.

    Raises
    ------
    UsageError
        If the checkpoint at ``path`` was trained with other settings or data.
    InputRefused
        If the file at ``path`` cannot be read as a checkpoint.
    """
    if path.exists() and _settings(load_checkpoint(path)) != _settings(checkpoint):
        raise UsageError(f"{path}: was trained with other settings or data; use another --output or delete it")


def _settings(checkpoint: Checkpoint) -> tuple[Any, ...]:
    """Return everything that identifies a training run, in comparable form."""
    spec, config = checkpoint.spec, checkpoint.model.present_config()
    return config, checkpoint.recipe, checkpoint.labels, spec.channels, spec.mean.tolist(), spec.std.tolist()
