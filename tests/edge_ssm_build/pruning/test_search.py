"""The search: resumed, on other machines, with dying workers, with a target; and the report of a family."""

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import jobs

from edge_ssm.errors import InputRefused, RunFailed, UsageError
from edge_ssm.formats import artifact
from edge_ssm.profiler import step_table

torch = pytest.importorskip("torch", reason="the host tool needs torch: pip install 'edge-ssm[host]'")

from edge_ssm_build.export.artifact import network_of
from edge_ssm_build.pruning import executors, search
from edge_ssm_build.pruning.family import StepTimer
from edge_ssm_build.pruning.plan import METHODS, make_plan
from edge_ssm_build.pruning.report import write_report
from edge_ssm_build.pruning.target import Target
from edge_ssm_build.training import loop
from edge_ssm_build.training.checkpoint import load_checkpoint, save_checkpoint

RATES = (0.25, 0.5, 0.75)


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def one_thread():
    """As the command has it here and in workers: with more, sums of the float64 kernel come out otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def start(fresh, data):
    checkpoint = fresh(epochs=8)
    reached = loop.fit(checkpoint, data, checkpoint.recipe)
    checkpoint.history.append({"stage": "train", "validation": loop.asdict(reached)})
    return checkpoint


def family(start, data, folder, seeds=(0, 1), method="s4op", rates=RATES, printed=None, **options):
    """Search as the command does; ``printed`` gets the lines that it prints. Returns the content of family.json."""
    plan = replace(make_plan(METHODS[method], rates, start), seeds=seeds)
    lines = [] if printed is None else printed
    settings = search.SearchSettings(folder, method, **options)
    result = search.search(start, data, plan, settings, on_member=lambda member: lines.append(member.summary()))
    lines += result.summary()
    result.raise_for_problems()
    return result.content


def timeless(result):
    """Without what is measured anew each time."""
    return [{k: v for k, v in m.items() if k not in ("step_us", "base_step_us")} for m in result["members"]]


@pytest.mark.slow
def test_the_family_is_nested_and_its_winners_are_the_best_by_validation(start, data, tmp_path):
    printed = []
    result = family(start, data, tmp_path, printed=printed)
    written = json.loads((tmp_path / "family.json").read_text())
    assert written["members"] == json.loads(json.dumps(result["members"]))
    for member in written["members"]:
        assert member["failure"] is None
        assert member["agreement"]["cpu"]["max_error"] < 1e-4
        assert member["agreement"]["cpu"]["labels_differing"] == 0
    assert [m["rate"] for m in result["members"]] == [0, *RATES]
    active = [set(range(8)) for _ in range(2)]
    for member in result["members"]:
        checkpoint = load_checkpoint(tmp_path / member["checkpoint"])
        shipped = artifact.load(tmp_path / member["artifact"])
        assert [len(b.ssm.active) for b in shipped.network.blocks] == member["active"]
        assert shipped.file_bytes == member["file_bytes"]
        assert shipped.provenance["scores"]["test"] == member["test"]
        assert 16 - sum(member["active"]) == round(member["rate"] * 16)
        for left, now in zip(active, checkpoint.model.active(), strict=True):
            assert set(now) <= left
        active = [set(a) for a in checkpoint.model.active()]
        if member["rate"]:
            scores = {}
            for seed in (0, 1):
                path = tmp_path / "candidates" / f"rate-{member['rate']:g}-seed-{seed}.pt"
                scores[seed] = load_checkpoint(path).history[-1]["validation"]["balanced_accuracy"]
            assert member["validation"]["balanced_accuracy"] == max(scores.values())
        assert member["step_us"] > 0
    parameters = [m["parameters"] for m in result["members"]]
    assert parameters == sorted(parameters, reverse=True)
    assert [line.split()[1].rstrip(":") for line in printed if "step" in line] == ["0", "0.25", "0.5", "0.75"]
    assert printed[-4].startswith("  rate 0: ")


@pytest.mark.slow
def test_a_killed_search_goes_on_to_the_same_family(start, data, tmp_path, monkeypatch):
    expected = family(start, data, tmp_path / "whole")
    original, left = search.make_candidate, [3]

    def killed(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(search, "make_candidate", killed)
        with pytest.raises(Killed):
            family(start, data, tmp_path / "broken")
    assert not (tmp_path / "broken" / "family.json").exists()
    assert len(list((tmp_path / "broken" / "candidates").glob("*.pt"))) == 3
    resumed = family(start, data, tmp_path / "broken")
    assert timeless(resumed) == timeless(expected)
    for member in resumed["members"]:
        name = member["artifact"]
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(UsageError, match="another plan"):
        family(start, data, tmp_path / "broken", seeds=(7,))


def kill_one_child(parent, until):
    """SIGKILL the first worker process of ``parent`` that has been at work for a moment."""
    while not until.is_set():
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = status.read_text().rsplit(")", 1)[1].split()
                name = (status.parent / "cmdline").read_bytes()
            except OSError:
                continue
            if int(fields[1]) == parent and b"spawn_main" in name and int(fields[11]) > 100:
                os.kill(int(status.parent.name), signal.SIGKILL)
                return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_processes_give_the_same_family_and_one_that_dies_is_replaced(start, data, tmp_path):
    expected = family(start, data, tmp_path / "here", rates=(0.5,))
    until = threading.Event()
    with ThreadPoolExecutor(1) as pool, executors.local(2) as make_executor:
        killer = pool.submit(kill_one_child, os.getpid(), until)
        result = family(start, data, tmp_path / "there", make_executor=make_executor, rates=(0.5,))
        until.set()
        assert killer.result()
    assert timeless(result) == timeless(expected)
    assert sorted(p.name for p in (tmp_path / "there" / "candidates").iterdir()) == [
        "rate-0.5-seed-0.pt",
        "rate-0.5-seed-1.pt",
    ]


@pytest.mark.slow
def test_a_dask_cluster_gives_the_same_family_though_a_worker_is_killed(start, data, tmp_path):
    distributed = pytest.importorskip("distributed")
    expected = family(start, data, tmp_path / "here", seeds=(0, 1, 2), rates=(0.5,))
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
    with cluster:
        struck = []

        def strike():
            # Once a worker is at a candidate, it is killed as a machine that goes down would be.
            with distributed.Client(cluster.scheduler_address, set_as_default=False) as client:
                while not struck:
                    for address, tasks in client.processing().items():
                        if any("run_job" in str(task) for task in tasks):
                            (pid,) = client.run(os.getpid, workers=[address]).values()
                            os.kill(pid, signal.SIGKILL)
                            struck.append(address)
                            return
                    time.sleep(0.02)

        with ThreadPoolExecutor(1) as pool, executors.cluster(cluster.scheduler_address) as make_executor:
            done = pool.submit(strike)
            options = {"make_executor": make_executor, "is_remote": True}
            result = family(start, data, tmp_path / "there", seeds=(0, 1, 2), rates=(0.5,), **options)
            struck.append(None)
            done.result()
    assert struck[0] is not None
    assert timeless(result) == timeless(expected)
    assert len(list((tmp_path / "there" / "candidates").iterdir())) == 3


@pytest.mark.slow
def test_no_scheduler_is_one_clear_line():
    pytest.importorskip("distributed")
    with pytest.raises(UsageError, match="no Dask scheduler answers"), executors.cluster("tcp://127.0.0.1:1"):
        pass


@pytest.mark.slow
def test_jobs_that_kill_every_worker_end_the_run():
    with executors.local(2) as make_executor, pytest.raises(RunFailed, match="died 3 times over the same 1 candidates"):
        list(executors.run_all(make_executor, jobs.broken, ["a"]))


@pytest.mark.slow
def test_the_first_job_that_fails_ends_the_run():
    with executors.local(2) as make_executor, pytest.raises(RunFailed, match="no good"):
        list(executors.run_all(make_executor, jobs.refuses, ["a", "b", "c"]))


def test_a_failed_candidate_leaves_no_family(start, data, tmp_path):
    start.recipe = replace(start.recipe, lr=1e30)
    with pytest.raises(RunFailed, match=r"the loss is (nan|inf)"):
        family(start, data, tmp_path)
    assert not (tmp_path / "family.json").exists()
    assert list((tmp_path / "candidates").iterdir()) == []


# --- targets ---------------------------------------------------------------------------------------------------


def table_of_states(path):
    """A device whose step takes a microsecond a pair of states."""
    rows = []
    for k in (1, 2, 4, 8, 16):
        network = step_table.synthetic(16, 1, k, 2, 16, "float32", False)
        rows.append(step_table.Row({"states": step_table.features(network)["states"]}, float(2 * k)))
    step_table.save_table(path, step_table.StepTable(1, "cpu", "test", rows))
    return step_table.load_table(path)


@pytest.mark.slow
def test_a_latency_target_stops_at_the_first_member_that_meets_it(start, data, tmp_path):
    table = table_of_states(tmp_path / "t.json")
    result = family(start, data, tmp_path / "f", target=Target(latency_us=17.0), table=table)
    # 16 operators of 2 pairs are 32 us; half of them 16.
    assert [m["step_us"] for m in result["members"]] == [32.0, 24.0, 16.0]
    assert result["chosen"] == 0.5
    assert (tmp_path / "f" / "chosen.safetensors").read_bytes() == (
        tmp_path / "f" / "rate-0.5.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_an_accuracy_target_takes_the_fastest_within(start, data, tmp_path):
    table = table_of_states(tmp_path / "t.json")
    result = family(start, data, tmp_path / "all", target=Target(accuracy_loss=100.0), table=table)
    assert result["chosen"] == 0.75
    base = result["members"][0]["validation"]["balanced_accuracy"]
    within = [m["rate"] for m in result["members"] if base - m["validation"]["balanced_accuracy"] <= 0]
    none = family(start, data, tmp_path / "none", target=Target(accuracy_loss=0.0), table=table)
    assert none["chosen"] in within


@pytest.mark.slow
def test_a_size_target(start, data, tmp_path):
    sizes = {m["rate"]: m["file_bytes"] for m in family(start, data, tmp_path / "all")["members"]}
    result = family(start, data, tmp_path / "f", target=Target(size_bytes=max(sizes[0.5], sizes[0.25]) + 400))
    assert result["chosen"] is not None
    chosen = next(m for m in result["members"] if m["rate"] == result["chosen"])
    assert (tmp_path / "f" / "chosen.safetensors").stat().st_size == chosen["file_bytes"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_target_must_be_finite(bad):
    with pytest.raises(UsageError, match="--target-latency"):
        Target(latency_us=bad)
    with pytest.raises(UsageError, match="--max-accuracy-loss"):
        Target(accuracy_loss=bad)


@pytest.mark.slow
def test_a_target_that_nothing_meets_says_how_near_it_came(start, data, tmp_path):
    table = table_of_states(tmp_path / "t.json")
    with pytest.raises(RunFailed, match=r"no member meets it; the smallest, rate 0.75, has step 8.00 us"):
        family(start, data, tmp_path / "f", target=Target(latency_us=1.0), table=table)
    assert json.loads((tmp_path / "f" / "family.json").read_text())["chosen"] is None
    assert not (tmp_path / "f" / "chosen.safetensors").exists()


# --- members that fail -----------------------------------------------------------------------------------------


def spoil(folder, rate, seed=0):
    """A finished candidate gets logits so large that float32 cannot hold them to 1e-4; its labels stay as they are."""
    path = folder / "candidates" / f"rate-{rate:g}-seed-{seed}.pt"
    checkpoint = load_checkpoint(path)
    with torch.no_grad():
        checkpoint.model.decoder.weight *= 1e5
        checkpoint.model.decoder.bias *= 1e5
    save_checkpoint(path, checkpoint)


@pytest.fixture
def finished(start, data, tmp_path):
    """A folder with the candidates of every rate, one a rate."""
    family(start, data, tmp_path / "f", seeds=(0,))
    return tmp_path / "f"


@pytest.mark.slow
def test_a_member_that_fails_costs_no_other_one(start, data, finished):
    spoil(finished, 0.5)
    with pytest.raises(
        RunFailed, match=r"^rate 0\.5 was not written: the .* engine's stream differs .*family\.json lists"
    ):
        family(start, data, finished, seeds=(0,))
    members = {m["rate"]: m for m in json.loads((finished / "family.json").read_text())["members"]}
    assert sorted(members) == [0, *RATES]
    assert "largest error of a logit" in members[0.5]["failure"]
    assert (members[0.5]["artifact"], members[0.5]["test"], members[0.5]["agreement"]) == (None, None, None)
    assert not (finished / "rate-0.5.safetensors").exists()  # that of the first search is gone
    for rate in (0, 0.25, 0.75):
        assert members[rate]["failure"] is None
        shipped = artifact.load(finished / members[rate]["artifact"])
        assert shipped.provenance["scores"]["test"] == members[rate]["test"]


@pytest.mark.slow
def test_the_next_best_member_stands_in_for_a_chosen_one_that_fails(start, data, finished, tmp_path):
    table, printed = table_of_states(tmp_path / "t.json"), []
    spoil(finished, 0.75)
    target = Target(accuracy_loss=100.0)
    with pytest.raises(RunFailed, match=r"^rate 0\.75 was not written: [^;]*; [^;]*family\.json lists"):
        family(start, data, finished, seeds=(0,), target=target, table=table, printed=printed)
    assert json.loads((finished / "family.json").read_text())["chosen"] == 0.5
    assert (finished / "chosen.safetensors").read_bytes() == (finished / "rate-0.5.safetensors").read_bytes()
    assert printed[-1].endswith("chosen.safetensors, in place of rate 0.75, which was not written")


@pytest.mark.slow
def test_a_search_goes_on_past_a_member_that_meets_the_target_and_fails(start, data, finished, tmp_path):
    table = table_of_states(tmp_path / "t.json")
    spoil(finished, 0.5)
    with pytest.raises(RunFailed, match=r"^rate 0\.5 was not written"):
        family(start, data, finished, seeds=(0,), target=Target(latency_us=17.0), table=table)
    result = json.loads((finished / "family.json").read_text())
    assert [m["rate"] for m in result["members"]] == [0, *RATES]
    assert result["chosen"] == 0.75


@pytest.mark.slow
def test_where_every_member_fails_nothing_is_chosen(start, data, finished, tmp_path):
    table = table_of_states(tmp_path / "t.json")
    family(start, data, finished, seeds=(0,), target=Target(accuracy_loss=100.0), table=table)
    assert (finished / "chosen.safetensors").exists()
    for rate in RATES:
        spoil(finished, rate)
    with pytest.raises(RunFailed, match=r"no member meets it; the smallest, rate 0, has step 32\.00 us"):
        family(start, data, finished, seeds=(0,), target=Target(latency_us=17.0), table=table)
    assert not (finished / "chosen.safetensors").exists()
    assert [p.name for p in finished.glob("*.safetensors")] == ["rate-0.safetensors"]


@pytest.mark.slow
def test_a_rate_that_fails_ends_the_search_but_costs_none_before_it(start, data, finished):
    damaged = finished / "candidates" / "rate-0.5-seed-0.pt"
    content = damaged.read_bytes()
    damaged.write_bytes(b"")
    (finished / "family.json").unlink()
    with pytest.raises(RunFailed, match=r"^rate 0\.5 could not be made: .*rate-0\.5-seed-0\.pt: damaged"):
        family(start, data, finished, seeds=(0,))
    result = json.loads((finished / "family.json").read_text())
    assert [m["rate"] for m in result["members"]] == [0, 0.25]
    assert result["failed_rate"]["rate"] == 0.5
    damaged.write_bytes(content)
    assert family(start, data, finished, seeds=(0,))["failed_rate"] is None


# --- report ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_report_holds_every_member_and_is_self_contained(start, data, tmp_path):
    pytest.importorskip("matplotlib")
    table = table_of_states(tmp_path / "t.json")
    family(start, data, tmp_path / "a <b>", target=Target(latency_us=17.0), table=table)
    family(start, data, tmp_path / "energy", method="energy", seeds=(0,))
    runs, output = [tmp_path / "a <b>", tmp_path / "energy"], tmp_path / "report"
    output.mkdir()
    written = write_report(runs, output)
    rows = json.loads((output / "report.json").read_text())
    assert [r["rate"] for r in rows] == [0, 0.25, 0.5, 0, *RATES]
    assert [r["rate"] for r in rows if r["chosen"]] == [0.5]
    lines = (output / "report.csv").read_text().splitlines()
    assert len(lines) == 1 + len(rows)
    page = (output / "report.html").read_text()
    assert "a &lt;b&gt;" in page
    assert "<b>" not in page
    assert page.count("<svg") == 2
    assert "src=" not in page
    assert 'class="chosen"' in page
    for name in ("tradeoff.png", "layers.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert {r["failure"] for r in rows} == {None}
    assert all(r["max_error"] < 1e-4 for r in rows)
    before = {p: p.read_bytes() for p in written}
    write_report(runs, output)
    assert {p: p.read_bytes() for p in written} == before


@pytest.mark.slow
def test_the_report_names_a_member_that_failed(start, data, finished, tmp_path):
    pytest.importorskip("matplotlib")
    spoil(finished, 0.5)
    with pytest.raises(RunFailed):
        family(start, data, finished, seeds=(0,))
    write_report([finished], tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<td>not written</td>") == 1
    assert "rate 0.5: not written. the " in page
    assert [r["rate"] for r in json.loads((tmp_path / "report.json").read_text()) if r["failure"]] == [0.5]


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"version": 1}', b"\xff\xfe"])
def test_a_folder_without_a_family_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "family.json").write_bytes(content)
    with pytest.raises(InputRefused, match=r"family\.json: "):
        write_report([tmp_path], tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_step_timer_measures_side_by_side(start):
    network = network_of(start)
    timer = StepTimer(network, np.zeros((10, 6)), "cpu", None)
    steps, base = timer.time([network, network])
    assert len(steps) == 2
    assert 0.2 < steps[0] / base < 5
