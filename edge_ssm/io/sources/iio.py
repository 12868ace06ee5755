"""Buffered capture from a Linux IIO device: the kernel samples at its own clock, we read scans (docs/iio.md).

Not yet run on a real device: the tests hold it to the layouts of the kernel's documentation, on a tree of files.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from edge_ssm.errors import RunFailed, UsageError
from edge_ssm.io.backoff import Backoff
from edge_ssm.io.codecs.iio import TIMESTAMP, IioDecoder, Layout, choose, read_elements, read_text
from edge_ssm.io.sources.device import DeviceSource
from edge_ssm.model.network import InputSpec

SYSFS = Path("/sys/bus/iio/devices")
DEV = Path("/dev")


class IioSource(DeviceSource):
    """Scans of one device. ``decoder`` makes frames of them; it is made here, since the device says what they hold.

    device: iio:device0, /dev/iio:device0, or what its ``name`` file says. elements: the scan element of each channel of
    the model; by default those called like the channels. length: scans that the kernel keeps while we are busy.
    watermark: scans that the kernel gathers before it wakes us. trigger: name of the trigger, for devices without a
    clock of their own. sampling_frequency: hertz, where the device can be set. raw: values as the converter gives them.

    Setting a device up needs the right to write its sysfs files (root, or a udev rule).
    Raises UsageError for a device that is not there, or does not have what the model needs.
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
        back_off: Backoff | None = None,
        sysfs: Path = SYSFS,
        dev: Path = DEV,
    ) -> None:
        super().__init__(device, back_off)
        if length < 1 or (watermark is not None and not 0 < watermark <= length):
            raise UsageError(f"{device}: length {length}, watermark {watermark}: expected 1 <= watermark <= length")
        self._sysfs, self._dev = sysfs, dev
        self._locate()
        self._elements = read_elements(self._device, self._scan)
        self._chosen = choose(self._elements, spec, elements)
        self._length, self._watermark, self._trigger = length, watermark, trigger
        self._frequency = sampling_frequency
        try:
            self._layout = self._set_up()
        except OSError as error:
            raise UsageError(f"{device}: can't be set up ({error.strerror})") from None
        self.decoder = IioDecoder(spec, self._layout, self._chosen, raw)

    def _locate(self) -> None:
        """A device that was away may come back under another number: one that is given by name is looked for."""
        self._device = _find(self.name, self._sysfs)
        # Since Linux 5.11 a device may have several buffers; the old names stay for the first.
        self._buffer = self._folder("buffer", "buffer0")
        self._scan = self._folder("scan_elements", "buffer0")

    def _folder(self, *names: str) -> Path:
        found = next((self._device / name for name in names if (self._device / name).is_dir()), None)
        if found is None:
            raise UsageError(f"{self.name}: {self._device} has no {names[0]}; the device has no buffered capture")
        return found

    def _set_up(self) -> Layout:
        """Choose elements and buffer, all while the buffer is off; says how scans then lie. Raises OSError."""
        _write(self._buffer / "enable", 0)
        if self._trigger is not None:
            _write(self._device / "trigger" / "current_trigger", self._trigger)
        if self._frequency is not None:
            _write(self._device / "sampling_frequency", f"{self._frequency:g}")
        for element in self._elements:
            _write(self._scan / f"{element.name}_en", int(element.name in (*self._chosen, TIMESTAMP)))
        _write(self._buffer / "length", self._length)
        if self._watermark is not None:
            _write(self._buffer / "watermark", self._watermark)
        # A driver may not be able to leave one out: what counts is what it says now.
        enabled = tuple(e for e in self._elements if read_text(self._scan / f"{e.name}_en") not in ("", "0"))
        off = set(self._chosen) - {element.name for element in enabled}
        if off:
            raise UsageError(f"{self.name}: the driver does not enable {', '.join(sorted(off))} in the buffer")
        return Layout(enabled)

    def _open(self) -> int:
        try:
            self._locate()
            if read_elements(self._device, self._scan) != self._elements or self._set_up() != self._layout:
                raise RunFailed(f"{self.name}: the device came back with other elements; start the run anew")
        except UsageError as error:  # sysfs files that are gone with the device
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
    """The sysfs folder of a device. Raises UsageError."""
    name = device.removeprefix("/dev/")
    if re.fullmatch(r"iio:device\d+", name) and (sysfs / name).is_dir():
        return sysfs / name
    known = {path: read_text(path / "name") for path in sorted(sysfs.glob("iio:device*")) if (path / "name").exists()}
    found = [path for path, text in known.items() if text == device]
    if len(found) == 1:
        return found[0]
    there = ", ".join(f"{path.name} ({text})" for path, text in known.items()) or "none"
    problem = f"{len(found)} devices have this name" if found else "no such IIO device"
    raise UsageError(f"{device[:80]}: {problem}; there are: {there[:300]}")


def _write(path: Path, value: object) -> None:
    """Raises OSError that names the file."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        try:
            os.write(fd, str(value).encode())
        finally:
            os.close(fd)
    except OSError as error:
        hint = "; give this user the right by a udev rule" if isinstance(error, PermissionError) else ""
        raise OSError(error.errno, f"{path}: {value} can't be written: {error.strerror}{hint}") from None
