"""Commands for the checkpoints of other projects: import, verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_ssm.errors import RunFailed, UsageError
from edge_ssm.formats import artifact
from edge_ssm_build.cli.options import FORMAT_HELP, check_output, require_torch

if TYPE_CHECKING:
    from edge_ssm.model.network import Network
    from edge_ssm_build.importers.verification import Deviation


@click.command("import")
@click.argument("checkpoint")
@click.option("--from", "format_name", default="auto", show_default=True, help=FORMAT_HELP)
@click.option(
    "--arch",
    required=True,
    metavar="FILE",
    help="ARCH.toml: what CHECKPOINT's keys cannot express (docs/import.md).",
)
@click.option("--output", required=True, metavar="FILE", help="Artifact to write, *.safetensors.")
@click.option("--input", "recording", metavar="FILE", help="Recording to compare on, in addition to random input.")
def import_(checkpoint: str, format_name: str, arch: str, output: str, recording: str | None) -> None:
    """Convert a CHECKPOINT of state-spaces or S4oP to an artifact, if its stream agrees with its convolution."""
    require_torch()
    from edge_ssm_build.importers.architecture import read_architecture
    from edge_ssm_build.importers.checkpoints import read_checkpoint
    from edge_ssm_build.importers.convert import import_checkpoint

    inputs = {f"CHECKPOINT {checkpoint}": checkpoint, f"--arch {arch}": arch, f"--input {recording}": recording}
    check_output(output, ".safetensors", inputs)
    imported = read_checkpoint(Path(checkpoint), format_name, read_architecture(Path(arch)))
    recording_path = None if recording is None else Path(recording)
    network, deviations = import_checkpoint(imported, Path(checkpoint), Path(output), recording_path)
    for d in deviations:
        click.echo(f"{d.engine}: {d.steps} samples, largest error of a logit {d.error:.1e}")
    active = [len(block.ssm.active) for block in network.blocks]
    click.echo(f"{output}: {imported.format_name}, {len(active)} layers, {network.d_model} channels, active {active}")


@click.command()
@click.argument("model")
@click.argument("checkpoint", required=False)
@click.option("--from", "format_name", default="auto", show_default=True, help=FORMAT_HELP)
@click.option("--arch", metavar="FILE", help="ARCH.toml of CHECKPOINT. Required with CHECKPOINT.")
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Number of samples to compare with the convolution.",
)
@click.option(
    "--drift",
    type=click.IntRange(min=0),
    default=1_000_000,
    show_default=True,
    help="Number of samples of one long stream to compare with float64; 0 for none.",
)
def verify(model: str, checkpoint: str | None, format_name: str, arch: str | None, steps: int, drift: int) -> None:
    """Compare the stream of MODEL, on each engine, with its convolution and, over a long stream, with float64.

    With CHECKPOINT, also compare it with the checkpoint's own convolution. The exit status is 1 if an output is off by
    more than 1e-4 or, with rounded weights, by more than a tenth of what the rounding changed.
    """
    require_torch()
    if (checkpoint is None) != (arch is None):
        raise UsageError("verify: a CHECKPOINT and its --arch go together")
    network = artifact.load(model).network
    results = _compare(network, checkpoint, format_name, arch, steps) + _compare_drift(network, drift)
    for expectation, d in results:
        mark = "ok" if d.error <= network.tolerance else "TOO LARGE"
        click.echo(f"{d.engine:<11} {d.steps:>8} samples against {expectation}: largest error {d.error:.1e}  {mark}")
    if any(not d.error <= network.tolerance for _, d in results):
        raise RunFailed(f"{model}: an output is off by more than {network.tolerance:.2g}")


def _compare(
    network: Network, checkpoint: str | None, format_name: str, arch: str | None, steps: int
) -> list[tuple[str, Deviation]]:
    """Return the deviations from the network's convolution and from the checkpoint's, each with its description."""
    from edge_ssm_build.importers import verification
    from edge_ssm_build.importers.architecture import read_architecture
    from edge_ssm_build.importers.checkpoints import read_checkpoint

    results = [("its convolution", d) for d in verification.compare_with_convolution(network, steps)]
    if checkpoint is not None and arch is not None:
        imported = read_checkpoint(Path(checkpoint), format_name, read_architecture(Path(arch)))
        samples = verification.random_samples(network, steps)
        deviations = verification.compare_with_checkpoint(network, imported, samples)
        results += [("the checkpoint", d) for d in deviations]
    return results


def _compare_drift(network: Network, steps: int) -> list[tuple[str, Deviation]]:
    """Return the deviation of each engine from float64 over one long stream."""
    from tqdm import tqdm

    from edge_ssm.engines.registry import available
    from edge_ssm_build.importers.verification import measure_drift

    results = []
    for engine in (name for name in available(network) if name != "reference" and steps):
        with tqdm(total=steps, desc=f"{engine}, long stream", unit=" samples", mininterval=1) as bar:
            results.append(("float64, one long stream", measure_drift(network, engine, steps, bar.update)))
    return results
