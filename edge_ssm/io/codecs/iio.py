"""The layout of samples in the buffer of a Linux IIO device, read from its sysfs files, and a decoder for it.

Source: Documentation/iio/iio_devbuf.rst and Documentation/ABI/testing/sysfs-bus-iio of the Linux kernel. A scan holds
the enabled elements in order of index, each at a multiple of its own size, and is padded to a multiple of its largest
element (since Linux 5.5).

This codec is not in the registry: only the device knows the layout of its bytes, so ``sources.iio`` creates it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_ssm import files
from edge_ssm.errors import UsageError
from edge_ssm.io.codecs.base import FrameDecoder
from edge_ssm.io.messages import Frame, Malformed
from edge_ssm.model.network import Array, InputSpec

TIMESTAMP = "in_timestamp"
MAX_ATTRIBUTE_BYTES = 1 << 16
_TYPE = re.compile(r"(be|le):([sfu])(\d{1,3})/(\d{1,3})(?:X(\d{1,3}))?(?:>>(\d{1,3}))?")


@dataclass(frozen=True)
class Element:
    """One scan element (a channel of the device), as its sysfs files describe it."""

    name: str
    """For example in_accel_x."""
    index: int
    big_endian: bool
    kind: str
    """"s": two's complement; "u": unsigned; "f": IEEE 754."""
    bits: int
    storage: int
    """Bits that one of its ``repeat`` values occupies in the buffer."""
    repeat: int = 1
    shift: int = 0
    scale: float = 1.0
    offset: float = 0.0
    """value = (raw + offset) * scale, in the unit that the kernel's ABI defines for this kind of channel."""

    @property
    def size(self) -> int:
        """Bytes in the buffer."""
        return self.storage // 8 * self.repeat


