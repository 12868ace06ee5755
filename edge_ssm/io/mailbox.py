"""A bounded queue whose reader waits on a file descriptor.

Threads use it to hand items to the pipeline's thread, which waits for signals and descriptors in one place
(``ShutdownSignal.wait``).
"""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import Generic, TypeVar

from edge_ssm.io.shutdown import ShutdownSignal

Item = TypeVar("Item")


class Mailbox(Generic[Item]):
    """A queue for one reader and any number of writers, which wait while it is full."""

    def __init__(self, size: int) -> None:
        self._items: deque[Item] = deque()
        self._size = size
        self._changed = threading.Condition()
        self._is_closed = False
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)

    def put(self, item: Item) -> bool:
        """Add an item, waiting while the mailbox is full. Return False if it was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or len(self._items) < self._size)
            if self._is_closed:
                return False
            self._items.append(item)
            if len(self._items) == 1:
                os.write(self._writer, b"\0")
            return True

    def get(self, stop: ShutdownSignal, seconds: float | None) -> Item | None:
        """Return the oldest item; None if none came within ``seconds`` or a shutdown was requested."""
        if not self._items:
            stop.wait(self._reader, seconds)
        with self._changed:
            if not self._items:
                return None
            item = self._items.popleft()
            if not self._items:
                os.read(self._reader, 1)
            self._changed.notify()
            return item

    def __len__(self) -> int:
        """Return the number of items that wait."""
        return len(self._items)

    def close(self) -> None:
        """Refuse further items and release waiting writers."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._changed.notify_all()
        os.close(self._reader)
        os.close(self._writer)
