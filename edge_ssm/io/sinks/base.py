"""What takes the lines that a sink has formatted: one ``write`` a decision or event, in order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable


class Sink(ABC):
    """Owned by the loop. ``write`` returns at once or, for a plain file or pipe, when the line is out.

    ``accepted`` counts lines taken, ``acknowledged`` those that were delivered, or dropped and counted:
    a snapshot is written only once all that was decided before it is acknowledged, so that a kill loses no decision.
    """

    name: str
    """For messages: stdout, a path, an address."""
    depth: int = 0
    """Lines that wait."""
    size: int = 0
    """Most lines that may wait; 0: none ever does."""
    accepted: int = 0
    acknowledged: int = 0
    problem: str = ""
    """Why nothing gets out at the moment; empty while it does."""
    heads_files: bool = False
    """Whether ``heading`` is written at the beginning of each file that is new or empty."""
    header: str = ""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dropped: Counter[str] = Counter()
        """Lines that went nowhere, by reason."""
        self.while_waiting: Callable[[], bool] = lambda: True
        """Called again and again while ``write`` waits for a slow reader; False: the run ends, wait no longer."""

    @abstractmethod
    def write(self, text: str) -> None:
        """Take one line, its newline included. Raises OSError (a reader that went away: BrokenPipeError)."""

    def flush(self) -> None:  # noqa: B027  most hold nothing back
        """Let go of what is held back in this process."""

    @abstractmethod
    def close(self) -> None:
        """Settle what can be acknowledged within some seconds."""


class Transport(ABC):
    """What a ``queued.Queued`` outlet feeds from a thread of its own: a connection that can be lost and made anew."""

    name: str
    heads_files: bool = False
    header: str = ""
    """As ``Sink``'s."""
    final: bool = False
    """A reader that went away (BrokenPipeError) never comes back: standard output's."""

    @abstractmethod
    def connect(self) -> None:
        """Raises OSError."""

    @abstractmethod
    def send(self, lines: list[str]) -> None:
        """Deliver all, and return when they are delivered as surely as the medium can tell. Raises OSError; then the
        same lines are sent again, after ``connect``: at least once."""

    @abstractmethod
    def close(self) -> None: ...
