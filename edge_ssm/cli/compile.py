"""``edge-ssm compile``: compile an engine's kernels ahead of their first use."""

from __future__ import annotations

from pathlib import Path

import click

from edge_ssm import outputs
from edge_ssm.cli import signals
from edge_ssm.cli.options import NotEmpty
from edge_ssm.engines.cpu import cache as kernel_cache
from edge_ssm.engines.cpu import kernel_file
from edge_ssm.engines.cuda import cache as cuda_cache
from edge_ssm.errors import UsageError

TARGETS = ("host", *kernel_file.TARGETS, *cuda_cache.TARGETS)


@click.command("compile")
@click.option(
    "--target",
    default="host",
    show_default=True,
    metavar="NAME",
    help=f"Processor to compile for: host; another device's: {', '.join(kernel_file.TARGETS)}; or a GPU: "
    f"{', '.join(cuda_cache.TARGETS)}.",
)
@click.option(
    "--output",
    type=NotEmpty(),
    metavar="PATH",
    help="File to write; a folder for a GPU.  [default: this machine's folder of compiled kernels]",
)
@click.option("--assembly", type=NotEmpty(), metavar="FILE", help="File to write the assembly to, for reading.")
@click.option("--if-missing", is_flag=True, help="Compile only if no kernel in the folder runs on this machine.")
def compile_kernels(target: str, output: str | None, assembly: str | None, if_missing: bool) -> None:
    """Compile an engine's kernels, for this machine or for a device that has no compiler."""
    if target not in TARGETS:
        raise UsageError(f"--target {target!r}: unknown, expected {', '.join(TARGETS)}")
    if if_missing:
        if target != "host" or output is not None or assembly is not None:
            raise UsageError("--if-missing: only for this machine's own kernel, without another option")
        if (existing := kernel_cache.best()) is not None:
            click.echo(f"{kernel_cache.folder()}: has a kernel for {existing.header.target}")
            return
    if target.startswith("sm_"):
        if assembly is not None:
            raise UsageError("--assembly: not for a GPU; its kernels are PTX, which is text")
        _compile_for_gpu(target, output)
    else:
        _compile_for_cpu(target, output, assembly)


def _compile_for_gpu(target: str, output: str | None) -> None:
    with signals.termination_raises():
        folder, kernels = cuda_cache.compile_and_keep(target, None if output is None else Path(output))
    sizes = ", ".join(f"{name} of {len(kernels[name].ptx)} bytes of PTX" for name in sorted(kernels))
    click.echo(f"{folder}: CUDA kernels for {target}: {sizes}")
    click.echo(f"copy them to the device, into {kernel_cache.USER_FOLDER} there (or $EDGE_SSM_CACHE)")


def _compile_for_cpu(target: str, output: str | None, assembly: str | None) -> None:
    places = {name: Path(text) for name, text in (("--output", output), ("--assembly", assembly)) if text is not None}
    outputs.check_places(places, {})
    for option, magic, content in (
        ("--output", kernel_file.MAGIC, "kernel"),
        ("--assembly", kernel_cache.LISTING, "assembly"),
    ):
        if option in places:
            kernel_cache.check_replaced(option, places[option], magic, content)
    with signals.termination_raises():
        path, kernel = kernel_cache.compile_and_keep(target, places.get("--output"), places.get("--assembly"))
    click.echo(f"{path}: kernel for {kernel.header.target}, {len(kernel.code)} bytes of code")
    if kernel.header.target == target:
        click.echo(f"copy it to the device, into {kernel_cache.USER_FOLDER} there (or $EDGE_SSM_CACHE)")
