"""The loop that reads a source and feeds a pipeline, until the source ends or the process is told to stop."""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic
from typing import Any

from edge_ssm.errors import SinkClosed
from edge_ssm.io.codecs.base import FrameDecoder
from edge_ssm.io.messages import Frame, Malformed
from edge_ssm.io.shutdown import ShutdownSignal
from edge_ssm.io.sources.base import Batch, Discontinuity, Source
from edge_ssm.runtime.pipeline import TICK_S, Pipeline, PipelineObserver


class Driver:
    """Runs a pipeline over a source.

    ``pace_hz`` replays a recording at that sample rate. Once a shutdown is requested, what has been read already is
    processed without pause.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        source: Source,
        decoder: FrameDecoder,
        shutdown: ShutdownSignal,
        observer: PipelineObserver | None = None,
        pace_hz: float | None = None,
    ) -> None:
        self.is_consistent = True
        """Whether everything that was read is processed, and every decision handed over: the pipeline's state may be
        kept. False after an error in the middle of a batch."""
        self._pipeline = pipeline
        self._source = source
        self._decoder = decoder
        self._shutdown = shutdown
        self._observer = observer or PipelineObserver()
        self._pace_hz = pace_hz
        self._began = 0.0
        self._paced = 0
        self._token: Any = None
        self._unread_before = 0

    def run(self) -> None:
        """Run until the source ends, a shutdown is requested, or nobody reads the output any more.

        ``Pipeline.counters`` tells what happened. Raises RunFailed if the source fails, or for malformed input if the
        pipeline is strict.
        """
        counters = self._pipeline.counters
        self._pipeline.start(self._observer)
        self._began = monotonic()
        self._unread_before = counters.dropped["unread"]
        try:
            while not self._shutdown.requested and not self._source.ended:
                self.is_consistent = True
                received = self._source.read(self._shutdown, TICK_S)
                self.is_consistent = False
                self._process(received)
                self._observer.on_batch_end(self._token)
            self._finish()
            self.is_consistent = True
        except SinkClosed:
            counters.ended_by = "closed output"
        finally:
            counters.unfinished = self._pipeline.windows.unfinished
            counters.seconds = monotonic() - self._began

    def _process(self, received: Batch | Discontinuity | None) -> None:
        """Process what the source returned; None is silence."""
        pipeline, source = self._pipeline, self._source
        if received is None:
            pipeline.check_silence()
            pipeline.release_overdue()
            self._observer.on_tick()
        elif isinstance(received, Batch):
            pipeline.mark_arrival()
            if source.unread:
                pipeline.counters.dropped["unread"] = self._unread_before + source.unread
            if received.token is not None:
                self._token = received.token
            self._feed(self._decoder.feed(received.content))
            if source.datagrams:  # What is unfinished at the end of a datagram will not be completed.
                for item in self._decoder.finish():
                    pipeline.process(item)
        else:
            pipeline.mark_discontinuity(received)
            self._feed(self._decoder.restart())

    def _feed(self, items: Iterator[Frame | Malformed]) -> None:
        pipeline, process = self._pipeline, self._pipeline.process
        for item in items:
            if self._pace_hz is not None and not self._shutdown.requested:
                self._paced += 1
                self._wait_until(self._began + self._paced / self._pace_hz)
            process(item)
            if monotonic() >= pipeline.next_tick_at:
                pipeline.release_overdue()
                pipeline.tick_if_due()

    def _wait_until(self, due: float) -> None:
        while (ahead := due - monotonic()) > 0 and not self._shutdown.requested:
            self._shutdown.wait(seconds=min(ahead, TICK_S))
            self._observer.on_tick()
        self._pipeline.postpone_arrival(due)

    def _finish(self) -> None:
        """Process what is left when the source has ended or a shutdown was requested."""
        if self._shutdown.requested:
            self._pipeline.counters.ended_by = "signal"
        else:
            for item in self._decoder.finish():
                self._pipeline.process(item)
        if not (self._shutdown.requested and self._observer.keeps_state):
            self._pipeline.release_all()
        self._pipeline.flush()
        self._observer.on_batch_end(self._token)
