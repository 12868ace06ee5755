"""edge-ssm-build from end to end on real recordings, and its refusals."""

import json
import os
import re
import sys
from pathlib import Path

import click
import pytest
from support import commands

from edge_ssm.cli.app import run_command
from edge_ssm.profiler import step_table

torch = pytest.importorskip("torch", reason="the host tool needs torch: pip install 'edge-ssm[host]'")

from edge_ssm_build.cli.app import cli
from edge_ssm_build.training import checkpoint as checkpoint_module
from edge_ssm_build.training.checkpoint import load_checkpoint, parse_checkpoint, save_checkpoint

BUILD = [sys.executable, "-c", "from edge_ssm_build.cli.app import main; main()"]
RUN = [sys.executable, "-c", "from edge_ssm.cli.app import main; main()"]


def call(command, *arguments):
    return commands.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def build(*arguments):
    done = call(BUILD, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_train_prune_export_record_and_stream(recordings, tmp_path):
    small = ["--d-model", 8, "--d-state", 4, "--epochs", 8, "--batch", 16]
    build("train", "--data", recordings, "--output", tmp_path / "t", "--window", 50, *small)
    start = tmp_path / "t" / "checkpoint.pt"
    text = build("prune", start, "--output", tmp_path / "p", "--method", "s4op", "--rates", "0.5", "--seeds", "3")
    assert "rate  0.5: validation" in text
    compact = ["--method", "compact", "--rates", "0.25,0.5", "--mixing-dtype", "int8", "--max-accuracy-loss", 100]
    text = build("prune", start, "--output", tmp_path / "c", *compact)
    assert "chosen: rate " in text
    shown = build("report", tmp_path / "p", tmp_path / "c", "--output", tmp_path / "r")
    assert {Path(line).name for line in shown.splitlines()} == set(os.listdir(tmp_path / "r"))
    described = json.loads(call(RUN, "inspect", tmp_path / "c" / "rate-0.5.safetensors", "--json").stdout)
    assert {layer["mixing_dtype"] for layer in described["layers"]} == {"int8"}
    assert described["provenance"]["history"][-1]["mixing_dtype"] == "int8"
    assert sum(layer["active"] for layer in described["layers"]) == 8
    evaluated = build("evaluate", tmp_path / "c" / "rate-0.5.safetensors", "--data", recordings, "--engine", "cpu")
    assert "every label equal" in evaluated
    model = tmp_path / "m.safetensors"
    assert "every label equal" in build("export", tmp_path / "p" / "rate-0.5.pt", "--output", model)
    exported = build("evaluate", model, "--data", recordings)
    assert exported == build("evaluate", tmp_path / "p" / "rate-0.5.pt")
    assert "every label equal" in build(
        "evaluate", model, "--data", recordings, "--engine", "cpu", "--split", "validation"
    )
    text = build("export", start, "--output", tmp_path / "auto.safetensors", "--weights", "auto", "--error-bound", "9")
    assert re.search(r"int8 mixing weights: largest change of a logit .* a step [0-9.]+ us here", text)
    assert re.search(r"^chosen: (float32|float16|int8)$", text, re.MULTILINE)
    build("export", start, "--output", tmp_path / "int8.safetensors", "--weights", "int8")
    small = json.loads(call(RUN, "inspect", tmp_path / "int8.safetensors", "--json").stdout)
    assert {layer["mixing_dtype"] for layer in small["layers"]} == {"int8"}
    assert 0 < small["rounding_error"] < 1
    assert small["provenance"]["history"][-1]["mixing_dtype"] == "int8"
    strict = ["--weights", "int8", "--error-bound", "1e-9"]
    refused = call(BUILD, "export", start, "--output", tmp_path / "no.safetensors", *strict)
    assert refused.returncode == 1
    assert "nothing was written" in refused.stderr
    assert not (tmp_path / "no.safetensors").exists()
    build("record", "--data", recordings, "--output", tmp_path / "s.csv", "--window", 50)
    done = call(RUN, "run", model, "--stream", "--input", tmp_path / "s.csv", "--truth")
    decisions = [json.loads(line) for line in done.stdout.splitlines()]
    right = sum(d["label"] == d["truth"] for d in decisions)
    assert f"test: {len(decisions)} windows, accuracy {right / len(decisions):.4f}" in exported


def test_prune_writes_every_member_that_is_right(recordings, fresh, move_poles, tmp_path, capsys, monkeypatch):
    """In float32, with poles moved as far as training moves them, two classes that tie and a wrong member."""
    start, output, table = fresh(epochs=8, d_state=8), tmp_path / "f", tmp_path / "steps.json"
    rows = []  # a device whose step takes a microsecond a pair of states: the largest rate is the fastest
    for k in (1, 2, 4, 8, 16):
        features = step_table.features(step_table.synthetic(16, 1, k, 2, 16, "float32", False))
        rows.append(step_table.Row({"states": features["states"]}, float(2 * k)))
    step_table.save_table(table, step_table.StepTable(1, "cpu", "test", rows))
    move_poles(start.model)
    with torch.no_grad():
        start.model.decoder.weight[1] = start.model.decoder.weight[0]
        start.model.decoder.bias[:2] = 20.0
    save_checkpoint(tmp_path / "start.pt", start)

    def prune():
        prune = ["prune", tmp_path / "start.pt", "--output", output, "--method", "compact", "--rates", "0.25,0.5"]
        prune += ["--max-accuracy-loss", 100, "--workers", 1, "--step-table", table]
        monkeypatch.setattr(sys, "argv", ["edge-ssm-build", *map(str, prune)])
        status, captured = run_command(cli, "edge-ssm-build"), capsys.readouterr()
        return status, captured, json.loads((output / "family.json").read_text())

    status, captured, family = prune()
    assert status == 0, captured.err
    members = {m["rate"]: m for m in family["members"]}
    assert members[0]["agreement"]["cpu"]["ties"] == members[0]["test"]["windows"]
    assert f"{members[0]['test']['windows']} ties, " in captured.out
    assert all(m["agreement"][engine]["max_error"] < 1e-4 for m in members.values() for engine in ("cpu", "reference"))
    assert all(m["agreement"]["cpu"]["bound"] == 1e-4 for m in members.values())
    assert family["chosen"] == 0.5
    broken = output / "candidates" / "rate-0.5-seed-0.pt"
    wrong = load_checkpoint(broken)
    with torch.no_grad():
        wrong.model.decoder.weight *= 1e5
        wrong.model.decoder.bias *= 1e5
    save_checkpoint(broken, wrong)
    status, captured, family = prune()
    assert status == 1
    line = captured.err.splitlines()[-1]
    assert "edge-ssm-build: error: rate 0.5 was not written: the " in line
    assert "bound 1.0e-04" in line
    assert sorted(p.name for p in output.glob("rate-*.safetensors")) == ["rate-0.25.safetensors", "rate-0.safetensors"]
    assert [m["rate"] for m in family["members"] if m["failure"]] == [0.5]
    assert family["chosen"] == 0.25
    assert "in place of rate 0.5, which was not written" in captured.out
    assert (output / "chosen.safetensors").read_bytes() == (output / "rate-0.25.safetensors").read_bytes()


def test_refusals_are_one_line(tmp_path, recordings, fresh, demo_model, capsys, monkeypatch):
    (tmp_path / "bad.pt").write_bytes(b"garbage")
    file = tmp_path / "file"
    file.touch()
    good, other = tmp_path / "good.pt", tmp_path / "other.pt"
    save_checkpoint(good, fresh())
    torch.save({"state_dict": {"layers.0.weight": torch.zeros(3)}}, other)
    train = ["train", "--data", recordings, "--window", 50, "--output"]
    for arguments, status, text in (
        (["train", "--data", "mars", "--window", 5, "--output", tmp_path], 2, "data set 'mars': unknown"),
        ([*train, file], 2, "cannot be created"),
        ([*train, tmp_path / "x", "--d-state", 3], 2, "d_state: 3, expected an even number"),
        ([*train, tmp_path / "x", "--epochs", 0], 2, "--epochs"),
        (["prune", tmp_path / "bad.pt", "--output", tmp_path], 2, "damaged, or not a checkpoint"),
        (["prune", good, "--output", tmp_path / "q", "--method", "luck"], 2, "method 'luck': unknown, expected s4op"),
        (["prune", good, "--output", tmp_path / "q", "--rates", "0.99"], 2, "would empty a layer"),
        (["prune", good, "--output", tmp_path / "q", "--rates", "a"], 2, "--rates 'a': expected numbers"),
        (["prune", good, "--output", tmp_path / "q", "--states", "2"], 2, "--states '2': expected rate"),
        (["prune", good, "--output", tmp_path / "q", "--method", "s4op", "--budget", "global"], 2, "no scores"),
        (["prune", good, "--output", tmp_path / "q", "--step-table", file], 2, "not a step table"),
        (["prune", good, "--output", tmp_path / "q", "--scheduler", "nonsense"], 2, "no Dask scheduler answers"),
        (["prune", other, "--output", tmp_path / "q"], 2, "not a checkpoint of edge-ssm-build"),
        (["report", tmp_path], 2, "family.json: cannot be read"),
        (["export", tmp_path / "none.pt", "--output", tmp_path / "m"], 2, "no such file"),
        (["evaluate", tmp_path / "none.safetensors"], 2, "cannot be read"),
        (["evaluate", demo_model.with_name("demo.csv")], 2, "damaged, or not a checkpoint"),
        (["record", "--data", recordings, "--window", 999, "--output", tmp_path / "s"], 2, "holds a window of 999"),
    ):
        monkeypatch.setattr(sys, "argv", ["edge-ssm-build", *map(str, arguments)])
        assert run_command(cli, "edge-ssm-build") == status, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("edge-ssm-build: error: ")
        assert text in line
    assert not (tmp_path / "m").exists()
    assert not (tmp_path / "q" / "family.json").exists()


def test_no_command_writes_over_what_it_reads(tmp_path, recordings, fresh, capsys, monkeypatch):
    start, arch = tmp_path / "rate-0.5.pt", tmp_path / "arch.safetensors"
    odd, data = tmp_path / "m.safetensors", tmp_path / "d.npz"
    save_checkpoint(start, fresh())
    odd.write_bytes(start.read_bytes())
    arch.touch()
    data.write_bytes(Path(recordings).read_bytes())
    link = tmp_path / "link.safetensors"
    link.symlink_to(start)
    kept = {path: path.read_bytes() for path in (start, odd, arch, data)}
    lost = "too, which would be lost; name another file"
    for arguments, text in (
        (["export", start, "--output", start], "expected a name that ends in .safetensors"),
        (["export", start, "--output", tmp_path / "new.onnx"], "expected a name that ends in .safetensors"),
        (["export", odd, "--output", odd], f"--output {odd}: is CHECKPOINT {odd} {lost}"),
        (["export", start, "--output", link], f"--output {link}: is CHECKPOINT {start} {lost}"),
        (["import", odd, "--arch", arch, "--output", odd], f"is CHECKPOINT {odd} {lost}"),
        (["import", odd, "--arch", arch, "--output", arch], f"is --arch {arch} {lost}"),
        (["record", "--data", data, "--window", 5, "--output", data], f"is --data {data} {lost}"),
        (["prune", start, "--output", tmp_path, "--rates", "0.5"], f"--output {start}: is CHECKPOINT {start} {lost}"),
    ):
        monkeypatch.setattr(sys, "argv", ["edge-ssm-build", *map(str, arguments)])
        assert run_command(cli, "edge-ssm-build") == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert text in line
        assert {path: path.read_bytes() for path in kept} == kept
    assert not (tmp_path / "new.onnx").exists()


@pytest.mark.slow
def test_a_checkpoint_is_known_by_its_content(tmp_path, fresh):
    for name in ("ck.safetensors", "ck.onnx"):
        save_checkpoint(tmp_path / name, fresh())
        assert "every label equal" in build("export", tmp_path / name, "--output", tmp_path / "out.safetensors")
        assert build("evaluate", tmp_path / name).startswith("test: ")


def test_a_training_costs_none_of_other_settings(tmp_path, recordings, capsys, monkeypatch):
    train = ["train", "--data", recordings, "--window", 50, "--output", tmp_path, "--batch", 16]
    small = ["--d-model", 8, "--d-state", 4, "--epochs", 1]

    def status(*more):
        monkeypatch.setattr(sys, "argv", ["edge-ssm-build", *map(str, [*train, *small, *more])])
        return run_command(cli, "edge-ssm-build"), capsys.readouterr().err

    place = tmp_path / "checkpoint.pt"
    assert status()[0] == 0
    before = place.read_bytes()
    refused = "was trained with other settings or data; use another --output or delete it\n"
    for more in (["--seed", 1], ["--d-model", 4], ["--prenorm"], ["--epochs", 2]):
        assert status(*more) == (2, f"edge-ssm-build: error: {place}: {refused}")
        assert place.read_bytes() == before
    assert status()[0] == 0  # the same again gives the same
    assert load_checkpoint(place).history == parse_checkpoint(before, "before").history
    place.unlink()
    monkeypatch.setattr(checkpoint_module, "save_checkpoint", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        status()
    monkeypatch.setattr(checkpoint_module, "save_checkpoint", save_checkpoint)
    assert (tmp_path / "resume.pt").exists()
    code, message = status("--prenorm")  # weights of the same shapes, another network
    assert code == 2
    assert "resume.pt: left by a run with other settings" in message
    assert status()[0] == 0
    assert place.exists()


def test_the_help_names_every_entry_of_the_registries():
    from edge_ssm_build.data.datasets import BUILTIN
    from edge_ssm_build.importers.checkpoints import FORMATS
    from edge_ssm_build.pruning import importance, plan, states

    def help_of(command, option):
        return next(p for p in cli.commands[command].params if option in p.opts)

    for entries, command, option in (
        (BUILTIN, "train", "--data"),
        (BUILTIN, "record", "--data"),
        (plan.METHODS, "prune", "--method"),
        (FORMATS, "import", "--from"),
        (FORMATS, "verify", "--from"),
    ):
        text = help_of(command, option).help
        assert all(re.search(rf"\b{re.escape(name)}\b", text) for name in entries), (command, option)
    for entries, option in (
        (states.METHODS, "--states-method"),
        (importance.BUDGETS, "--budget"),
        (importance.BYPASSES, "--bypass"),
    ):
        assert tuple(help_of("prune", option).type.choices) == tuple(entries)
    for name, command in cli.commands.items():
        undescribed = [p.opts for p in command.params if isinstance(p, click.Option) and not p.help]
        assert not undescribed, name
