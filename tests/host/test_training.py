"""Training and pruning: what is promised of a run that is killed, repeated, or given bad input."""

import json
import pickle

import numpy as np
import pytest

from edge_ssm.errors import InputRefused, RunFailed, UsageError

torch = pytest.importorskip("torch", reason="the host tool needs torch: pip install 'edge-ssm[host]'")

from edge_ssm_build import datasets, pruning, training  # noqa: E402


class Killed(Exception):
    pass


def weights(model):
    return torch.cat([v.double().ravel() for v in model.state_dict().values()])


def test_training_learns_real_recordings(fresh, data):
    checkpoint = fresh(epochs=25, d_model=16)
    before = training.score(checkpoint.model, *validation(checkpoint, data))
    reached = training.fit(checkpoint, data, checkpoint.recipe)
    assert reached.loss < before.loss
    assert reached.balanced_accuracy > 2 / len(data.labels)
    # The model is left at the epoch whose score is returned.
    assert training.score(checkpoint.model, *validation(checkpoint, data)) == reached


def validation(checkpoint, data):
    x, y = training.split_windows(data, "validation", checkpoint.recipe.window)
    return training.as_input(x, checkpoint.spec), torch.from_numpy(y)


def killed_after(monkeypatch, writes):
    """Let so many states be written, then die, as a kill between two epochs would."""
    original, left = training.write_torch, [writes]

    def write(path, content):
        original(path, content)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(training, "write_torch", write)


def test_a_killed_run_goes_on_to_the_same_result(fresh, data, tmp_path, monkeypatch):
    whole, broken, resumed = fresh(epochs=5), fresh(epochs=5), fresh(epochs=5)
    expected = training.fit(whole, data, whole.recipe)
    with monkeypatch.context() as patch:
        killed_after(patch, 3)
        with pytest.raises(Killed):
            training.fit(broken, data, broken.recipe, tmp_path / "resume.pt")
    reached = training.fit(resumed, data, resumed.recipe, tmp_path / "resume.pt")
    assert reached == expected
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_another_run_s_state_is_not_taken_over(fresh, data, tmp_path):
    first = fresh(epochs=1)
    training.fit(first, data, first.recipe, tmp_path / "resume.pt")
    other = fresh(epochs=2)
    with pytest.raises(InputRefused, match="other settings"):
        training.fit(other, data, other.recipe, tmp_path / "resume.pt")


