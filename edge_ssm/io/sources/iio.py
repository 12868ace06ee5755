"""Buffered capture from a Linux IIO device (``iio://NAME``): the kernel samples by its own clock (docs/iio.md).

Not tested on a real device yet: the tests check it against the layouts of the kernel's documentation, on a tree of
files.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_ssm.errors import RunFailed, UsageError
from edge_ssm.io.address import Endpoint
from edge_ssm.io.backoff import Backoff
from edge_ssm.io.codecs.iio import TIMESTAMP, IioDecoder, Layout, read_attribute, read_elements, select_elements
from edge_ssm.io.sources.base import SourceOptions
from edge_ssm.io.sources.device import DeviceSource
from edge_ssm.model.network import InputSpec

SYSFS = Path("/sys/bus/iio/devices")
DEV = Path("/dev")
OPTIONS = ("elements", "length", "watermark", "trigger", "sampling_frequency", "raw")
"""Options of an ``iio://`` endpoint."""


class IioSource(DeviceSource):
    """Reads the scans of one device; its ``decoder`` turns them into frames.

    Setting a device up needs permission to write its sysfs files (root, or a udev rule).

    Parameters
    ----------
    device
        iio:device0, /dev/iio:device0, or the content of the device's ``name`` file.
    elements
        Scan element of each channel of the model; by default the elements named like the channels.
    length
        Scans that the kernel keeps while this process is busy.
    watermark
        Scans that the kernel collects before it wakes this process.
    trigger
        Name of the trigger, for a device without a clock of its own.
    sampling_frequency
        Hertz, for a device whose frequency can be set.
    raw
        Deliver the converter's own numbers, without offset and scale.
    backoff, sysfs, dev
        For tests: waits between attempts, and the folders of the devices' files and nodes.

    Raises UsageError for a device that is missing or lacks what the model needs.
    """

    def __init__(
        self,
        device: str,
        spec: InputSpec,
        *,
        elements: Sequence[str] | None = None,
        length: int = 1024,
        watermark: int | None = None,
        trigger: str | None = None,
        sampling_frequency: float | None = None,
        raw: bool = False,
        backoff: Backoff | None = None,
        sysfs: Path = SYSFS,
        dev: Path = DEV,
    ) -> None:
        super().__init__(device, backoff)
        if length < 1 or (watermark is not None and not 0 < watermark <= length):
            raise UsageError(f"{device}: length {length}, watermark {watermark}: expected 1 <= watermark <= length")
        self._sysfs, self._dev = sysfs, dev
        self._locate()
        self._elements = read_elements(self._device, self._scan)
        self._selected = select_elements(self._elements, spec, elements)
        self._length, self._watermark, self._trigger = length, watermark, trigger
        self._frequency = sampling_frequency
        try:
            self._layout = self._set_up()
        except OSError as error:
            raise UsageError(f"{device}: cannot be set up ({error.strerror})") from None
        self.decoder = IioDecoder(spec, self._layout, self._selected, raw)

    def _locate(self) -> None:
        """Find the device's folders: a device that returns may have another number, so it is looked up by name."""
        self._device = _find(self.name, self._sysfs)
        # Since Linux 5.11 a device may have several buffers; the old names stay for the first.
        self._buffer = self._folder("buffer", "buffer0")
        self._scan = self._folder("scan_elements", "buffer0")

    def _folder(self, *names: str) -> Path:
        folder = next((self._device / name for name in names if (self._device / name).is_dir()), None)
        if folder is None:
            raise UsageError(f"{self.name}: {self._device} has no {names[0]}; the device has no buffered capture")
        return folder

    def _set_up(self) -> Layout:
        """Set elements and buffer, which has to be off meanwhile, and return the layout of scans. Raises OSError."""
        _write(self._buffer / "enable", 0)
        if self._trigger is not None:
            _write(self._device / "trigger" / "current_trigger", self._trigger)
        if self._frequency is not None:
            _write(self._device / "sampling_frequency", f"{self._frequency:g}")
        for element in self._elements:
            _write(self._scan / f"{element.name}_en", int(element.name in (*self._selected, TIMESTAMP)))
        _write(self._buffer / "length", self._length)
        if self._watermark is not None:
            _write(self._buffer / "watermark", self._watermark)
        # A driver may be unable to disable an element: what counts is what it reports now.
        enabled = tuple(e for e in self._elements if read_attribute(self._scan / f"{e.name}_en") not in ("", "0"))
        disabled = set(self._selected) - {element.name for element in enabled}
        if disabled:
            raise UsageError(f"{self.name}: the driver does not enable {', '.join(sorted(disabled))} in the buffer")
        return Layout(enabled)

    def _open(self) -> int:
        try:
            self._locate()
            if read_elements(self._device, self._scan) != self._elements or self._set_up() != self._layout:
                raise RunFailed(f"{self.name}: the device came back with other elements; start the run again")
        except UsageError as error:  # The sysfs files vanished with the device.
            raise OSError(0, str(error)) from None
        fd = os.open(self._dev / self._device.name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _write(self._buffer / "enable", 1)
        except OSError:
            os.close(fd)
            raise
        return fd

    def _close(self, fd: int) -> None:
        with contextlib.suppress(OSError):  # the device may be gone
            _write(self._buffer / "enable", 0)
        os.close(fd)


def _find(device: str, sysfs: Path) -> Path:
    """Return the sysfs folder of a device. Raises UsageError."""
    name = device.removeprefix("/dev/")
    if re.fullmatch(r"iio:device\d+", name) and (sysfs / name).is_dir():
        return sysfs / name
    names = {
        path: read_attribute(path / "name") for path in sorted(sysfs.glob("iio:device*")) if (path / "name").exists()
    }
    matches = [path for path, text in names.items() if text == device]
    if len(matches) == 1:
        return matches[0]
    available = ", ".join(f"{path.name} ({text})" for path, text in names.items()) or "none"
    problem = f"{len(matches)} devices have this name" if matches else "no such IIO device"
    raise UsageError(f"{device[:80]}: {problem}; available: {available[:300]}")


def _write(path: Path, value: object) -> None:
    """Write a sysfs file. Raises OSError whose text names the file."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        try:
            os.write(fd, str(value).encode())
        finally:
            os.close(fd)
    except OSError as error:
        hint = "; grant it to this user with a udev rule" if isinstance(error, PermissionError) else ""
        raise OSError(error.errno, f"{path}: {value} cannot be written: {error.strerror}{hint}") from None


def open_endpoint(endpoint: Endpoint, options: SourceOptions) -> IioSource:
    """Open the device of ``iio://NAME?OPTIONS`` or ``iio:///dev/iio:device0``. Raises UsageError."""
    return IioSource(endpoint.host or endpoint.path, options.spec, **_device_options(endpoint))


def validate_endpoint(endpoint: Endpoint) -> None:
    """Raise UsageError for an option that is unknown or not valid, or an address without a device."""
    _device_options(endpoint)


def _device_options(endpoint: Endpoint) -> dict[str, Any]:
    """Return the arguments of IioSource that the address states."""
    values = endpoint.known_options(*OPTIONS)
    if not endpoint.host and len(endpoint.path) < 2:
        raise UsageError(f"{endpoint.redacted}: expected iio://NAME or iio:///dev/iio:device0")
    frequency = values.get("sampling_frequency")
    try:
        hertz = None if frequency is None else float(frequency)
    except ValueError:
        raise UsageError(f"{endpoint.redacted}: sampling_frequency {frequency!r}, expected hertz") from None
    return {
        "elements": values["elements"].split(",") if "elements" in values else None,
        "length": endpoint.positive_int("length", 1024),
        "watermark": endpoint.positive_int("watermark", 1) if "watermark" in values else None,
        "trigger": values.get("trigger"),
        "sampling_frequency": hertz,
        "raw": "raw" in values,
    }