@dataclass(frozen=True)
class Layout:
    """The enabled elements, in the order of the buffer."""

    elements: tuple[Element, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        """Bytes from the start of a scan to each element."""
        offsets, end = [], 0
        for element in self.elements:
            end += -end % element.size
            offsets.append(end)
            end += element.size
        return tuple(offsets)

    @property
    def size(self) -> int:
        """Bytes of one scan."""
        end = self.offsets[-1] + self.elements[-1].size
        return end + -end % max(element.size for element in self.elements)

    def element(self, name: str) -> Element | None:
        """Return the element of this name, if there is one."""
        return next((element for element in self.elements if element.name == name), None)

    def values(self, scans: Array, element: Element) -> Array:
        """Return the raw values of one element: shape (n,), int64, uint64 or float64, without offset and scale.

        ``scans`` has shape (n, size), uint8.
        """
        at = self.offsets[self.elements.index(element)]
        order = ">" if element.big_endian else "<"
        code = "f" if element.kind == "f" else "u"
        part = np.ascontiguousarray(scans[:, at : at + element.storage // 8])
        raw = part.view(f"{order}{code}{element.storage // 8}")[:, 0]
        if element.kind == "f":
            with np.errstate(invalid="ignore"):  # A signalling NaN is a missing value like any other.
                return raw.astype(np.float64)
        spare = np.uint64(64 - element.bits)
        # Shifting to the left end and back masks the neighbouring bits and extends the sign.
        left = (raw.astype(np.uint64) >> np.uint64(element.shift)) << spare
        if element.kind == "u":
            return np.asarray(left >> spare)
        return np.asarray(left.view(np.int64) >> np.int64(spare))


def read_attribute(path: Path) -> str:
    """Return the text of a sysfs file. Raises UsageError if it cannot be read."""
    return files.read_regular_file(path, MAX_ATTRIBUTE_BYTES, error=UsageError).decode(errors="replace").strip()


def parse_type(name: str, text: str) -> tuple[bool, str, int, int, int, int]:
    """Parse a type such as ``le:s12/16>>4`` into big_endian, kind, bits, storage, repeat and shift.

    Raises UsageError.
    """
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


def _read_number(device: Path, name: str, what: str, default: float) -> float:
    """Return in_accel_x_scale, or else in_accel_scale, which all channels of that kind share."""
    shared = "in_" + re.sub(r"\d+", "", name.removeprefix("in_").split("_")[0])
    for base in (name, shared):
        path = device / f"{base}_{what}"
        if path.exists():
            text = read_attribute(path)
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                raise UsageError(f"{path}: {text[:40]!r}: expected a number")
            return value
    return default


def read_elements(device: Path, folder: Path) -> tuple[Element, ...]:
    """Return all elements of a device by index; ``folder`` is its scan_elements. Raises UsageError."""
    elements = []
    try:
        attributes = sorted(os.listdir(folder))
    except OSError as error:
        raise UsageError(f"{folder}: {files.read_problem(error)}") from None
    for name in (attribute.removesuffix("_type") for attribute in attributes if attribute.endswith("_type")):
        index = read_attribute(folder / f"{name}_index")
        if not re.fullmatch(r"\d{1,9}", index):
            raise UsageError(f"{folder}/{name}_index: {index[:40]!r}: expected a number")
        description = parse_type(name, read_attribute(folder / f"{name}_type"))
        scale, offset = _read_number(device, name, "scale", 1.0), _read_number(device, name, "offset", 0.0)
        if name == TIMESTAMP:
            scale, offset = 1e-9, 0.0
        elements.append(Element(name, int(index), *description, scale, offset))
    return tuple(sorted(elements, key=lambda element: element.index))


def select_elements(elements: Sequence[Element], spec: InputSpec, names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the name of each channel's element: ``names``, or the channels' own names, with or without "in_".

    Raises UsageError if an element is missing, repeated, or not a single number.
    """
    by_name = {element.name: element for element in elements}
    requested = list(spec.channels if names is None else names)
    selected = [name if name in by_name else f"in_{name}" for name in requested]
    missing = [name for name, element in zip(requested, selected, strict=True) if element not in by_name]
    if missing or len(selected) != len(spec.channels) or len(set(selected)) != len(selected):
        problem = (
            f"no element {missing[0]!r}"
            if missing
            else f"{len(set(selected))} elements for {len(spec.channels)} channels"
        )
        raise UsageError(
            f"iio: {problem}; the model's channels are {', '.join(spec.channels)[:200]}; give one for each of them, "
            f"of {', '.join(by_name)[:300]}"
        )
    for name in selected:
        if by_name[name].repeat > 1:
            raise UsageError(f"iio: element {name}: has {by_name[name].repeat} parts, expected one number")
    return tuple(selected)


class IioDecoder(FrameDecoder):
    """Decodes scans of one layout, back to back.

    ``elements`` names the element of each channel. With ``raw`` the values are the device's own numbers, without offset
    and scale.
    """

    def __init__(self, spec: InputSpec, layout: Layout, elements: Sequence[str], raw: bool = False) -> None:
        super().__init__(spec)
        self._layout = layout
        self._elements = [element for name in elements if (element := layout.element(name)) is not None]
        if len(self._elements) != len(self.channels):
            raise UsageError(f"iio: {len(self._elements)} elements for {len(self.channels)} channels")
        self._scale = np.array([1.0 if raw else element.scale for element in self._elements])
        self._addend = np.array([0.0 if raw else element.offset for element in self._elements])
        self._timestamp = layout.element(TIMESTAMP)
        self._tail = b""
        self._offset = 0

    def feed(self, data: bytes) -> Iterator[Frame | Malformed]:
        """Yield the frames of the scans that ``data`` completes."""
        data = self._tail + data
        size = self._layout.size
        complete = len(data) - len(data) % size
        self._tail = data[complete:]
        self._offset += complete
        scans = np.frombuffer(data, np.uint8, complete).reshape(-1, size)
        values = np.empty((len(scans), len(self._elements)))
        for i, element in enumerate(self._elements):
            values[:, i] = self._layout.values(scans, element)
        with np.errstate(invalid="ignore", over="ignore"):
            values += self._addend
            values *= self._scale
        if self._timestamp is None:
            for row in values:
                yield Frame(row)
            return
        for row, nanoseconds in zip(values, self._layout.values(scans, self._timestamp).tolist(), strict=True):
            yield Frame(row, nanoseconds / 1e9)

    def finish(self) -> Iterator[Frame | Malformed]:
        """Report an incomplete scan at the end."""
        if self._tail:
            yield Malformed(
                f"byte {self._offset}", f"{len(self._tail)} bytes at the end, a scan has {self._layout.size}"
            )
            self._offset += len(self._tail)
            self._tail = b""
