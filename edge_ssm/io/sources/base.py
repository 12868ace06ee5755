"""The interface of sources: bytes as they arrive, discontinuities, and silence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge_ssm.io.shutdown import ShutdownSignal
from edge_ssm.model.network import InputSpec

if TYPE_CHECKING:
    from edge_ssm.io.codecs.base import FrameDecoder


MAX_BATCH = 1 << 16
"""Bytes of the largest ``Batch``."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The bytes of one read."""

    content: bytes
    token: Any = None
    """Argument for ``Source.acknowledge``, if the sender keeps what is not acknowledged (MQTT)."""


@dataclass(frozen=True, slots=True)
class Discontinuity:
    """A point at which the stream does not continue: a connection was lost or made. Decoders start again."""

    reason: str
    """What happened, in words."""
    connected: bool
    """True if there is a connection now."""


@dataclass(frozen=True)
class SourceOptions:
    """What a source needs to know beside its endpoint."""

    spec: InputSpec
    """The model's input."""
    follow: bool = False
    """True to read past the end of a file, as it grows."""
    is_paced: bool = False
    """True if a recording is played back slowly."""


class Source(ABC):
    """Where bytes come from.

    One thread owns a source. A source that has threads of its own hands its items over through a ``Mailbox``.
    """

    name: str
    """Name for messages: stdin, a path, an address."""
    live: bool = True
    """True if samples arrive as they are measured, so that a late decision is a miss; false for a file."""
    datagrams: bool = False
    """True if each ``Batch`` consists of complete frames (UDP, MQTT), so that the next one completes nothing."""
    decoder: FrameDecoder | None = None
    """The source's own decoder, if the source knows the meaning of its bytes (IIO)."""
    reorder: int = 4096
    """Samples that a sequence number may lie behind the last one and still belong to the same count.

    A number further back means that the sender started again. 2^20 or more for a sender that repeats what was not
    acknowledged.
    """
    reorder_wait_s: float = 0.0
    """Seconds for which a sample is held back when its number is ahead, so that the earlier ones can still arrive."""
    in_flight: int = 0
    """Messages that have arrived and are not acknowledged yet."""
    most_in_flight: int = 1 << 30
    """Number of such messages that calls for a snapshot ahead of time, since the sender stops at some number."""
    unread: int = 0
    """Datagrams that the system dropped because they were not read in time."""
    ended: bool = False
    """True if nothing more will arrive."""

    @abstractmethod
    def read(self, stop: ShutdownSignal, seconds: float | None) -> Batch | Discontinuity | None:
        """Return what has arrived, waiting at most ``seconds`` (None: for ever).

        Return None if nothing arrived, a shutdown was requested, or the source has ended. Lost connections are
        restored here, with back-off. Raises RunFailed if going on makes no sense.
        """

    def acknowledge(self, token: Any) -> None:  # noqa: B027  most senders keep nothing
        """Tell the sender that it need not repeat the ``Batch`` with this token, nor any before it."""

    def position(self) -> dict[str, int]:
        """Return where the next ``Batch`` begins, for ``seek`` after a restart; empty if the source cannot go back."""
        return {}

    def seek(self, position: dict[str, int]) -> bool:
        """Go to a ``position`` of an earlier run. Return False if it no longer exists."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Release everything that is open."""
