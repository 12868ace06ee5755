"""Real data for the host tool's tests, without a download. Modules here are skipped if torch is missing."""

import numpy as np
import pytest

from edge_ssm_build.data import datasets


@pytest.fixture(scope="session")
def recordings(demo_stream, tmp_path_factory):
    """The demo's recording, cut by exercise into a user's own .npz."""
    rows = np.genfromtxt(demo_stream, delimiter=",", skip_header=1, dtype=str)
    values, names = rows[:, :-1].astype(float), rows[:, -1]
    labels = sorted(set(names))
    x = values.reshape(-1, 50, values.shape[1])
    y = np.array([labels.index(name) for name in names[::50]])
    order = np.random.default_rng(0).permutation(len(x))
    arrays = {"labels": labels, "channels": ["ax", "ay", "az", "wx", "wy", "wz"], "sample_rate_hz": 50.0}
    for i, split in enumerate(datasets.SPLITS):
        chosen = order[i::3]
        arrays |= {f"{split}_x": x[chosen], f"{split}_y": y[chosen]}
    path = tmp_path_factory.mktemp("data") / "wrist.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session")
def data(recordings):
    return datasets.load(str(recordings))


@pytest.fixture
def move_poles():
    """A function that gives every operator a slow state, as training does: exp(dt A) - 1 then cancels in float32."""
    import torch

    def move(model):
        with torch.no_grad():
            for ssm in model.ssms():
                ssm.log_dt.fill_(-6.9)
                ssm.log_A_real[:, 0] = -6.0
                ssm.A_imag[:, 0] = 0.0
                ssm.C[:, 0] *= 30.0

    return move


@pytest.fixture
def fresh(data, recordings):
    """A function that makes an untrained checkpoint of any form."""

    from edge_ssm_build.training.checkpoint import Recipe, new_checkpoint
    from edge_ssm_build.training.network import Config

    def make(epochs=2, **options):
        config = Config(d_input=6, d_output=len(data.labels), **({"d_model": 8, "d_state": 4} | options))
        return new_checkpoint(data, str(recordings), config, Recipe(window=50, epochs=epochs, batch=16))

    return make