def test_checkpoints_come_back_as_they_were_and_damaged_ones_are_refused(fresh, tmp_path):
    checkpoint = fresh(norm="batch")
    checkpoint.model.ssms()[1].bypass([2])
    path = tmp_path / "c.pt"
    training.save_checkpoint(path, checkpoint)
    loaded = training.load_checkpoint(path)
    assert torch.equal(weights(loaded.model), weights(checkpoint.model))
    assert loaded.model.active() == checkpoint.model.active()
    assert loaded.recipe == checkpoint.recipe
    content = path.read_bytes()
    code = pickle.dumps(pytest.fail, protocol=2)
    for i, bad in enumerate((content[:300], content[: len(content) // 2], b"", b"garbage", code)):
        path.write_bytes(bad)
        with pytest.raises(InputRefused, match=r"c\.pt: ") as caught:
            training.load_checkpoint(path)
        assert "\n" not in str(caught.value), i
    torch.save({"edge_ssm_checkpoint": 1, "config": {}}, path)
    with pytest.raises(InputRefused, match="parts that do not fit"):
        training.load_checkpoint(path)
    with pytest.raises(InputRefused, match="no such file"):
        training.load_checkpoint(tmp_path / "none.pt")


def test_a_loss_that_is_not_finite_is_one_clear_error(fresh, data):
    checkpoint = fresh()
    with torch.no_grad():
        checkpoint.model.decoder.bias.fill_(float("nan"))
    with pytest.raises(RunFailed, match="the loss is nan in epoch 1, step 1"):
        training.fit(checkpoint, data, checkpoint.recipe)


def test_the_depth_law_by_hand():
    # Shares of layers 1, 2, 3 are 2 : 4 : 8; layer 0 is touched only when they are full.
    assert pruning.allocate(100, 4, 14, "depth") == [0, 2, 4, 8]
    assert pruning.allocate(100, 4, 140, "depth") == [0, 20, 40, 80]
    assert pruning.allocate(10, 3, 18, "depth") == [0, 9, 9]
    assert pruning.allocate(10, 3, 20, "depth") == [2, 9, 9]
    assert pruning.allocate(10, 1, 5, "depth") == [5]
    assert pruning.allocate(10, 2, 6, "uniform") == [3, 3]
    with pytest.raises(UsageError, match="would empty a layer"):
        pruning.allocate(10, 3, 28, "depth")


@pytest.mark.parametrize("budget", pruning.BUDGETS)
def test_a_larger_budget_never_gives_back(budget):
    before = [0] * 4
    for total in range(4 * 31 + 1):
        after = pruning.allocate(32, 4, total, budget, before)
        assert after == pruning.allocate(32, 4, total, budget)
        assert sum(after) == total
        assert max(after) <= 31
        assert all(b >= a for a, b in zip(before, after, strict=True))
        before = after


def family(fresh, data, folder, seeds=(0, 1)):
    start = fresh(epochs=8)
    plan = pruning.plan(start, [0.25, 0.5, 0.75], seeds, "s4op", "depth")
    return pruning.prune(start, data, plan, folder), plan


def test_the_family_is_nested_and_its_winners_are_the_best_by_validation(fresh, data, tmp_path):
    members, plan = family(fresh, data, tmp_path)
    assert plan.epochs == 1  # one eighth of 8
    active = [set(range(8)) for _ in range(2)]
    for member in members:
        model = training.load_checkpoint(tmp_path / member.checkpoint).model
        assert [len(a) for a in model.active()] == member.active
        assert 16 - sum(member.active) == round(member.rate * 16)
        assert min(member.active) >= 1
        for left, now in zip(active, model.active(), strict=True):
            assert set(now) <= left
        active = [set(a) for a in model.active()]
        scores = []
        for seed in plan.seeds:
            candidate = training.load_checkpoint(tmp_path / "candidates" / f"rate-{member.rate:g}-seed-{seed}.pt")
            scores.append(candidate.history[-1]["validation"]["balanced_accuracy"])
        assert member.validation.balanced_accuracy == max(scores)
    assert [m["rate"] for m in json.loads((tmp_path / "family.json").read_text())["members"]] == [0.25, 0.5, 0.75]
    assert members[0].parameters > members[1].parameters > members[2].parameters


def test_a_killed_search_goes_on_to_the_same_family(fresh, data, tmp_path, monkeypatch):
    expected, _ = family(fresh, data, tmp_path / "whole")
    with monkeypatch.context() as patch:
        killed_after(patch, 5)
        with pytest.raises(Killed):
            family(fresh, data, tmp_path / "broken")
    resumed, _ = family(fresh, data, tmp_path / "broken")
    assert resumed == expected
    with pytest.raises(UsageError, match="another plan"):
        family(fresh, data, tmp_path / "broken", seeds=(7,))


@pytest.mark.parametrize(
    ("rates", "seeds", "method", "message"),
    [
        ([], [0], "s4op", "rates: "),
        ([0.5, 0.3], [0], "s4op", "rates: "),
        ([0.0], [0], "s4op", "rates: "),
        ([1.0], [0], "s4op", "rates: "),
        ([float("nan")], [0], "s4op", "rates: "),
        ([0.99], [0], "s4op", "would empty a layer"),
        ([0.5], [], "s4op", "seeds: "),
        ([0.5], [1, 1], "s4op", "seeds: "),
        ([0.5], [0], "luck", "method 'luck': unknown"),
    ],
)
def test_plans_that_can_not_be(fresh, rates, seeds, method, message):
    with pytest.raises(UsageError, match=message):
        pruning.plan(fresh(), rates, seeds, method, "depth")


def test_a_pruned_checkpoint_is_no_start(fresh):
    start = fresh()
    start.model.ssms()[0].bypass([1])
    with pytest.raises(UsageError, match="already pruned"):
        pruning.plan(start, [0.5], [0], "s4op", "depth")


def test_only_arrays_come_out_of_a_pickle(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.array({"x": [np.arange(3.0)], "y": np.array([1])}, dtype=object), allow_pickle=True)
    assert datasets._unpickle_npy(path.read_bytes())["x"][0].tolist() == [0, 1, 2]

    class Hostile:
        def __reduce__(self):
            return (print, ("executed",))

    np.save(path, np.array({"x": Hostile()}, dtype=object), allow_pickle=True)
    with pytest.raises(InputRefused, match=r"calls for builtins\.print"):
        datasets._unpickle_npy(path.read_bytes())


def test_a_user_s_file_is_checked(recordings, tmp_path):
    with np.load(recordings) as archive:
        good = {name: archive[name] for name in archive.files}
    path = tmp_path / "own.npz"
    for change, message in (
        ({"test_x": None}, "no array test_x"),
        ({"test_y": good["test_y"][:-1]}, "test_end must ascend"),
        ({"train_x": np.full_like(good["train_x"], np.nan)}, "train_x holds a non-finite value"),
        ({"train_y": good["train_y"] + 0.5}, "train_y must be class numbers"),
        ({"validation_x": good["validation_x"][..., :3]}, "expected one number"),
        ({"labels": good["labels"][:2]}, "2 labels"),
        ({"test_x": good["test_x"][:0], "test_y": good["test_y"][:0]}, "test_x has shape"),
    ):
        np.savez(path, **{k: v for k, v in (good | change).items() if v is not None})
        with pytest.raises(InputRefused, match=message):
            datasets.load(str(path))
    path.write_bytes(b"PK garbage")
    with pytest.raises(InputRefused, match=r"can't be read as \.npz"):
        datasets.load(str(path))
    with pytest.raises(UsageError, match="data set 'nothing': unknown"):
        datasets.load("nothing")


def test_a_window_longer_than_every_recording_is_refused(data):
    with pytest.raises(InputRefused, match="no window of 51 samples"):
        training.split_windows(data, "test", 51)


def test_digits_are_split_without_overlap():
    data = datasets.load("digits")
    rows = [{r.tobytes() for r in data.splits[split].x} for split in datasets.SPLITS]
    assert [len(data.splits[split].x) for split in datasets.SPLITS] == [1079, 359, 359]
    assert len(rows[0] | rows[1] | rows[2]) == sum(map(len, rows))
