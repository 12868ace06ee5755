"""Commands for data and training: data, train, evaluate, record."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_ssm import files, outputs
from edge_ssm.cli.options import Finite
from edge_ssm.errors import UsageError
from edge_ssm.formats import artifact
from edge_ssm_build.cli.options import DATA_HELP, kind_of, make_folder, require_torch
from edge_ssm_build.data import datasets
from edge_ssm_build.data.datasets import SPLITS, Dataset

if TYPE_CHECKING:
    from edge_ssm.model.network import Network
    from edge_ssm_build.training.checkpoint import Recipe
    from edge_ssm_build.training.network import Config, SSMNetwork


@click.command()
@click.argument("name")
def data(name: str) -> None:
    """Fetch data set NAME into the cache and show its splits."""
    dataset = datasets.load(name)
    click.echo(
        f"{dataset.name}: {len(dataset.channels)} channels ({', '.join(dataset.channels)}), "
        f"classes {', '.join(dataset.labels)}"
    )
    for split, recordings in dataset.splits.items():
        lengths = [len(r) for r in recordings.x]
        click.echo(f"  {split:<10} {len(lengths):>5} recordings of {min(lengths)} to {max(lengths)} samples")
    click.echo(f"  {dataset.source}")


@click.command()
@click.option("--data", "name", required=True, metavar="NAME", help=DATA_HELP)
@click.option(
    "--output",
    required=True,
    metavar="DIR",
    help="Folder for checkpoint.pt and scores.json. If the command is killed, the same command resumes.",
)
@click.option("--window", type=click.IntRange(min=1), required=True, help="Number of samples per decision.")
@click.option(
    "--epochs", type=click.IntRange(min=1), default=40, show_default=True, help="Passes over the training split."
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    default=0,
    show_default=True,
    help="Seed of the initial weights and of the training.",
)
@click.option("--d-model", type=click.IntRange(min=1), default=64, show_default=True, help="Number of channels, H.")
@click.option(
    "--d-state",
    type=click.IntRange(min=2),
    default=32,
    show_default=True,
    help="Number of states per channel, N (even).",
)
@click.option("--n-layers", type=click.IntRange(min=1), default=2, show_default=True, help="Number of blocks.")
@click.option("--dropout", type=Finite(0, 0.9), default=0.1, show_default=True, help="Dropout rate, 0 to 0.9.")
@click.option(
    "--prenorm/--postnorm",
    default=False,
    show_default=True,
    help="Normalise before the SSM, or after the residual connection.",
)
@click.option(
    "--norm",
    type=click.Choice(["layer", "batch"]),
    default="layer",
    show_default=True,
    help="LayerNorm or BatchNorm.",
)
@click.option(
    "--mixing",
    type=click.Choice(["glu", "plain"]),
    default="glu",
    show_default=True,
    help="Channel mixing with or without a gate.",
)
@click.option(
    "--pooling",
    type=click.Choice(["mean", "last"]),
    default="mean",
    show_default=True,
    help="Output of a window: the mean over its samples, or the last sample's.",
)
@click.option(
    "--discretization",
    type=click.Choice(["zoh", "bilinear"]),
    help="Zero-order hold or bilinear transform.  [default: zoh; bilinear for s4]",
)
@click.option(
    "--init",
    type=click.Choice(["lin", "inv", "legs"]),
    help="Initial A: S4D-Lin, S4D-Inv or HiPPO-LegS.  [default: lin; legs for s4]",
)
@click.option(
    "--kernel",
    type=click.Choice(["s4d", "s4"]),
    default="s4d",
    show_default=True,
    help="Diagonal A, or diagonal plus rank one (DPLR).",
)
@click.option("--batch", type=click.IntRange(min=2), default=32, show_default=True, help="Number of windows per batch.")
@click.option("--lr", type=Finite(min=0, min_open=True), default=4e-3, show_default=True, help="Learning rate.")
@click.option(
    "--ssm-lr",
    type=Finite(min=0),
    default=1e-3,
    show_default=True,
    help="Learning rate of the SSM parameters (A, C, dt; B and P with s4), which have no weight decay.",
)
@click.option(
    "--weight-decay",
    type=Finite(min=0),
    default=0.01,
    show_default=True,
    help="Weight decay of AdamW for all other parameters.",
)
@click.option(
    "--noise",
    type=Finite(min=0),
    default=0.0,
    show_default=True,
    help="Standard deviation of noise added to normalised training windows.",
)
@click.option(
    "--scaling",
    type=Finite(min=0),
    default=0.0,
    show_default=True,
    help="Standard deviation of the logarithm of a random gain per training window and channel.",
)
@click.option(
    "--rotation",
    type=Finite(0, 180),
    default=0.0,
    show_default=True,
    help="Standard deviation, in degrees, of random rotations of training windows; three channels are one vector.",
)
def train(name: str, output: str, **options: Any) -> None:
    """Train an S4 or S4D network in convolution mode, and keep the epoch with the best validation score."""
    require_torch()
    from edge_ssm_build.training.checkpoint import check_overwrite, new_checkpoint, save_checkpoint
    from edge_ssm_build.training.loop import fit

    dataset = datasets.load(name)
    folder = make_folder(output)
    config, recipe = _settings(dataset, options)
    checkpoint = new_checkpoint(dataset, name, config, recipe)
    path, resume = folder / "checkpoint.pt", folder / "resume.pt"
    check_overwrite(path, checkpoint)
    score = fit(checkpoint, dataset, recipe, resume, progress="training")
    checkpoint.history.append(
        {"stage": "train", "seed": recipe.seed, "epochs": recipe.epochs, "validation": asdict(score)}
    )
    save_checkpoint(path, checkpoint)
    scores = json.dumps({"validation": asdict(score)}, indent=1) + "\n"
    files.write(folder / "scores.json", scores.encode())
    resume.unlink(missing_ok=True)
    click.echo(f"{path}: validation accuracy {score.accuracy:.4f}, balanced {score.balanced_accuracy:.4f}")


def _settings(dataset: Dataset, options: dict[str, Any]) -> tuple[Config, Recipe]:
    """Return the configuration and the recipe that the options of ``train`` describe."""
    from edge_ssm_build.training.checkpoint import Recipe
    from edge_ssm_build.training.network import Config

    is_s4 = options["kernel"] == "s4"
    values = options | {
        "prenorm": bool(options["prenorm"]),
        "init": options["init"] or ("legs" if is_s4 else "lin"),
        "discretization": options["discretization"] or ("bilinear" if is_s4 else "zoh"),
        "l_kernel": options["window"] if is_s4 else 0,
    }
    config_names, recipe_names = ({f.name for f in fields(kind)} for kind in (Config, Recipe))
    config = Config(
        d_input=len(dataset.channels),
        d_output=len(dataset.labels),
        **{key: value for key, value in values.items() if key in config_names},
    )
    return config, Recipe(**{key: value for key, value in values.items() if key in recipe_names})


@click.command()
@click.argument("model")
@click.option("--data", "name", metavar="NAME", help="Data set.  [default: the one that MODEL was trained on]")
@click.option("--split", type=click.Choice(SPLITS), default="test", show_default=True, help="Split to score on.")
@click.option("--engine", metavar="NAME", help="Also stream through this engine and compare with torch in float64.")
def evaluate(model: str, name: str | None, split: Any, engine: str | None) -> None:
    """Score MODEL, a checkpoint (.pt) or an artifact (.safetensors), on a split cut into windows without overlap."""
    require_torch()
    import torch

    from edge_ssm_build.export.agreement import compare_logits, convolve_windows, stream_windows
    from edge_ssm_build.training.scoring import score_logits, split_windows

    network, torch_network, data_name, window = _load_model(model)
    dataset = _dataset_for(model, network, name, data_name)
    x, y = split_windows(dataset, split, window)
    expected = convolve_windows(torch_network, network.input, x)
    score = score_logits(torch.from_numpy(expected), torch.from_numpy(y))
    click.echo(
        f"{split}: {score.windows} windows, accuracy {score.accuracy:.4f}, balanced {score.balanced_accuracy:.4f}"
    )
    if engine:
        agreement = compare_logits(expected, stream_windows(network, engine, x), network.tolerance)
        click.echo(f"engine {engine} against torch in float64: {agreement.summary()}")


def _load_model(model: str) -> tuple[Network, SSMNetwork, str | None, int]:
    """Return a model's network in both forms, the name of its data set or None, and its window in samples."""
    import torch

    from edge_ssm_build.export.artifact import network_of
    from edge_ssm_build.export.convert import to_model
    from edge_ssm_build.training.checkpoint import load_checkpoint

    if kind_of(model) == "artifact":
        loaded = artifact.load(model)
        data_name = loaded.provenance.get("data", {}).get("name")
        return loaded.network, to_model(loaded.network, torch.float64), data_name, loaded.network.window
    checkpoint = load_checkpoint(Path(model))
    return network_of(checkpoint), checkpoint.model, checkpoint.data, checkpoint.recipe.window


