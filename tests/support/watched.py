"""A real run to look at: the demo's model and recording, or a random network, paced, in a thread of its own.

``python tests/support/watched.py :9464`` serves the demo's status page until it is interrupted
(``docs/status-page.png``).
"""

import argparse
import contextlib
import io
import threading
import time
from pathlib import Path

from edge_ssm.engines.registry import create
from edge_ssm.formats import artifact
from edge_ssm.hardware.meters.registry import open_file_meter
from edge_ssm.io.codecs import registry as codecs
from edge_ssm.io.sinks.formats import NdjsonFormatter
from edge_ssm.runtime.counters import Counters
from edge_ssm.runtime.pipeline import Pipeline
from edge_ssm.runtime.windows import Windows
from edge_ssm.telemetry.http import serve
from edge_ssm.telemetry.publisher import RunInfo, StatusPublisher
from support.networks import samples_for

EXAMPLES = Path(__file__).parents[2] / "examples"


class Watched:
    """A real pipeline with a real engine. ``lines`` are CSV rows, which are repeated without end."""

    def __init__(
        self,
        network,
        lines,
        hop=None,
        engine="reference",
        hz=None,
        model="demo.safetensors",
        digest="5eed",
        read_power=lambda: None,
    ):
        windows = Windows(network, hop)
        self.engine = create(engine, network, lanes=windows.lanes)
        self.info = RunInfo(model, digest, self.engine.name, network.input.sample_rate_hz, source="recording")
        self.counters = Counters()
        formatter = NdjsonFormatter(io.StringIO(), network, logits=False, truth=False)
        self.publisher = StatusPublisher(formatter, self.info, self.counters, read_power)
        self.pipeline = Pipeline(self.engine, windows, self.publisher, counters=self.counters)
        self._network, self._lines, self._hz = network, lines, hz
        self.stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self.publisher.start()
        self.info.ready = True
        self._thread.start()
        return self

    def __exit__(self, *error):
        self.stop.set()
        self._thread.join()
        self.publisher.close()

    def _run(self):
        decoder, began, taken = codecs.decoder("csv", self._network.input), time.perf_counter(), 0
        while True:
            for line in self._lines if not taken else self._lines[1:]:
                for item in decoder.feed(line):
                    if self._hz:
                        self.stop.wait(began + taken / self._hz - time.perf_counter())
                    if self.stop.is_set():
                        return
                    self.info.ticked_at, self.info.source_state = time.monotonic(), "flowing"
                    self.pipeline.process(item)
                    taken += 1

    def until(self, decisions, seconds=30):
        end = time.monotonic() + seconds
        while self.counters.decisions < decisions:
            assert time.monotonic() < end, "the run does not decide"
            time.sleep(0.01)
        return self


def rows(network, n=400, gap_every=0):
    """CSV of random samples, every ``gap_every``th missing."""
    lines = [",".join(network.input.channels) + "\n"]
    for i, sample in enumerate(samples_for(network, 0, n)):
        values = ["nan" if gap_every and i % gap_every == 0 else f"{v:.6f}" for v in sample]
        lines.append(",".join(values) + "\n")
    return [line.encode() for line in lines]


def demo(holes=False, **options):
    """The demo's model over its recording; with ``holes`` some samples are missing, and a row is no row."""
    found = artifact.load(EXAMPLES / "demo.safetensors")
    lines = (EXAMPLES / "demo.csv").read_bytes().splitlines(keepends=True)
    if holes:
        missing = b",".join([b"nan"] * found.network.d_input) + b",\n"
        for i in [*range(400, 8000, 1000), *range(403, 8000, 2000), *range(3000, 3230)]:
            lines[i] = missing
        lines[5000] = b"0.1,0.2,what is th\n"
    return Watched(found.network, lines, digest=found.digest, **options)


def main():
    parser = argparse.ArgumentParser(description="Serve the demo's status page.")
    parser.add_argument("listen")
    parser.add_argument("--hz", type=float, default=50)
    parser.add_argument("--hop", type=int, default=50)
    parser.add_argument("--holes", action="store_true")
    parser.add_argument("--note", help="ignored: a word for tests/support/emulated_board.py to find")
    arguments = parser.parse_args()
    meter = open_file_meter()

    def read_power():
        reading = meter.read() if meter else None
        return meter.total_w(reading) if reading else None

    run = demo(arguments.holes, hz=arguments.hz, hop=arguments.hop, engine="cpu", read_power=read_power)
    with run, contextlib.closing(serve(run.publisher, arguments.listen, prometheus=True)) as web:
        print(web.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
