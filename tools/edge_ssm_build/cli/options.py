"""Options and checks that several commands share. Nothing here imports torch at start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_ssm import outputs
from edge_ssm.errors import UsageError
from edge_ssm.formats import loading
from edge_ssm_build.data.datasets import BUILTIN

TORCH_MAGIC = b"PK\x03\x04"
"""First bytes of the files that ``torch.save`` writes."""
MAX_THREADS = 4
"""Largest number of threads that torch uses in a command."""
DATA_HELP = f"Data set: {', '.join(BUILTIN)}, or a .npz file of your own (docs/build.md)."
FORMAT_HELP = "Format of CHECKPOINT: auto, state-spaces-s4d, state-spaces-s4block or s4op."


def require_torch() -> None:
    """Import torch and configure it for this process. Raise UsageError if a package is missing."""
    try:
        import torch
        import tqdm  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{error.name} is missing; pip install 'edge-ssm[host]' on the workstation") from None
    from edge_ssm_build.pruning.executors import prepare_process

    prepare_process(max(1, min(MAX_THREADS, torch.get_num_threads())))


def parse_numbers(text: str, kind: type[int] | type[float], option: str) -> list[Any]:
    """Return the numbers in a comma-separated list. Raise UsageError, naming the option, for anything else."""
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or any(isinstance(n, float) and not math.isfinite(n) for n in numbers):
        raise UsageError(f"{option} {text!r}: expected numbers separated by commas")
    return numbers


def kind_of(model: str) -> str:
    """Return "checkpoint", "exported" or "artifact", by the content of the file, or by its name if that is unknown."""
    try:
        with open(model, "rb") as file:
            start = file.read(9)
    except OSError:
        start = b""  # whoever reads the file reports the error
    if start.startswith(TORCH_MAGIC):
        return "checkpoint"
    if loading.detect_kind(Path(model)) is not None:
        return "exported"
    return "artifact" if start[8:] == b"{" or model.endswith(".safetensors") else "checkpoint"


def check_output(output: str, ending: str, inputs: Mapping[str, str | None]) -> None:
    """Check the output path before any work is done.

    Raises
    ------
    UsageError
        If the name does not end in ``ending``.
    InputRefused
        If the path cannot be written or would overwrite one of ``inputs`` (description -> path or None).
    """
    if Path(output).suffix != ending:
        raise UsageError(f"--output {output}: expected a name that ends in {ending}")
    paths = {name: Path(path) for name, path in inputs.items() if path is not None}
    outputs.check_places({"--output": Path(output)}, paths)


def make_folder(path: str) -> Path:
    """Create a folder and its parents, if they do not exist. Raise UsageError if that is impossible."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be created ({error.strerror})") from None
    return folder
