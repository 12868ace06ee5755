"""What every source is: bytes as they come, seams where they do not join, and silence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge_ssm.io.shutdown import ShutdownSignal

if TYPE_CHECKING:
    from edge_ssm.io.codecs.base import FrameDecoder


BLOCK = 1 << 16
"""Most bytes of one ``Data``."""


@dataclass(frozen=True, slots=True)
class Batch:
    content: bytes
    token: Any = None
    """What ``Source.acknowledge`` takes, where the sender keeps what was not acknowledged (MQTT)."""


@dataclass(frozen=True, slots=True)
class Discontinuity:
    """What follows does not continue what came before: a connection was lost or made anew. A decoder begins again."""

    reason: str
    connected: bool
    """Whether there is a connection now."""


class Source(ABC):
    """Where bytes come from. Owned by one thread; a source that has threads of its own hands over through a
    ``Mailbox``."""

    name: str
    """For messages: stdin, a path, an address."""
    live: bool = True
    """Samples come as they are taken: a late decision is a miss. A file's do not."""
    datagrams: bool = False
    """Each ``Data`` holds whole frames (UDP, MQTT): what is unfinished at its end will not be completed."""
    decoder: FrameDecoder | None = None
    """Of its own, where the source knows what its bytes mean (IIO)."""
    reorder: int = 4096
    """How far a sample's sequence number may lie behind the last one's and still be of the same count, not of a sender
    that counts anew; 2^20 or more where what was not acknowledged is sent again."""
    reorder_wait_s: float = 0.0
    """How long a sample that is ahead of its number is held back for those before it."""
    in_flight: int = 0
    """Messages that came and were not acknowledged yet."""
    most_in_flight: int = 1 << 30
    """So many of them call for a snapshot before its time: the sender stops at some number."""
    unread: int = 0
    """Datagrams that the system threw away since nobody read them in time."""
    ended: bool = False
    """Nothing will come any more."""

    @abstractmethod
    def read(self, stop: ShutdownSignal, seconds: float | None) -> Batch | Discontinuity | None:
        """What is there, waiting for it ``seconds`` at most (None: for ever). None: nothing came, or a stop was asked
        for, or ``ended``. Connections that are lost are made anew in here, with back-off.

        Raises RunFailed where going on makes no sense.
        """

    def acknowledge(self, token: Any) -> None:  # noqa: B027  a sender that keeps nothing needs no answer
        """The samples of the ``Data`` with this token, and of all before it, will not be asked for again."""

    def position(self) -> dict[str, int]:
        """Where the next ``Data`` begins, for ``seek`` after a restart; empty where a source can't go back."""
        return {}

    def seek(self, position: dict[str, int]) -> bool:
        """Go to a ``position`` of an earlier run. False: that place is not there any more."""
        return False

    @abstractmethod
    def close(self) -> None: ...
