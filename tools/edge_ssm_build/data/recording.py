"""A recording out of a data set's split: the CSV that `edge-ssm run --stream` replays."""

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
    """Write the split's recordings one after another, each cut to whole windows.

    With ``windows_each`` at most so many of each, from its middle. Columns are the channels and ``label``.
    Returns the number of samples. Raises InputRefused if nothing is left.
    """
    chosen: list[tuple[Array, str]] = []
    for recording, label in zip(data.splits[split].x, data.splits[split].y, strict=True):
        whole = len(recording) // window
        count = whole if windows_each is None else min(whole, windows_each)
        first = (whole - count) // 2 * window
        chosen.append((recording[first : first + count * window], data.labels[label]))
    samples = sum(len(recording) for recording, _ in chosen)
    if not samples:
        raise InputRefused(f"record: no recording of {data.name} {split} holds a window of {window} samples")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*data.channels, "label"])
    for recording, label in chosen:
        for row in recording:
            values = (repr(float(v)) if decimals is None else f"{v:.{decimals}f}" for v in row)
            writer.writerow([*values, label])
    try:
        files.write(path, text.getvalue().encode())
    except OSError as error:
        raise UsageError(f"{path}: can't be written ({error.strerror})") from None
    return samples
