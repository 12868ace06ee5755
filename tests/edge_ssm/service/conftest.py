"""Models and a recording for runs."""

import pytest
from support.networks import random_network, samples_for
from support.service_runs import smaller

from edge_ssm.formats import artifact


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two models of one family and one of other labels, and a recording."""
    folder = tmp_path_factory.mktemp("small")
    network = random_network(h=8, window=10, rate=1000.0)
    artifact.save(folder / "m.safetensors", network, {})
    artifact.save(folder / "s.safetensors", smaller(network, [0, 3, 4]), {})
    artifact.save(folder / "other.safetensors", random_network(1, h=8, window=25, rate=1000.0, d_output=2), {})
    artifact.save(folder / "wide.safetensors", random_network(d_input=4), {})
    rows = samples_for(network, 0, 20_000)
    (folder / "s.csv").write_text("c0,c1\n" + "".join(f"{a!r},{b!r}\n" for a, b in rows.tolist()))
    return folder
