"""When a snapshot is taken, when it is written, and when the source may forget its samples.

The order survives a kill at any moment: first the decisions are delivered (``Sink.acknowledged``), then the snapshot is
on disk, then the source forgets. After a kill before the last step some decisions are made twice; none is ever missing.
A source that keeps nothing (a serial line) has nothing to wait for, and its snapshots are written at once.
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
from edge_ssm.runtime.state import PipelineState
from edge_ssm.service import snapshot as service_snapshot
from edge_ssm.text import sanitize

FILE = "snapshot"
REFUSED = "snapshot.refused"
LOCK = "lock"
LEAD_SHARE, LEAD_S = 0.3, 0.25
"""How long before the end of an interval (the longer of both) a snapshot is taken, so that it is written by then."""
FEW_IN_FLIGHT = 8
STALLED_S = 0.15
"""A sender with so many unacknowledged messages that has been silent for so long may have reached a limit that it does
not announce."""


@dataclass(frozen=True)
class _Checkpoint:
    """A snapshot on its way to the disk, or only a token that waits to be acknowledged."""

    content: bytes | None
    """None if nothing is kept, and only the source waits."""
    accepted: int
    """``Sink.accepted`` at that time: what must be acknowledged before the snapshot is written."""
    token: Any
    at: float
    """``time.monotonic()``."""


class Checkpointer:
    """Keeps the state of a pipeline, its source and its decoder.

    ``folder`` None takes no snapshots; the source is still told what it may forget, once the decisions are delivered.
    ``artifact_digest`` is that of the model that runs. Raises UsageError if another run keeps its snapshots in
    ``folder``.
    """

    def __init__(
        self,
        folder: Path | None,
        interval_s: float,
        pipeline: Pipeline,
        source: Source,
        decoder: FrameDecoder,
        sink: Sink | None,
        artifact_digest: str,
    ) -> None:
        self.has_resumed_exactly = False
        """Whether the source continues exactly where the snapshot was taken."""
        self.written_at: float | None = None
        """``time.monotonic()`` when the last snapshot on disk was taken."""
        self._path = None if folder is None else folder / FILE
        self._lock = None if folder is None else _lock(folder)
        self._period_s = max(0.2 * interval_s, interval_s - max(LEAD_SHARE * interval_s, LEAD_S))
        self._pipeline = pipeline
        self._source = source
        self._source_name = sanitize(source.name)
        self._decoder = decoder
        self._sink = sink
        self._artifact_digest = artifact_digest
        self._pending: _Checkpoint | None = None
        self._writer: threading.Thread | None = None
        self._problem = ""
        self._reported_problem = ""
        self._token: Any = None
        self._in_flight, self._in_flight_since = 0, 0.0
        self._due = time.monotonic() + self._period_s

    @property
    def keeps_state(self) -> bool:
        """Whether snapshots are taken."""
        return self._path is not None

    def set_artifact(self, digest: str) -> None:
        """Label later snapshots as those of another artifact, which runs from now on."""
        self._artifact_digest = digest

    def resume(self, accept: Callable[[str], bool]) -> service_snapshot.Document | None:
        """Restore pipeline, source and decoder from the last snapshot; None if there is none.

        ``accept`` is called with the artifact's digest; it may make the pipeline run that artifact, and returns whether
        it runs. Raises SnapshotError for a snapshot of something else, which is renamed to ``snapshot.refused``.
        """
        if self._path is None:
            return None
        try:
            content = service_snapshot.read(self._path)
            if content is None:
                return None
            document, state = content
            if not accept(document.artifact):
                raise SnapshotError(f"snapshot: of artifact {document.artifact[:12]}..., not of this one")
            self._pipeline.restore(document.loop, state)
        except SnapshotError:
            with suppress(OSError):
                self._path.replace(self._path.with_name(REFUSED))
            raise
        if document.source == self._source_name:
            self.has_resumed_exactly = self._source.seek(document.position)
            self._decoder.resume(document.decoder)
        return document

    def tick(self, token: Any) -> str:
        """Take, write or acknowledge a checkpoint if it is time to; call it between two batches.

        ``token`` is the last one that the source gave. Return a new problem for the user, or an empty string.
        """
        self._token = token
        now = time.monotonic()
        if self._pending is None and (now >= self._due or self._sender_waits(now)):
            self._take(now)
        if self._pending is not None and self._writer is None and self._is_delivered(self._pending):
            self._start_writing(self._pending)
        if self._writer is not None and not self._writer.is_alive():
            self._finish_writing()
        problem = "" if self._problem == self._reported_problem else self._problem
        self._reported_problem = self._problem
        return problem

    def finish(self, is_consistent: bool) -> str:
        """Write the last snapshot of a run, once all decisions are delivered. Return a problem for the user, or "".

        ``is_consistent`` is ``Driver.is_consistent``: if the run ended within a batch or lost a decision, the next run
        resumes from the snapshot before, and repeats both.
        """
        deadline = time.monotonic() + 5.0
        self._drain(deadline)
        if self._pending is None and is_consistent:
            self._take(time.monotonic())
            self._drain(deadline)
        return self._problem

    def close(self) -> None:
        """Unlock the folder for other runs."""
        if self._lock is not None:
            os.close(self._lock)

    def _sender_waits(self, now: float) -> bool:
        """Return whether the sender waits for an acknowledgement: its limit is reached, or it has fallen silent."""
        in_flight = self._source.in_flight
        if in_flight != self._in_flight:
            self._in_flight, self._in_flight_since = in_flight, now
        return in_flight >= self._source.most_in_flight or (
            in_flight >= FEW_IN_FLIGHT and now - self._in_flight_since > STALLED_S
        )

    def _take(self, now: float) -> None:
        self._due = now + self._period_s
        content = None
        if self._path is not None:
            state, snapshot = self._pipeline.state()
            content = service_snapshot.to_bytes(self._document(state, snapshot), snapshot)
        elif self._token is None:
            return
        self._pending = _Checkpoint(content, self._sink.accepted if self._sink else 0, self._token, now)

    def _document(self, state: PipelineState, snapshot: Snapshot) -> service_snapshot.Document:
        position = self._source.position()
        if "offset" in position:  # The decoder has bytes of a frame that is not complete.
            position["offset"] -= self._decoder.pending
        return service_snapshot.Document(
            artifact=self._artifact_digest,
            fingerprint=snapshot.fingerprint,
            shapes=[(len(x), x.shape[1]) for x in snapshot.state],
            loop=state,
            source=self._source_name,
            position=position,
            decoder=self._decoder.state(),
            saved_at=time.time(),
        )

    def _is_delivered(self, checkpoint: _Checkpoint) -> bool:
        """Return whether the decisions before a checkpoint are delivered, or it need not wait for them."""
        if self._sink is None or self._sink.acknowledged >= checkpoint.accepted:
            return True
        # Asked again and again, and a file is read for the position: last.
        return checkpoint.token is None and not self._source.position()

    def _start_writing(self, checkpoint: _Checkpoint) -> None:
        """Write in a thread: a flash card takes its time to flush, which must not stop the pipeline."""
        self._writer = threading.Thread(target=self._write, args=(checkpoint,), name="snapshot", daemon=True)
        self._writer.start()

    def _write(self, checkpoint: _Checkpoint) -> None:
        if self._path is None or checkpoint.content is None:
            return
        try:
            files.write(self._path, checkpoint.content)
            self._problem, self.written_at = "", checkpoint.at
        except OSError as error:
            self._problem = f"{self._path}: not written ({error.strerror}); a kill now loses the open window"

    def _finish_writing(self) -> None:
        checkpoint, self._pending, self._writer = self._pending, None, None
        # Acknowledged even if no snapshot could be written: a full disk must not stop the stream.
        if checkpoint is not None and checkpoint.token is not None:
            self._source.acknowledge(checkpoint.token)

    def _drain(self, deadline: float) -> None:
        """Wait until no checkpoint is pending, at most until ``deadline`` (``time.monotonic()``)."""
        pause = threading.Event()
        while self._pending is not None and time.monotonic() < deadline:
            self.tick(self._token)
            pause.wait(0.005)


def _lock(folder: Path) -> int:
    """Lock a folder of snapshots until the descriptor is closed. Raises UsageError if another run has locked it."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"{folder}: another run keeps its snapshots there; give each its own --state") from None
    except OSError as error:
        raise UsageError(f"{folder}: snapshots cannot be kept there ({error.strerror}); see --state") from None
    return descriptor
