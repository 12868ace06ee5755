"""A model that is replaced while the run goes on."""

import os
import signal
import sys

import numpy as np
from support import commands
from support.service_runs import decisions
from support.streams import Stream
from support.waiting import until

from edge_ssm.formats import artifact

EDGE_SSM = [sys.executable, "-c", "from edge_ssm.cli.app import main; main()"]


def test_a_new_model_is_taken_over_and_a_bad_one_is_not(small, tmp_path):
    model, fifo, out = tmp_path / "m.safetensors", tmp_path / "fifo", tmp_path / "out"
    model.write_bytes((small / "m.safetensors").read_bytes())
    os.mkfifo(fifo)
    run = commands.Process(
        [*EDGE_SSM, "run", model, "--input", fifo, "--follow", "--output", out, "--reload"],
        stderr=(tmp_path / "log").open("wb"),
    )
    rows = (small / "s.csv").read_text().splitlines()[1:]
    writer = fifo.open("w")

    def feed(count):
        for row in [rows.pop(0) for _ in range(count)]:
            writer.write(row + "\n")
        writer.flush()

    def events():
        return decisions(out)[1] if out.exists() else []

    feed(105)
    until(lambda: len(decisions(out)[0]) == 10)
    model.write_bytes((small / "wide.safetensors").read_bytes())
    run.send_signal(signal.SIGHUP)
    until(lambda: [e["event"] for e in events()] == ["reload_failed"])
    assert "reads c0, c1, c2, c3; the stream has c0, c1" in events()[0]["reason"]
    model.write_bytes((small / "s.safetensors").read_bytes())
    run.send_signal(signal.SIGHUP)
    until(lambda: (tmp_path / "log").read_text().count("ready, digest") == 1)
    feed(100)  # the window that was open is decided by the old model
    until(lambda: len(events()) == 2)
    assert (events()[1]["event"], events()[1]["sample"], events()[1]["changed"]) == ("reloaded", 110, True)
    model.write_bytes((small / "other.safetensors").read_bytes())  # noticed without a signal
    until(lambda: (tmp_path / "log").read_text().count("ready, digest") == 2)
    feed(100)
    until(lambda: len(events()) == 3)
    feed(100)
    until(lambda: [d["end"] - d["start"] for d in decisions(out)[0]].count(25) >= 6)
    writer.close()
    run.send_signal(signal.SIGTERM)
    assert run.wait(30) == 0
    found, _ = decisions(out)
    ends = [(d["start"], d["end"]) for d in found]
    assert ends[:11] == [(10 * i, 10 * i + 10) for i in range(11)]
    assert {b - a for a, b in ends[-4:]} == {25}
    # Before and after the first change, each is what the model says alone.
    for name, first, last in (("m", 0, 110), ("s", 110, 200)):
        samples = np.array(
            [[float(v) for v in row.split(",")] for row in (small / "s.csv").read_text().splitlines()[1:]]
        )
        alone = Stream(artifact.load(small / f"{name}.safetensors").network).feed(samples[first:last]).decisions
        there = [d for d in found if first <= d["start"] and d["end"] <= last]
        assert [d["label"] for d in there] == [d["label"] for d in alone]


def test_a_reloaded_model_leads_its_family(small, tmp_path):
    """After a reload the way back from a smaller member ends at the new model, not at the one that was replaced."""
    model, out = tmp_path / "m.safetensors", tmp_path / "out"
    model.write_bytes((small / "m.safetensors").read_bytes())
    with (tmp_path / "log").open("wb") as log:
        run = commands.Process(
            [
                *EDGE_SSM,
                "run",
                model,
                "--input",
                small / "s.csv",
                "--pace",
                "--reload",
                "--member",
                small / "s.safetensors",
                "--deadline",
                "0.0001",
                "--settle",
                "1",
                "--output",
                out,
            ],
            stderr=log,
        )
    said = (tmp_path / "log").read_text
    until(lambda: "moved to the smaller" in said())
    run.send_signal(signal.SIGHUP)  # the model's file is the same, whatever member runs
    until(lambda: any(e.get("changed") is False for e in decisions(out)[1]))
    assert "reloaded, digest" not in said()
    fresh = tmp_path / "fresh"
    artifact.save(fresh, artifact.load(small / "m.safetensors").network, {"another": True})
    digest = artifact.load(fresh).digest[:12]
    fresh.replace(model)
    run.send_signal(signal.SIGHUP)
    until(lambda: f"reloaded, digest {digest}" in said())
    until(lambda: said().count("moved to the smaller") == 2)
    run.send_signal(signal.SIGTERM)
    assert run.wait(30) == 0
