"""The binary codecs f32le and i16le."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from edge_ssm.io.codecs.base import FrameDecoder, channel_scale
from edge_ssm.io.messages import Frame, Malformed
from edge_ssm.model.network import InputSpec


class BinaryDecoder(FrameDecoder):
    """Frames of d_input numbers, back to back, little-endian: float32 as they are, int16 times a scale a channel."""

    dtypes: ClassVar[dict[str, str]] = {"f32le": "<f4", "i16le": "<i2"}

    def __init__(self, spec: InputSpec, codec: str, scale: Sequence[float] = (1.0,)) -> None:
        super().__init__(spec)
        self._dtype = np.dtype(self.dtypes[codec])
        self._scale = channel_scale(spec, scale)
        self._scaled = bool((self._scale != 1).any())
        self._size = self._dtype.itemsize * len(self.channels)
        self._tail = b""
        self._offset = 0

    def feed(self, data: bytes) -> Iterator[Frame | Malformed]:
        data = self._tail + data
        whole = len(data) - len(data) % self._size
        self._tail = data[whole:]
        self._offset += whole
        rows = np.frombuffer(data[:whole], dtype=self._dtype).reshape(-1, len(self.channels))
        with np.errstate(invalid="ignore", over="ignore"):
            values = rows.astype(np.float64)
            if self._scaled:
                values *= self._scale
        for row in values:
            yield Frame(row)

    @property
    def pending(self) -> int:
        return len(self._tail)

    def finish(self) -> Iterator[Frame | Malformed]:
        if self._tail:
            yield Malformed(f"byte {self._offset}", f"{len(self._tail)} bytes at the end, a frame has {self._size}")
            self._tail = b""
