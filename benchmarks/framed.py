"""Measure how many samples each codec decodes per second of CPU time.

python benchmarks/framed.py [--samples 102400] [--output benchmarks/framed.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np

from edge_ssm.io.codecs.framed import encode
from edge_ssm.io.codecs.registry import decoder
from edge_ssm.io.messages import Frame
from edge_ssm.model.network import InputSpec

BATCH = 1 << 16
"""Bytes that a decoder is fed at once, as by a source."""


def rate(codec: str, content: bytes, samples: int, channels: int, repeats: int = 5) -> float:
    """Return samples per CPU second, the best of ``repeats``."""
    spec = InputSpec(tuple(f"c{i}" for i in range(channels)), np.zeros(channels), np.ones(channels))
    best = 0.0
    for _ in range(repeats):
        codec_decoder = decoder(codec, spec)
        began = time.process_time()
        count = sum(
            isinstance(item, Frame)
            for at in range(0, len(content), BATCH)
            for item in codec_decoder.feed(content[at : at + BATCH])
        )
        assert count == samples, f"{codec}: {count} of {samples} samples"
        best = max(best, samples / (time.process_time() - began))
    return best


def main() -> None:
    """Measure all codecs and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=102_400)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    samples = arguments.samples
    channels = 6
    values = np.random.default_rng(0).normal(size=(samples, channels))
    small = np.rint(values * 50)
    rates = {}
    for size in (1, 8, 32, 128):
        for name, rows, options in (
            ("float32", values, {}),
            ("float32, time", values, {"time_us": 1_700_000_000_000_000, "period_ns": 62_500}),
            ("int16", small, {"int16": True}),
        ):
            content = b"".join(encode(rows[k : k + size], k, **options) for k in range(0, samples, size))
            rates[f"framed, {name}, {size} a frame"] = rate("framed", content, samples, channels)
    rates["f32le"] = rate("f32le", values.astype("<f4").tobytes(), samples, channels)
    text = b"".join(b"%s\n" % ",".join(f"{v:.4f}" for v in row).encode() for row in values)
    rates["csv"] = rate("csv", text, samples, channels)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    rows = {name: round(value) for name, value in rates.items()}
    document = {"machine": machine, "channels": channels, "samples_per_cpu_second": rows}
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
