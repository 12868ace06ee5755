"""How samples lie in the buffer of a Linux IIO device, read from its sysfs files, and the decoder made from it.

Follows Documentation/iio/iio_devbuf.rst and Documentation/ABI/testing/sysfs-bus-iio of the Linux kernel: every element
lies at a multiple of its own size, in order of index, and a scan ends at a multiple of its largest element (the last
since Linux 5.5).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_ssm.errors import UsageError
from edge_ssm.io.codecs.base import FrameDecoder
from edge_ssm.io.messages import Frame, Malformed
from edge_ssm.model.network import Array, InputSpec

TIMESTAMP = "in_timestamp"
_TYPE = re.compile(r"(be|le):([sfu])(\d{1,3})/(\d{1,3})(?:X(\d{1,3}))?(?:>>(\d{1,3}))?")


@dataclass(frozen=True)
class Element:
    """One scan element, as its sysfs files describe it."""

    name: str
    """Such as in_accel_x."""
    index: int
    big_endian: bool
    kind: str
    """s: two's complement, u: unsigned, f: IEEE 754."""
    bits: int
    storage: int
    """Bits that it takes up in the buffer, once for each of ``repeat``."""
    repeat: int = 1
    shift: int = 0
    scale: float = 1.0
    offset: float = 0.0
    """value = (raw + offset) * scale, in the unit that the kernel's ABI gives for the channel's kind."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.storage // 8 * self.repeat


@dataclass(frozen=True)
class Layout:
    """The enabled elements in the order of the buffer."""

    elements: tuple[Element, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        """Of every element, in bytes from the start of a scan."""
        out, at = [], 0
        for element in self.elements:
            at += -at % element.size
            out.append(at)
            at += element.size
        return tuple(out)

    @property
    def size(self) -> int:
        """Bytes of one scan."""
        end = self.offsets[-1] + self.elements[-1].size
        return end + -end % max(element.size for element in self.elements)

    def element(self, name: str) -> Element | None:
        return next((element for element in self.elements if element.name == name), None)

    def values(self, scans: Array, element: Element) -> Array:
        """(n,) of one element out of ``scans``, (n, size) uint8: int64, uint64 or float, neither offset nor scaled."""
        at = self.offsets[self.elements.index(element)]
        order = ">" if element.big_endian else "<"
        code = "f" if element.kind == "f" else "u"
        part = np.ascontiguousarray(scans[:, at : at + element.storage // 8])
        raw = part.view(f"{order}{code}{element.storage // 8}")[:, 0]
        if element.kind == "f":
            with np.errstate(invalid="ignore"):  # a signalling NaN is a missing value like any other
                return raw.astype(np.float64)
        spare = np.uint64(64 - element.bits)
        # To the left end and back: this masks what lies beside the value, and carries its sign along.
        left = (raw.astype(np.uint64) >> np.uint64(element.shift)) << spare
        if element.kind == "u":
            return np.asarray(left >> spare)
        return np.asarray(left.view(np.int64) >> np.int64(spare))


def read_text(path: Path) -> str:
    """Raises UsageError if a sysfs file can't be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise UsageError(f"{path}: can't be read ({error.strerror})") from None


def parse_type(name: str, text: str) -> tuple[bool, str, int, int, int, int]:
    """big_endian, kind, bits, storage, repeat and shift of such as ``le:s12/16>>4``. Raises UsageError."""
    match = _TYPE.fullmatch(text)
    if match is not None:
        order, kind = match[1], match[2]
        bits, storage, repeat, shift = int(match[3]), int(match[4]), int(match[5] or 1), int(match[6] or 0)
        fits = 0 < bits <= storage - shift and storage in (8, 16, 32, 64)
        if fits and (kind != "f" or (bits == storage and bits > 8)):
            return order == "be", kind, bits, storage, max(repeat, 1), shift
    raise UsageError(
        f"iio: {name}: type {text[:40]!r}: expected [be|le]:[s|u|f]bits/storagebits[Xrepeat][>>shift] "
        f"with 8, 16, 32 or 64 storage bits"
    )


