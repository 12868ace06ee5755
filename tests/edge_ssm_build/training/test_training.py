"""Training and its data: what is promised of a run that is killed, repeated, or given bad input."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from edge_ssm.errors import InputRefused, RunFailed, UsageError

torch = pytest.importorskip("torch", reason="the host tool needs torch: pip install 'edge-ssm[host]'")

from edge_ssm_build.data import datasets
from edge_ssm_build.training import loop, scoring
from edge_ssm_build.training.checkpoint import CHECKPOINT_VERSION, load_checkpoint, save_checkpoint, write_torch


class Killed(Exception):
    pass


def weights(model):
    return torch.cat([v.double().ravel() for v in model.state_dict().values()])


def test_training_learns_real_recordings(fresh, data):
    checkpoint = fresh(epochs=25, d_model=16)
    before = scoring.score(checkpoint.model, *validation(checkpoint, data))
    reached = loop.fit(checkpoint, data, checkpoint.recipe)
    assert reached.loss < before.loss
    assert reached.balanced_accuracy > 2 / len(data.labels)
    # The model is left at the epoch whose score is returned.
    assert scoring.score(checkpoint.model, *validation(checkpoint, data)) == reached


def validation(checkpoint, data):
    x, y = scoring.split_windows(data, "validation", checkpoint.recipe.window)
    return scoring.as_input(x, checkpoint.spec), torch.from_numpy(y)


def killed_after(monkeypatch, writes):
    """Let so many states be written, then die, as a kill between two epochs would."""
    original, left = write_torch, [writes]

    def write(path, content):
        original(path, content)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(loop, "write_torch", write)


def test_a_killed_run_goes_on_to_the_same_result(fresh, data, tmp_path, monkeypatch):
    whole, broken, resumed = fresh(epochs=5), fresh(epochs=5), fresh(epochs=5)
    expected = loop.fit(whole, data, whole.recipe)
    with monkeypatch.context() as patch:
        killed_after(patch, 3)
        with pytest.raises(Killed):
            loop.fit(broken, data, broken.recipe, tmp_path / "resume.pt")
    reached = loop.fit(resumed, data, resumed.recipe, tmp_path / "resume.pt")
    assert reached == expected
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_another_run_s_state_is_not_taken_over(fresh, data, tmp_path):
    first = fresh(epochs=1)
    loop.fit(first, data, first.recipe, tmp_path / "resume.pt")
    other = fresh(epochs=2)
    with pytest.raises(InputRefused, match="other settings"):
        loop.fit(other, data, other.recipe, tmp_path / "resume.pt")


def test_checkpoints_come_back_as_they_were_and_damaged_ones_are_refused(fresh, tmp_path):
    checkpoint = fresh(norm="batch")
    first, second = checkpoint.model.ssms()
    first.bypass([2])
    # The channel with most states goes after the others lost some: the shared array shrinks with it.
    second.pairs[1:] = 1
    second.kept[1:, 1:] = False
    second.bypass([0])
    path = tmp_path / "c.pt"
    save_checkpoint(path, checkpoint)
    loaded = load_checkpoint(path)
    assert torch.equal(weights(loaded.model), weights(checkpoint.model))
    assert loaded.model.active() == checkpoint.model.active()
    assert loaded.recipe == checkpoint.recipe
    content = path.read_bytes()
    code = pickle.dumps(pytest.fail, protocol=2)
    for i, bad in enumerate((content[:300], content[: len(content) // 2], b"", b"garbage", code)):
        path.write_bytes(bad)
        with pytest.raises(InputRefused, match=r"c\.pt: ") as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value), i
    torch.save({"edge_ssm_checkpoint": CHECKPOINT_VERSION, "config": {}}, path)
    with pytest.raises(InputRefused, match="parts that do not fit"):
        load_checkpoint(path)
    with pytest.raises(InputRefused, match="no such file"):
        load_checkpoint(tmp_path / "none.pt")


def test_distillation_pulls_towards_the_teacher(fresh, data):
    teacher = fresh(epochs=20, d_model=16)
    loop.fit(teacher, data, teacher.recipe)
    x, _ = validation(teacher, data)
    wanted = torch.softmax(scoring.predict(teacher.model, x), dim=1)

    def distance(weight):
        student = fresh(epochs=10, d_model=8)
        recipe = replace(student.recipe, distill=weight)
        loop.fit(student, data, recipe, teacher=teacher.model)
        own = torch.softmax(scoring.predict(student.model, x), dim=1)
        return float((own - wanted).abs().mean())

    assert distance(1.0) < distance(0.0)


def test_a_loss_that_is_not_finite_is_one_clear_error(fresh, data):
    checkpoint = fresh()
    with torch.no_grad():
        checkpoint.model.decoder.bias.fill_(float("nan"))
    with pytest.raises(RunFailed, match="the loss is nan in epoch 1, step 1"):
        loop.fit(checkpoint, data, checkpoint.recipe)


def test_only_arrays_come_out_of_a_pickle(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.array({"x": [np.arange(3.0)], "y": np.array([1])}, dtype=object), allow_pickle=True)
    assert datasets.unpickle_npy(path.read_bytes())["x"][0].tolist() == [0, 1, 2]

    class Hostile:
        def __reduce__(self):
            return (print, ("executed",))

    np.save(path, np.array({"x": Hostile()}, dtype=object), allow_pickle=True)
    with pytest.raises(InputRefused, match=r"calls for builtins\.print"):
        datasets.unpickle_npy(path.read_bytes())


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
    with pytest.raises(InputRefused, match=r"cannot be read as \.npz"):
        datasets.load(str(path))
    with pytest.raises(UsageError, match="data set 'nothing': unknown"):
        datasets.load("nothing")


def test_a_window_longer_than_every_recording_is_refused(data):
    with pytest.raises(InputRefused, match="no window of 51 samples"):
        scoring.split_windows(data, "test", 51)


def test_digits_are_split_without_overlap():
    data = datasets.load("digits")
    rows = [{r.tobytes() for r in data.splits[split].x} for split in datasets.SPLITS]
    assert [len(data.splits[split].x) for split in datasets.SPLITS] == [1079, 359, 359]
    assert len(rows[0] | rows[1] | rows[2]) == sum(map(len, rows))
