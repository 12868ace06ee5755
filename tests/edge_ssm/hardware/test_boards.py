"""Firmware profiles: the shipped ones are valid and complete, and found by board and name of the power mode."""

from pathlib import Path

import pytest

from edge_ssm.errors import InputRefused, UsageError
from edge_ssm.hardware import boards

CONF = """\
# comment
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=25W >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
< PM_CONFIG DEFAULT=1 >
"""


@pytest.fixture
def jetson(tmp_path, monkeypatch):
    """The files of an Orin Nano 8GB with the "Super" modes."""
    tree = tmp_path / "device-tree"
    tree.mkdir()
    (tree / "compatible").write_bytes(b"nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0")
    conf, status = tmp_path / "nvpmodel.conf", tmp_path / "status"
    conf.write_text(CONF)
    for name, value in (("NVPMODEL_CONF", conf), ("NVPMODEL_STATUS", status)):
        monkeypatch.setattr(boards, name, value)
    monkeypatch.setattr(boards, "board_name", lambda of=boards.board_name: of(tree))
    monkeypatch.setattr(boards, "power_mode", lambda of=boards.power_mode: of(conf, status))
    return conf, status


def test_every_shipped_profile_is_valid_and_each_board_has_one_default_a_mode_set():
    loaded = boards.load_all()
    assert len(loaded) >= 30
    for named in loaded:
        profile = named.profile
        assert profile.sources
        assert profile.cpu.cores is None or all(core < profile.cpu.cores for core in profile.runtime.affinity)
        if profile.gpu:
            assert profile.gpu.streaming_multiprocessors in (4, 6, 8, 14, 16)
            assert profile.power.rails
            assert profile.jetpack is not None
            assert {"modes", "bandwidth", "rails", "thermal", "runtime"} <= set(profile.sources)
        assert boards.describe(named).startswith(named.name)
    modes = [(p.profile.board, p.profile.super, p.profile.power_mode) for p in loaded]
    assert len(set(modes)) == len(modes)
    defaults = [(p.profile.board, p.profile.super) for p in loaded if p.profile.default]
    assert sorted(set(defaults)) == sorted({(p.profile.board, p.profile.super) for p in loaded})
    assert len(set(defaults)) == len(defaults)


def test_a_board_is_recognised_by_its_device_tree(tmp_path):
    (tmp_path / "compatible").write_bytes(b"nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005\0nvidia,tegra234\0")
    board = boards.board_name(tmp_path)
    assert board == "p3767-0005"
    assert {p.profile.board for p in boards.profiles_of(board)} == {"Jetson Orin Nano 8GB"}
    assert boards.board_name(tmp_path / "none") is None
    (tmp_path / "compatible").write_bytes(b"raspberrypi,5-model-b\0brcm,bcm2712\0")
    assert boards.profiles_of(boards.board_name(tmp_path))[0].name == "raspberry-pi-5"


def test_a_power_mode_is_recognised_by_its_name_not_its_number(jetson):
    conf, status = jetson
    assert boards.power_mode() == "25W"  # the configuration's default, as long as none was set
    status.write_text("pmode:0002 fmode:fanNull")
    assert boards.power_mode() == "MAXN_SUPER"
    assert boards.detect().name == "orin-nano-8gb-super-maxn-super"
    status.write_text("pmode:0000 fmode:fanNull")
    assert boards.detect().name == "orin-nano-8gb-super-15w"
    # The same number and name, where the configuration has no Super set.
    conf.write_text(CONF.replace("< POWER_MODEL ID=2 NAME=MAXN_SUPER >", "< POWER_MODEL ID=2 NAME=7W >"))
    assert boards.detect().name == "orin-nano-8gb-15w"
    status.write_text("pmode:0009")
    assert boards.power_mode() is None
    assert boards.detect() is None
    conf.unlink()
    assert boards.power_mode() is None


def test_a_profile_of_another_machine_causes_a_warning_that_names_both(jetson):
    named, warning = boards.select("auto")
    assert (named.name, warning) == ("orin-nano-8gb-super-25w", "")
    assert boards.select("orin-nano-8gb-super-25w")[1] == ""
    named, warning = boards.select("orin-nano-8gb-super-15w")
    assert named.name == "orin-nano-8gb-super-15w"
    assert "orin-nano-8gb-super-15w (15W)" in warning
    assert "orin-nano-8gb-super-25w (p3767-0005, power mode 25W)" in warning
    with pytest.raises(UsageError, match="'orin': unknown; edge-ssm boards list"):
        boards.select("orin")
    jetson[0].write_text(CONF.replace("25W", "33W"))
    named, warning = boards.select("auto")
    assert named is None
    assert "no profile fits this machine (p3767-0005, power mode 33W)" in warning


def test_a_profile_with_a_wrong_field_is_refused_with_its_name(tmp_path, monkeypatch):
    good = (boards.folder() / "orin-nano-8gb-7w.toml").read_text()
    (tmp_path / "bad.toml").write_text(good.replace("cores = 4", 'cores = "four"'))
    monkeypatch.setattr(boards, "_SHIPPED", tmp_path)
    with pytest.raises(InputRefused, match=r"bad\.toml: .*cores"):
        boards.load_all()


@pytest.mark.parametrize(
    "content", [b'board = "\xe9"', b"a = " + b"[" * 5000, b"a = " + b"9" * 5000, b"\xff\xfe", b"a = "]
)
def test_anything_but_toml_is_refused_with_the_name_of_the_file(content):
    """The parser raises different exceptions for bad UTF-8, deep nesting and long numbers (found by fuzzing)."""
    with pytest.raises(InputRefused, match=r"^p\.toml: "):
        boards.decode(Path("p.toml"), content)


def test_a_profile_with_one_temperature_is_described():
    """The other one is optional (found by fuzzing)."""
    good = (boards.folder() / "orin-nano-8gb-7w.toml").read_text()
    for left_out in ("passive_c", "critical_c"):
        text = "".join(line for line in good.splitlines(keepends=True) if not line.startswith(left_out))
        assert text != good
        page = boards.describe(boards.decode(Path("p.toml"), text.encode()))
        assert ("clocks are reduced" in page) == (left_out != "passive_c")
        assert ("shutdown at" in page) == (left_out != "critical_c")
