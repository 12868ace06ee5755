"""The configuration: read from flags and a file, each mistake told with its line."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_ssm.errors import UsageError
from edge_ssm.service import settings_file
from edge_ssm.service.settings import merge


def load(path, options=None):
    return merge(settings_file.read(str(path)), options or {})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "model.path is missing"),
        ("[model]\npath = 3\n", "line 2: model.path: '3', expected str, got int"),
        ("[model]\npath = 'm'\n\n[source]\ninputt = 'x'\n", "line 5: source.inputt is unknown; expected input"),
        ("[modell]\n", "line 1: 'modell' is unknown; expected a section model"),
        ("model = 'm'\n", "line 1: 'model' is a section"),
        ("[model]\npath = 'm'\n[window]\nhop = 2.5\n", "line 4: window.hop: '2.5', expected int"),
        ("[model]\npath = 'm'\n[gap]\npolicy = 'guess'\n", "line 4: gap.policy: 'guess'"),
        ("[model]\npath = 'm'\n[sink]\nqueue = 0\n", "line 4: sink.queue: '0', expected int >= 1"),
        ("[model]\npath = 'm'\n[state]\ninterval = nan\n", "line 4: state.interval: nan"),
        ("[model]\npath = 'm'\nx = \n", "line 3: not TOML"),
        ("[model]\npath = 'm'\n[metrics]\nprometheus = true\n", "needs metrics.listen"),
        ("\xff", "byte 0: not UTF-8"),
    ],
)
def test_a_configuration_that_is_wrong_says_where(tmp_path, text, problem):
    path = tmp_path / "c.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError) as error:
        load(path)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_flags_come_before_the_file_and_paths_start_at_its_folder(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[model]\npath = 'm.safetensors'\n[window]\nhop = 5\ncarry = true\n")
    made = load(path, {"hop": 7})
    assert (made.model, made.hop, made.carry) == (str(tmp_path / "m.safetensors"), 7, True)


@given(st.binary(max_size=300))
def test_no_configuration_breaks_the_reader(content):
    try:
        settings_file.parse(content, "c.toml")
    except UsageError as error:
        assert "\n" not in str(error)


def test_the_line_of_a_key_is_not_looked_for_within_a_string(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[source]\ninput = """\n[gap]\nmax = 1\n"""\n[model]\npath = "m"\n[gap]\nmax = -1\n')
    with pytest.raises(UsageError, match=r"c.toml, line 9: gap.max: '-1'"):
        load(path)
    path.write_text('[model]\npath = "m"\n[gap]\npolicy = "x"\n')
    with pytest.raises(UsageError, match="'x', expected hold, skip, reset"):
        load(path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="not a regular file"):
        load(tmp_path / "fifo")
