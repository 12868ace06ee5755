"""The interface of sinks, which deliver the lines that a formatter writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable

Waiting = Callable[[], bool]
"""Called repeatedly while ``Sink.write`` waits for a slow reader; returns False to end the wait."""


def keep_waiting() -> bool:
    """Wait without limit."""
    return True


class Sink(ABC):
    """A destination of lines, owned by the pipeline's thread.

    ``accepted`` counts the lines taken, ``acknowledged`` those that were delivered, or dropped and counted. A snapshot
    is written only when every decision before it is acknowledged, so that a kill loses no decision.
    """

    name: str
    """Name for messages: stdout, a path, an address."""
    depth: int = 0
    """Lines that wait."""
    size: int = 0
    """Lines that can wait at most; 0: none ever does."""
    accepted: int = 0
    """Lines taken."""
    acknowledged: int = 0
    """Lines delivered or dropped."""
    problem: str = ""
    """Why nothing is delivered at the moment; empty if all is well."""
    has_file_header: bool = False
    """True if the sink writes the header of ``set_file_header`` at the beginning of each file that is new or empty."""

    def __init__(self, name: str, while_waiting: Waiting = keep_waiting) -> None:
        self.name = name
        self.dropped: Counter[str] = Counter()
        """Lines that were not delivered, by reason."""
        self._while_waiting = while_waiting

    @abstractmethod
    def write(self, text: str) -> None:
        """Take one line, including its newline.

        Returns at once, or for a file or pipe when the line is written. Raises OSError; BrokenPipeError if the reader
        is gone.
        """

    def set_file_header(self, header: str) -> None:  # noqa: B027  only files have one
        """Set the line that begins each new file."""

    def flush(self) -> None:  # noqa: B027  most sinks hold nothing back
        """Write what this process holds back."""

    @abstractmethod
    def close(self) -> None:
        """Deliver what can be delivered within some seconds, and release everything that is open."""


class Transport(ABC):
    """A connection to a destination, used by the thread of a ``QueuedSink``. It can be lost and made again."""

    name: str
    """Name for messages."""
    has_file_header: bool = False
    """As for ``Sink``."""
    is_final: bool = False
    """True if a reader that is gone (BrokenPipeError) never comes back, as for standard output."""

    @abstractmethod
    def connect(self) -> None:
        """Connect, or connect again. Raises OSError."""

    @abstractmethod
    def send(self, lines: list[str]) -> None:
        """Deliver all lines and return when they are delivered, as far as the medium can tell.

        Raises OSError. Then the same lines are sent again after ``connect``: delivery is at least once.
        """

    def set_file_header(self, header: str) -> None:  # noqa: B027  only files have one
        """Set the line that begins each new file."""

    @abstractmethod
    def close(self) -> None:
        """Close the connection; ``connect`` may follow."""
