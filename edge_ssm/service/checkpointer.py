"""When a snapshot is taken, when it may be written, and when the source is told that it may forget.

The order is what a kill can't break: what was decided is out (``Sink.settled``), then the snapshot is on disk, then
the source may forget its samples. A kill before the last step makes some decisions again; none is ever missing. Where
a source keeps nothing (a serial line), there is nothing to wait for, and a snapshot is written as soon as it is taken.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_ssm import files
from edge_ssm.engines.registry import Snapshot
from edge_ssm.errors import SnapshotError, UsageError
from edge_ssm.io.codecs.base import FrameDecoder
from edge_ssm.io.sinks.base import Sink
from edge_ssm.io.sources.base import Source
from edge_ssm.runtime.pipeline import Pipeline
from edge_ssm.service import snapshot as service_snapshot
from edge_ssm.text import sanitize

FILE = "snapshot"
REFUSED = "snapshot.refused"
LOCK = "lock"
EARLY_SHARE, EARLY_S = 0.3, 0.25
"""A snapshot is taken so much before the interval is over (the more of both) that it is written by then."""
FEW_IN_FLIGHT = 8
STALLED_S = 0.15
"""With so many messages unacknowledged and none for so long, the sender may be at a limit that it does not tell."""


def _alone(folder: Path) -> int:
    """A lock on a folder of snapshots, until it is closed or this process ends. Raises UsageError if another has it."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"{folder}: another run keeps its snapshots there; give each its own --state") from None
    except OSError as error:
        raise UsageError(f"{folder}: snapshots can't be kept there ({error.strerror}); see --state") from None
    return descriptor


@dataclass
class _Taken:
    content: bytes | None
    """None: nothing is kept, and only the source waits."""
    mark: int
    token: Any
    at: float


