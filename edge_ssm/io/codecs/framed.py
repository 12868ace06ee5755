"""The codec ``framed``: samples with sequence number, time stamp and checksum, for serial lines and datagrams.

docs/framing.md is its specification. A frame is packed little-endian, followed by its CRC-32, freed of zero bytes by
COBS (Cheshire and Baker, "Consistent overhead byte stuffing", 1999), and delimited by zero bytes. A zero byte therefore
always is a boundary, and garbage costs only the frames that it touches.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from edge_ssm.errors import UsageError
from edge_ssm.io.codecs.base import Codec, FrameDecoder, channel_scale
from edge_ssm.io.messages import Frame, Malformed
from edge_ssm.model.network import InputSpec

VERSION = 1
TIMED, INT16 = 1, 2
"""Bits of the flags; the others are 0 in version 1."""
MAX_PACKET = 1 << 16
"""Bytes of the longest frame after COBS, without its delimiters."""
_HEADER = struct.Struct("<BBHHHI")  # version, flags, channels, samples, boot, sequence
_TIME = struct.Struct("<IQ")  # period in nanoseconds, time in microseconds
_CRC = struct.Struct("<I")
_COUNT_BITS, _BOOT_BITS = 44, 16
_MAX_BACKWARD = 1 << 20
"""Samples. A number further back than this means a restart of the device, not a repetition."""


def cobs_encode(content: bytes) -> bytes:
    """Return the content without zero bytes, one byte longer for each 254 bytes begun."""
    out = bytearray()
    *blocks, last = content.split(b"\0")
    for block in blocks:
        while len(block) >= 254:
            out += b"\xff" + block[:254]
            block = block[254:]
        out.append(len(block) + 1)
        out += block
    has_full_block = False
    while len(last) >= 254:
        out += b"\xff" + last[:254]
        last, has_full_block = last[254:], True
    if last or not has_full_block:
        out.append(len(last) + 1)
        out += last
    return bytes(out)


def cobs_decode(packet: bytes) -> bytes | None:
    """Return the content of a packet of ``cobs_encode``; None if it is no such packet."""
    content = bytearray(packet)  # Each code byte is replaced by the zero it stands for, in place.
    end, at, surplus = len(content), 0, []
    try:
        while at < end:
            code = content[at]
            content[at] = 0
            if code == 255:
                surplus.append(at + 255)  # No zero follows a full block: the next code byte stands for none.
            at += code or end + 1
    except IndexError:
        return None
    if at != end:
        return None
    for position in reversed(surplus):
        del content[position : position + 1]
    return bytes(content[1:])


def encode(
    values: Any,
    sequence: int,
    boot: int = 0,
    time_us: int | None = None,
    period_ns: int = 0,
    int16: bool = False,
) -> bytes:
    """Return one frame, including its delimiters.

    Parameters
    ----------
    values
        Shape (samples, channels), or (channels,) for one sample; whole numbers for ``int16``.
    sequence
        Number of the first sample, taken modulo 2^32.
    boot
        A number that differs after each start of the device, 16 bits.
    time_us
        Time of the first sample in microseconds.
    period_ns
        Nanoseconds from sample to sample, 0 if unknown.
    int16
        Send 16-bit integers instead of float32.

    Raises UsageError for a value that does not fit its field.
    """
    rows = np.atleast_2d(np.asarray(values))
    if int16 and not (np.isfinite(rows).all() and (rows == np.clip(np.rint(rows), -32768, 32767)).all()):
        raise UsageError("framed: values: expected whole numbers from -32768 to 32767 for int16")
    samples, channels = rows.shape
    flags = (TIMED if time_us is not None else 0) | (INT16 if int16 else 0)
    try:
        head = _HEADER.pack(VERSION, flags, channels, samples, boot, sequence % (1 << 32))
        if time_us is not None:
            head += _TIME.pack(period_ns, time_us)
    except struct.error as error:
        raise UsageError(f"framed: a field is out of range ({error})") from None
    with np.errstate(over="ignore"):
        content = head + rows.astype("<i2" if int16 else "<f4").tobytes()
    packet = cobs_encode(content + _CRC.pack(zlib.crc32(content)))
    if not rows.size or len(packet) > MAX_PACKET:
        raise UsageError(f"framed: {samples} samples of {channels} channels; expected 1 to about 64 KiB in a frame")
    return b"\0" + packet + b"\0"


class FramedDecoder(FrameDecoder):
    """Decodes frames between zero bytes. ``scale`` applies to int16 values: one factor or one per channel.

    ``Frame.sequence`` grows with every sample and with every start of the device. Its low 44 bits are the device's
    number with the wraps undone, the next 16 bits the device's boot number, and the bits above them count the starts
    that the boot number alone does not put in order.
    """

    def __init__(self, spec: InputSpec, scale: Sequence[float] = (1.0,)) -> None:
        super().__init__(spec)
        self._scale = channel_scale(spec, scale)
        self._is_unscaled = bool((self._scale == 1).all())
        self._tail = b""
        self._offset = 0  # position of the tail's first byte in the stream
        self._is_discarding = False
        self._newest: int | None = None

    def restart(self) -> Iterator[Frame | Malformed]:
        """Start again after a discontinuity; the checksum says whether the last frame before it is complete."""
        yield from self.finish()

    @property
    def pending(self) -> int:
        """Bytes of the unfinished frame."""
        return len(self._tail)

    def state(self) -> dict[str, Any]:
        """Return the newest sequence number, as text since readers of JSON differ beyond 64 bits."""
        return {} if self._newest is None else {"newest": str(self._newest)}

    def resume(self, state: dict[str, Any]) -> None:
        """Take the newest sequence number from another decoder's ``state``."""
        newest = state.get("newest")
        if isinstance(newest, str) and newest.isascii() and newest.isdigit() and len(newest) < 40:
            self._newest = int(newest)

    def feed(self, data: bytes) -> Iterator[Frame | Malformed]:
        """Yield the samples of the frames that ``data`` completes."""
        packets = (self._tail + data).split(b"\0")
        self._tail = packets.pop()
        for packet in packets:
            offset = self._offset
            self._offset += len(packet) + 1
            if self._is_discarding:
                self._is_discarding = False
            elif packet:
                yield from self._decode_packet(packet, offset)
        if len(self._tail) > MAX_PACKET:
            if not self._is_discarding:
                self._is_discarding = True
                yield self._too_long(self._offset)
            self._offset += len(self._tail)
            self._tail = b""

    def finish(self) -> Iterator[Frame | Malformed]:
        """Yield the last frame, which may lack its delimiter: the checksum says whether it is complete."""
        packet, self._tail, offset = self._tail, b"", self._offset
        self._offset += len(packet)
        if packet and not self._is_discarding:
            yield from self._decode_packet(packet, offset)
        self._is_discarding = False

    def _too_long(self, offset: int) -> Malformed:
        return Malformed(f"byte {offset}", f"length: no zero byte within {MAX_PACKET} bytes")

    def _decode_packet(self, packet: bytes, offset: int) -> Iterator[Frame | Malformed]:
        if len(packet) > MAX_PACKET:
            yield self._too_long(offset)
            return
        content = cobs_decode(packet)
        problem = self._problem(content)
        if content is None or problem:
            yield Malformed(f"byte {offset}", f"{problem} ({len(packet)} bytes left out)")
            return
        _, flags, channels, samples, boot, number = _HEADER.unpack_from(content)
        at, period, time = _HEADER.size, 0, None
        if flags & TIMED:
            period, time = _TIME.unpack_from(content, at)
            at += _TIME.size
        raw = np.frombuffer(content, "<i2" if flags & INT16 else "<f4", samples * channels, at)
        with np.errstate(invalid="ignore", over="ignore"):
            values = raw.reshape(samples, channels).astype(np.float64)
            if flags & INT16 and not self._is_unscaled:
                values *= self._scale
        sequence = self._unwrap(boot, number)
        self._newest = max(sequence + samples - 1, -1 if self._newest is None else self._newest)
        if time is None:
            for row in values:
                yield Frame(row, None, None, sequence)
                sequence += 1
            return
        seconds, step = time / 1e6, period / 1e9
        for k, row in enumerate(values):
            yield Frame(row, seconds + k * step if step or not k else None, None, sequence + k)

    def _problem(self, content: bytes | None) -> str:
        """Return why the content is no frame; "" if it is one.

        The checksum is checked first: without it no field can be trusted.
        """
        if content is None:
            return "length: cut short or joined with garbage"
        size = len(content) - _CRC.size
        if size < _HEADER.size:
            return f"length: {len(content)} bytes, a frame has at least {_HEADER.size + _CRC.size}"
        if zlib.crc32(memoryview(content)[:size]) != _CRC.unpack_from(content, size)[0]:
            return "checksum: does not match"
        version, flags, channels, samples, _, _ = _HEADER.unpack_from(content)
        if version != VERSION:
            return f"version: {version}, expected {VERSION}"
        if flags & ~(TIMED | INT16):
            return f"flags: {flags:#x}, expected none but 1 (time) and 2 (int16)"
        if channels != len(self.channels):
            return f"channel count: {channels}, expected {len(self.channels)} ({', '.join(self.channels)[:80]})"
        body = samples * channels * (2 if flags & INT16 else 4) + (_TIME.size if flags & TIMED else 0)
        if not samples or size != _HEADER.size + body:
            return f"length: {len(content)} bytes, {samples} samples make {_HEADER.size + body + _CRC.size}"
        return ""

    def _unwrap(self, boot: int, number: int) -> int:
        """Return the number with its wraps undone: the one nearest to the newest number of this start."""
        if self._newest is None:
            return boot << _COUNT_BITS | number
        start, count = self._newest >> _COUNT_BITS, self._newest & ((1 << _COUNT_BITS) - 1)
        if start & ((1 << _BOOT_BITS) - 1) == boot:
            ahead = (number - count + (1 << 31)) % (1 << 32) - (1 << 31)
            if ahead >= -_MAX_BACKWARD and count + ahead >= 0:
                return self._newest + ahead
            start += 1 << _BOOT_BITS  # a device without a boot number
        else:
            newer = (start >> _BOOT_BITS) << _BOOT_BITS | boot
            start = newer if newer > start else newer + (1 << _BOOT_BITS)
        return start << _COUNT_BITS | number


CODEC = Codec("framed", FramedDecoder, (".framed",), is_scaled=True)
