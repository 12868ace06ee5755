"""The demo through `edge-ssm run --stream`, compared with torch in float64 on the whole test split.

    python benchmarks/parity.py [--output benchmarks/parity.json]

The split is recorded as CSV and streamed with each engine; the label and the logits of every window are compared with
those of torch in convolution mode. Needs the `host` extra, and downloads the `watch` data once. The exit status is 1 if
a label differs or a logit is off by more than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from edge_ssm import load
from edge_ssm_build.data import datasets, recording
from edge_ssm_build.export.agreement import compare_logits, convolve_windows
from edge_ssm_build.export.convert import to_model
from edge_ssm_build.training.scoring import split_windows

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Stream the test split with each engine, write the JSON file, and exit with 1 if an engine disagrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "parity.json", help="JSON file to write")
    arguments = parser.parse_args()
    model = ROOT / "examples" / "demo.safetensors"
    network = load(model).network
    torch_network = to_model(network, torch.float64)
    data = datasets.load("watch")
    x, y = split_windows(data, "test", network.window)
    expected = convolve_windows(torch_network, network.input, x)
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as folder:
        stream = Path(folder) / "test.csv"
        samples = recording.record(data, "test", stream, network.window)
        for engine in ("cpu", "reference"):
            command = [sys.executable, "-c", "from edge_ssm.cli.app import main; main()", "run", str(model), "--stream"]
            command += ["--input", str(stream), "--logits", "--truth", "--engine", engine]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            decisions = [json.loads(line) for line in done.stdout.splitlines()]
            logits = np.array([d["logits"] for d in decisions])
            agreement = compare_logits(expected, logits, 1e-4)
            # The label in the output is that of the largest logit.
            assert [d["label"] for d in decisions] == [network.labelled[i] for i in logits.argmax(axis=1)]
            row = {
                "engine": engine,
                "samples": samples,
                "windows": len(decisions),
                "labels_differing": agreement.labels_differing,
                "ties": agreement.ties,
                "ties_differing": agreement.ties_differing,
                "max_logit_error": agreement.max_error,
                "accuracy_stream": float(np.mean([d["label"] == d["truth"] for d in decisions])),
                "accuracy_torch": float((expected.argmax(axis=1) == y).mean()),
            }
            failed |= not agreement.passes()
            rows.append(row)
            print(row)
    arguments.output.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