class Checkpointer:
    """``folder`` None: no snapshots; a source that waits to forget is still told so, once its decisions are out."""

    def __init__(
        self, folder: Path | None, interval_s: float, source_name: str, sink: Sink | None, decoder: FrameDecoder
    ) -> None:
        self._path = None if folder is None else folder / FILE
        self._lock = None if folder is None else _alone(folder)
        self._take_after_s = max(0.2 * interval_s, interval_s - max(EARLY_SHARE * interval_s, EARLY_S))
        self._source_name = sanitize(source_name)
        self._sink = sink
        self._decoder = decoder
        self._taken: _Taken | None = None
        self._writing: threading.Thread | None = None
        self._problem = ""
        self._told = ""
        self.followed_on = False
        """Whether the source goes on exactly where the snapshot was taken."""
        self._token: Any = None
        self._in_flight, self._same_since = 0, 0.0
        self._due = time.monotonic() + self._take_after_s
        self.artifact = ""
        """Digest of the artifact that runs."""
        self.written_at: float | None = None
        """time.monotonic() when the last one was taken that is on disk."""

    @property
    def keeps_state(self) -> bool:
        return self._path is not None

    def resume(
        self, pipeline: Pipeline, source: Source, accept: Callable[[str], bool]
    ) -> service_snapshot.Document | None:
        """Put pipeline, source and decoder where the last snapshot was taken; None if there is none.

        ``accept`` is asked with the artifact's digest, and may swap the loop's engine for that artifact's. Raises
        SnapshotError for one that does not belong here; it is set aside as ``snapshot.refused``.
        """
        if self._path is None:
            return None
        try:
            found = service_snapshot.read(self._path)
            if found is None:
                return None
            document, state = found
            if not accept(document.artifact):
                raise SnapshotError(f"snapshot: of artifact {document.artifact[:12]}..., not of this one")
            pipeline.restore(document.loop, state)
        except SnapshotError:
            with suppress(OSError):
                self._path.replace(self._path.with_name(REFUSED))
            raise
        self.followed_on = document.source == self._source_name and source.seek(document.position)
        if document.source == self._source_name:
            self._decoder.resume(document.decoder)
        return document

    def tick(self, pipeline: Pipeline, source: Source, token: Any) -> str:
        """Between blocks: take, write, acknowledge, each when it is time. Returns what a user must be told, or ""."""
        self._token = token
        now = time.monotonic()
        if self._taken is None and (now >= self._due or self._sender_waits(source, now)):
            self._take(pipeline, source, now)
        if self._taken is not None and self._writing is None and self._settled(self._taken, source):
            self._write()
        if self._writing is not None and not self._writing.is_alive():
            self._written(source)
        problem, self._told = ("" if self._problem == self._told else self._problem), self._problem
        return problem

    def _sender_waits(self, source: Source, now: float) -> bool:
        """Whether it sends no more before something is acknowledged: it said how much it sends, or it fell silent."""
        if source.in_flight != self._in_flight:
            self._in_flight, self._same_since = source.in_flight, now
        return source.in_flight >= source.most_in_flight or (
            source.in_flight >= FEW_IN_FLIGHT and now - self._same_since > STALLED_S
        )

    def _take(self, pipeline: Pipeline, source: Source, now: float) -> None:
        # Taken early, so that it is written when the interval is over: no more than that is ever done again.
        self._due = now + self._take_after_s
        content = None
        if self._path is not None:
            state, snapshot = pipeline.state()
            content = service_snapshot.to_bytes(self._document(state, snapshot, source), snapshot)
        elif self._token is None:
            return
        self._taken = _Taken(content, self._sink.accepted if self._sink else 0, self._token, now)

    def _document(self, state: Any, snapshot: Snapshot, source: Source) -> service_snapshot.Document:
        position = source.position()
        if "offset" in position:
            position["offset"] -= self._decoder.pending
        shapes = [(len(x), x.shape[1]) for x in snapshot.state]
        return service_snapshot.Document(
            self.artifact,
            snapshot.fingerprint,
            shapes,
            state,
            self._source_name,
            position,
            self._decoder.state(),
            time.time(),
        )

    def _settled(self, taken: _Taken, source: Source) -> bool:
        # The position last: a file is read for it, and this is asked again and again.
        out = self._sink is None or self._sink.acknowledged >= taken.mark
        return out or (taken.token is None and not source.position())

    def _write(self) -> None:
        """In a thread: a flash card takes its time to flush, and the loop must not."""
        self._writing = threading.Thread(target=self._put, args=(self._taken,), name="snapshot", daemon=True)
        self._writing.start()

    def _put(self, taken: _Taken) -> None:
        if self._path is None or taken.content is None:
            return
        try:
            files.write(self._path, taken.content)
            self._problem, self.written_at = "", taken.at
        except OSError as error:
            self._problem = f"{self._path}: not written ({error.strerror}); a kill now loses the open window"

    def _written(self, source: Source) -> None:
        taken, self._taken, self._writing = self._taken, None, None
        # Acknowledged even where no snapshot could be written: a full disk must not stop the stream.
        if taken is not None and taken.token is not None:
            source.acknowledge(taken.token)

    def finish(self, pipeline: Pipeline, source: Source, limit_s: float = 5.0) -> str:
        """At the end of a run: the last snapshot, once all that was decided is out. None is taken of a run that ended
        within a block or lost a decision: the next one goes on from the last snapshot, and makes both again."""
        end = time.monotonic() + limit_s
        self._drain(pipeline, source, end)
        if self._taken is None and pipeline.is_consistent:
            self._take(pipeline, source, time.monotonic())
            self._drain(pipeline, source, end)
        return self._problem

    def close(self) -> None:
        """Let another run have the folder."""
        if self._lock is not None:
            os.close(self._lock)

    def _drain(self, pipeline: Pipeline, source: Source, end: float) -> None:
        """Until what was taken is written and acknowledged, or ``end`` (time.monotonic())."""
        pause = threading.Event()
        while self._taken is not None and time.monotonic() < end:
            self.tick(pipeline, source, self._token)
            pause.wait(0.005)
