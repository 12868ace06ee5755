"""A model at half the sample rate of its training data, without retraining: accuracy on real recordings.

    python benchmarks/sample_rate.py MODEL [--data watch] [--output FILE]

The test split is low-pass filtered and resampled to half its rate (scipy, polyphase). The model's step sizes are
doubled, as `edge-ssm run --sample-rate` does. Needs the `host` extra and a data set with a sample rate.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

from edge_ssm import load
from edge_ssm.model.transforms import at_sample_rate
from edge_ssm_build.data import datasets
from edge_ssm_build.export.agreement import stream_windows
from edge_ssm_build.importers.verification import compare_with_convolution
from edge_ssm_build.training.scoring import split_windows


def main() -> None:
    """Stream the test split at both rates, print the accuracies, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="artifact that states a sample rate")
    parser.add_argument("--data", default="watch", help="data set with the same channels (default: watch)")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: none)")
    arguments = parser.parse_args()
    network = load(arguments.model).network
    rate = network.input.sample_rate_hz
    assert rate is not None, "the model states no sample rate"
    x, y = split_windows(datasets.load(arguments.data), "test", network.window)
    slower = at_sample_rate(network, rate / 2)
    halved = resample_poly(x, 1, 2, axis=1)[:, : slower.window]
    rows = []
    for name, variant, windows in (("trained rate", network, x), ("half the rate", slower, halved)):
        logits = stream_windows(variant, "cpu", windows)
        stream = windows[:20].reshape(-1, x.shape[2])
        error = max(d.error for d in compare_with_convolution(variant, samples=stream))
        accuracy = float(np.mean(logits.argmax(axis=1) == y))
        rows.append({"run": name, "hz": variant.input.sample_rate_hz, "accuracy": accuracy, "error": error})
        print(rows[-1])
    if arguments.output:
        arguments.output.write_text(json.dumps({"windows": len(x), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
