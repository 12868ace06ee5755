"""The codecs ``f32le`` and ``i16le``: little-endian numbers back to back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from edge_ssm.io.codecs.base import Codec, FrameDecoder, channel_scale
from edge_ssm.io.messages import Frame, Malformed
from edge_ssm.model.network import InputSpec


class BinaryDecoder(FrameDecoder):
    """Decodes frames of d_input numbers of one NumPy ``dtype``, multiplied by a scale (one factor or one per channel).

    Raises UsageError for a scale that does not fit.
    """

    def __init__(self, spec: InputSpec, dtype: str, scale: Sequence[float] = (1.0,)) -> None:
        super().__init__(spec)
        self._dtype = np.dtype(dtype)
        self._scale = channel_scale(spec, scale)
        self._is_scaled = bool((self._scale != 1).any())
        self._frame_bytes = self._dtype.itemsize * len(self.channels)
        self._tail = b""
        self._offset = 0

    def feed(self, data: bytes) -> Iterator[Frame | Malformed]:
        """Yield the frames that ``data`` completes."""
        data = self._tail + data
        complete = len(data) - len(data) % self._frame_bytes
        self._tail = data[complete:]
        self._offset += complete
        rows = np.frombuffer(data[:complete], dtype=self._dtype).reshape(-1, len(self.channels))
        with np.errstate(invalid="ignore", over="ignore"):
            values = rows.astype(np.float64)
            if self._is_scaled:
                values *= self._scale
        for row in values:
            yield Frame(row)

    @property
    def pending(self) -> int:
        """Bytes of the unfinished frame."""
        return len(self._tail)

    def finish(self) -> Iterator[Frame | Malformed]:
        """Report an incomplete frame at the end."""
        if self._tail:
            yield Malformed(
                f"byte {self._offset}", f"{len(self._tail)} bytes at the end, a frame has {self._frame_bytes}"
            )
            self._tail = b""


F32LE = Codec("f32le", lambda spec, scale: BinaryDecoder(spec, "<f4", scale), (".f32",), is_scaled=True)
I16LE = Codec("i16le", lambda spec, scale: BinaryDecoder(spec, "<i2", scale), (".i16",), is_scaled=True)
