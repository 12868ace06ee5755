"""A split of a data set as one CSV recording, which ``edge-ssm run --stream`` can replay."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from edge_ssm import files
from edge_ssm.errors import InputRefused, UsageError
from edge_ssm_build.data.datasets import Array, Dataset, SplitName


def record(
    data: Dataset,
    split: SplitName,
    path: Path,
    window: int,
    windows_each: int | None = None,
    decimals: int | None = None,
) -> int:
    """Write the recordings of a split one after the other, each cut to complete windows.

    Parameters
    ----------
    data, split
        The data set and the name of its split.
    path
        The CSV file. Its columns are the channels and ``label``.
    window
        Samples per window.
    windows_each
        Largest number of windows of each recording, taken from its middle; None for all.
    decimals
        Number of decimals that values are rounded to; None for no rounding.

    Returns
    -------
    int
        Number of samples.

    Raises
    ------
    InputRefused
        If no recording is as long as a window.
    UsageError
        If the file cannot be written.
    """
    parts: list[tuple[Array, str]] = []
    for recording, label in zip(data.splits[split].x, data.splits[split].y, strict=True):
        available = len(recording) // window
        count = available if windows_each is None else min(available, windows_each)
        start = (available - count) // 2 * window
        parts.append((recording[start : start + count * window], data.labels[label]))
    samples = sum(len(part) for part, _ in parts)
    if not samples:
        raise InputRefused(f"record: no recording of {data.name} {split} holds a window of {window} samples")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*data.channels, "label"])
    for part, label in parts:
        for row in part:
            values = (repr(float(v)) if decimals is None else f"{v:.{decimals}f}" for v in row)
            writer.writerow([*values, label])
    try:
        files.write(path, text.getvalue().encode())
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from None
    return samples
