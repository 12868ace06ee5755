"""The shipped firmware profiles are valid, complete and found by board."""

import pytest

from edge_ssm import profiles
from edge_ssm.errors import InputRefused


def test_every_shipped_profile_is_valid_and_each_board_has_one_default_a_mode_set():
    loaded = profiles.load_all()
    assert len(loaded) >= 10
    for named in loaded:
        profile = named.profile
        assert profile.source
        assert 1 <= profile.cpu.cores <= 6
        assert profile.gpu.streaming_multiprocessors in (4, 8)
    modes = [(p.profile.board, p.profile.super, p.profile.power_mode) for p in loaded]
    assert len(set(modes)) == len(modes)
    defaults = [(p.profile.board, p.profile.super) for p in loaded if p.profile.default]
    assert len(set(defaults)) == len(defaults)


def test_a_board_is_known_by_its_device_tree(tmp_path):
    (tmp_path / "compatible").write_bytes(b"nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005\0nvidia,tegra234\0")
    board = profiles.board_name(tmp_path)
    assert board == "p3767-0005"
    assert {p.profile.board for p in profiles.matching(board)} == {"Jetson Orin Nano 8GB"}
    assert profiles.board_name(tmp_path / "none") is None


def test_a_profile_with_a_wrong_field_is_named(tmp_path, monkeypatch):
    good = (profiles.folder() / "orin-nano-8gb-7w.toml").read_text()
    (tmp_path / "bad.toml").write_text(good.replace("cores = 4", 'cores = "four"'))
    monkeypatch.setattr(profiles, "_SHIPPED", tmp_path)
    with pytest.raises(InputRefused, match=r"bad\.toml: .*cores"):
        profiles.load_all()