def _number(device: Path, name: str, what: str, default: float) -> float:
    """in_accel_x_scale, else in_accel_scale, which all channels of that kind share."""
    shared = "in_" + re.sub(r"\d+", "", name.removeprefix("in_").split("_")[0])
    for base in (name, shared):
        path = device / f"{base}_{what}"
        if path.exists():
            text = read_text(path)
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                raise UsageError(f"{path}: {text[:40]!r}: expected a number")
            return value
    return default


def read_elements(device: Path, folder: Path) -> tuple[Element, ...]:
    """All elements that the device has, by index. ``folder``: its scan_elements. Raises UsageError."""
    found = []
    try:
        files = sorted(os.listdir(folder))
    except OSError as error:
        raise UsageError(f"{folder}: can't be read ({error.strerror})") from None
    for name in (file.removesuffix("_type") for file in files if file.endswith("_type")):
        index = read_text(folder / f"{name}_index")
        if not re.fullmatch(r"\d{1,9}", index):
            raise UsageError(f"{folder}/{name}_index: {index[:40]!r}: expected a number")
        described = parse_type(name, read_text(folder / f"{name}_type"))
        scale, offset = _number(device, name, "scale", 1.0), _number(device, name, "offset", 0.0)
        if name == TIMESTAMP:
            scale, offset = 1e-9, 0.0
        found.append(Element(name, int(index), *described, scale, offset))
    return tuple(sorted(found, key=lambda element: element.index))


def choose(elements: Sequence[Element], spec: InputSpec, names: Sequence[str] | None) -> tuple[str, ...]:
    """The element of every channel: ``names``, or those called like the channels, with or without "in_".

    Raises UsageError where one is missing, repeated, or of a kind that is not one number.
    """
    there = {element.name: element for element in elements}
    wanted = list(spec.channels if names is None else names)
    chosen = [name if name in there else f"in_{name}" for name in wanted]
    missing = [name for name, found in zip(wanted, chosen, strict=True) if found not in there]
    if missing or len(chosen) != len(spec.channels) or len(set(chosen)) != len(chosen):
        what = (
            f"no element {missing[0]!r}"
            if missing
            else f"{len(set(chosen))} elements for {len(spec.channels)} channels"
        )
        raise UsageError(
            f"iio: {what}; the model's channels are {', '.join(spec.channels)[:200]}; give one for each of them, "
            f"of {', '.join(there)[:300]}"
        )
    for name in chosen:
        if there[name].repeat > 1:
            raise UsageError(f"iio: element {name}: has {there[name].repeat} parts, expected one number")
    return tuple(chosen)


class IioDecoder(FrameDecoder):
    """Scans of one layout, back to back. ``elements``: the name of each channel's element. ``raw``: as the device's
    converter gives them, neither offset nor scaled."""

    def __init__(self, spec: InputSpec, layout: Layout, elements: Sequence[str], raw: bool = False) -> None:
        super().__init__(spec)
        self._layout = layout
        self._elements = [element for name in elements if (element := layout.element(name)) is not None]
        if len(self._elements) != len(self.channels):
            raise UsageError(f"iio: {len(self._elements)} elements for {len(self.channels)} channels")
        self._scale = np.array([1.0 if raw else element.scale for element in self._elements])
        self._shift = np.array([0.0 if raw else element.offset for element in self._elements])
        self._stamp = layout.element(TIMESTAMP)
        self._tail = b""
        self._offset = 0

    def feed(self, data: bytes) -> Iterator[Frame | Malformed]:
        data = self._tail + data
        size = self._layout.size
        whole = len(data) - len(data) % size
        self._tail = data[whole:]
        self._offset += whole
        scans = np.frombuffer(data, np.uint8, whole).reshape(-1, size)
        values = np.empty((len(scans), len(self._elements)))
        for i, element in enumerate(self._elements):
            values[:, i] = self._layout.values(scans, element)
        with np.errstate(invalid="ignore", over="ignore"):
            values += self._shift
            values *= self._scale
        if self._stamp is None:
            for row in values:
                yield Frame(row)
            return
        for row, nanoseconds in zip(values, self._layout.values(scans, self._stamp).tolist(), strict=True):
            yield Frame(row, nanoseconds / 1e9)

    def finish(self) -> Iterator[Frame | Malformed]:
        if self._tail:
            yield Malformed(
                f"byte {self._offset}", f"{len(self._tail)} bytes at the end, a scan has {self._layout.size}"
            )
            self._offset += len(self._tail)
            self._tail = b""
