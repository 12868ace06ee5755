"""Firmware profiles: what a board promises in a power mode. One TOML file each, with the source of its figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge_ssm.errors import InputRefused

_SHIPPED = Path(__file__).parent / "firmware_profiles"
_CHECKOUT = Path(__file__).parent.parent / "firmware_profiles"


class Cpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    cores: int
    max_mhz: float | None = None
    """None where the mode sets no cap."""


class Gpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    streaming_multiprocessors: int
    max_mhz: float | None = None


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    max_mhz: float | None = None


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    board: str
    modules: list[str]
    """Module ids as the device tree's ``compatible`` names them, such as p3767-0003."""
    power_mode: str
    """As nvpmodel names it. Mode numbers differ between installs; match by name."""
    default: bool
    super: bool
    """Whether it belongs to the "Super" set of modes of JetPack 6.2 and later."""
    cpu: Cpu
    gpu: Gpu
    memory: Memory
    source: str


@dataclass(frozen=True)
class NamedProfile:
    name: str
    """The file's name without its suffix."""
    profile: Profile


def folder() -> Path:
    """Where the profiles lie: inside the installed package, or at the top of a checkout."""
    return _SHIPPED if _SHIPPED.is_dir() else _CHECKOUT


def load_all() -> list[NamedProfile]:
    """All profiles, by name. Raises InputRefused, naming the file and the field, for one that is not valid."""
    loaded = []
    for path in sorted(folder().glob("*.toml")):
        try:
            loaded.append(NamedProfile(path.stem, msgspec.toml.decode(path.read_bytes(), type=Profile)))
        except msgspec.MsgspecError as error:
            raise InputRefused(f"{path}: {error}") from None
    return loaded


def board_name(device_tree: Path = Path("/proc/device-tree")) -> str | None:
    """The Jetson module id (such as p3767-0005) of this machine's device tree, or None."""
    try:
        compatible = (device_tree / "compatible").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    for entry in compatible:
        if "p3767-" in entry:
            return entry[entry.index("p3767-") :][:10]
    return None


def matching(board: str) -> list[NamedProfile]:
    return [p for p in load_all() if board in p.profile.modules]
