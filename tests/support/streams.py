"""A pipeline over an engine, fed item by item, as tests need it."""

import io
import json

import numpy as np

from edge_ssm.engines.registry import create
from edge_ssm.io.messages import Frame
from edge_ssm.io.sinks.formats import NdjsonFormatter
from edge_ssm.runtime.pipeline import Pipeline, PipelineOptions
from edge_ssm.runtime.windows import Windows


class Stream:
    """A pipeline over a reference engine, fed item by item, its output as parsed NDJSON."""

    def __init__(self, network, hop=None, carry=False, engine="reference", **options):
        windows = Windows(network, hop, carry)
        self.file = io.StringIO()
        formatter = NdjsonFormatter(self.file, network, logits=True, truth=True)
        running = create(engine, network, lanes=windows.lanes)
        self.pipeline = Pipeline(running, windows, formatter, PipelineOptions(**options))

    def feed(self, samples, labels=None):
        for i, sample in enumerate(samples):
            self.pipeline.process(Frame(np.array(sample, dtype=float), float(i), labels[i] if labels else None))
        return self

    @property
    def lines(self):
        return [json.loads(line) for line in self.file.getvalue().splitlines()]

    @property
    def decisions(self):
        return [line for line in self.lines if "event" not in line]

    @property
    def events(self):
        return [line for line in self.lines if "event" in line]

    @property
    def counters(self):
        return self.pipeline.counters


def logits(decision):
    return np.array(decision["logits"])