def _dataset_for(model: str, network: Network, name: str | None, default: str | None) -> Dataset:
    """Return the data set ``name`` or ``default``. Raise UsageError unless it exists and fits the network."""
    chosen = name or default
    if chosen is None or (name is None and chosen not in datasets.BUILTIN and not Path(chosen).exists()):
        raise UsageError(f"{model}: trained on {chosen or 'an unknown data set'}, which is not available; give --data")
    dataset = datasets.load(chosen)
    if dataset.channels != network.input.channels or len(dataset.labels) != network.d_output:
        raise UsageError(
            f"{model}: made for channels {', '.join(network.input.channels)} and {network.d_output} classes; "
            f"{chosen} has {', '.join(dataset.channels)} and {len(dataset.labels)}"
        )
    return dataset


@click.command()
@click.option("--data", "name", required=True, metavar="NAME", help=DATA_HELP)
@click.option("--output", required=True, metavar="FILE", help="CSV file to write.")
@click.option("--split", type=click.Choice(SPLITS), default="test", show_default=True, help="Split to write.")
@click.option(
    "--window",
    type=click.IntRange(min=1),
    required=True,
    help="Number of samples per window. Every recording is cut to complete windows.",
)
@click.option(
    "--windows-each",
    type=click.IntRange(min=1),
    help="Largest number of windows of every recording, taken from its middle.  [default: all]",
)
@click.option(
    "--decimals", type=click.IntRange(0, 12), help="Number of decimals to round values to.  [default: no rounding]"
)
def record(name: str, output: str, split: Any, window: int, windows_each: int | None, decimals: int | None) -> None:
    """Write a split as a CSV stream with a label column, for edge-ssm run."""
    from edge_ssm_build.data import recording

    inputs = {} if name in datasets.BUILTIN else {f"--data {name}": Path(name)}
    outputs.check_places({"--output": Path(output)}, inputs)
    samples = recording.record(datasets.load(name), split, Path(output), window, windows_each, decimals)
    click.echo(f"{output}: {samples} samples, {Path(output).stat().st_size:,} bytes")
