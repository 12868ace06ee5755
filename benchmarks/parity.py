"""The demo through `edge-ssm run --stream` against torch in convolution mode, in float64, on the whole test split.

    python benchmarks/parity.py [--output benchmarks/parity.json]

Records the split as CSV, streams it with each engine, and compares every window's label and logits with torch's on the
same values. Needs the `host` extra and fetches the `watch` data once. Exit status 1 if a label differs or a
logit is off by over 1e-4.
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
from edge_ssm_build.export import artifact, convert
from edge_ssm_build.training import scoring

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "parity.json")
    arguments = parser.parse_args()
    model = ROOT / "examples" / "demo.safetensors"
    network = load(model).network
    torch_network = convert.to_model(network, torch.float64)
    data = datasets.load("watch")
    x, y = scoring.split_windows(data, "test", network.window)
    expected = artifact.convolve_windows(torch_network, network.input, x)
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as folder:
        stream = Path(folder) / "test.csv"
        samples = recording.record(data, "test", stream, network.window)
        for engine in ("cpu", "reference"):
            command = [sys.executable, "-c", "from edge_ssm.cli.app import main; main()", "run", str(model), "--stream"]
            command += ["--input", str(stream), "--logits", "--truth", "--engine", engine]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            decisions = [json.loads(line) for line in done.stdout.splitlines()]
            found = np.array([d["logits"] for d in decisions])
            agreement = artifact.agreement_of(expected, found, 1e-4)
            # The label that is shown is that of the largest logit.
            assert [d["label"] for d in decisions] == [network.labelled[i] for i in found.argmax(axis=1)]
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
