"""Firmware profiles: what a board promises in a power mode, and how the runtime behaves there. One TOML file each, with
the source of its figures."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from edge_ssm.errors import InputRefused, UsageError

_SHIPPED = Path(__file__).parents[1] / "firmware_profiles"
_CHECKOUT = Path(__file__).parents[2] / "firmware_profiles"
NVPMODEL_CONF = Path("/etc/nvpmodel.conf")
NVPMODEL_STATUS = Path("/var/lib/nvpmodel/status")
GpuWaits = Literal["spin", "yield", "block"]


class Cpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    cores: int | None = None
    """Online; None where the machine decides."""
    max_mhz: float | None = None
    """None where the mode sets no cap."""
    model: str | None = None


class Gpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    streaming_multiprocessors: int
    max_mhz: float | None = None
    compute_capability: str | None = None


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    max_mhz: float | None = None
    bandwidth_gb_s: float | None = None


class Power(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rails: list[str]
    """That a sensor of the board measures."""
    budget_w: float | None = None
    """Of the whole module; None where the mode has none."""


class Thermal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    passive_c: float | None = None
    """From here clocks are taken back."""
    critical_c: float | None = None


class JetPack(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    oldest: str
    newest: str


class Runtime(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    engines: list[str]
    """That ``auto`` may choose from, in the order in which equals are preferred."""
    affinity: list[int]
    """Cores that the loop keeps to; empty: any."""
    gpu_waits: GpuWaits
    chunk: int = 1
    deadline_periods: float = 1.0
    """A decision later than so many sample periods after its sample is a miss."""
    max_temperature_c: float | None = None
    max_power_w: float | None = None


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    board: str
    modules: list[str]
    """Ids as the device tree's ``compatible`` names them, such as p3767-0003."""
    default: bool
    super: bool
    """Whether it belongs to the "Super" set of modes of JetPack 6.2 and later."""
    cpu: Cpu
    memory: Memory
    power: Power
    thermal: Thermal
    runtime: Runtime
    sources: dict[str, str]
    """Where the figures come from, by group."""
    power_mode: str | None = None
    """As nvpmodel names it. Mode numbers differ between installs; match by name."""
    gpu: Gpu | None = None
    jetpack: JetPack | None = None


@dataclass(frozen=True)
class NamedProfile:
    name: str
    """The file's name without its suffix."""
    profile: Profile


def folder() -> Path:
    """Where the profiles lie: inside the installed package, or at the top of a checkout."""
    return _SHIPPED if _SHIPPED.is_dir() else _CHECKOUT


def load_all(naming: str = "") -> list[NamedProfile]:
    """All profiles whose text has ``naming`` in it, by name: reading them all takes a start's time.

    Raises InputRefused, naming the file and the field, for one that is not valid.
    """
    contents = [(path, path.read_bytes()) for path in sorted(folder().glob("*.toml"))]
    return [decode(path, content) for path, content in contents if naming.encode() in content]


def decode(path: Path, content: bytes) -> NamedProfile:
    """The profile in a file's bytes. Raises InputRefused, naming the file and the field."""
    try:
        return NamedProfile(path.stem, msgspec.toml.decode(content, type=Profile))
    except RecursionError:
        raise InputRefused(f"{path}: nested too deeply; expected a firmware profile") from None
    except (msgspec.MsgspecError, ValueError) as error:  # not UTF-8, or digits without end: a plain ValueError
        raise InputRefused(f"{path}: {error}") from None


def load(name: str) -> NamedProfile:
    """By name. Raises UsageError for one that is not there."""
    for path in folder().glob("*.toml"):
        if path.stem == name:
            return decode(path, path.read_bytes())
    raise UsageError(f"profile {name!r}: unknown; edge-ssm profiles list shows them")


def board_name(device_tree: Path = Path("/proc/device-tree")) -> str | None:
    """The id of this machine's module in its device tree: p3767-0005 and the like, raspberrypi,5-model-b; or None."""
    try:
        compatible = (device_tree / "compatible").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    for entry in compatible:
        if found := re.search(r"p3\d{3}-\d{4}$", entry):
            return found[0]
    return next((entry for entry in compatible if entry.startswith("raspberrypi,")), None)


def power_mode(conf: Path = NVPMODEL_CONF, status: Path = NVPMODEL_STATUS) -> str | None:
    """The name that nvpmodel's configuration gives the mode that is set, or its default; None where there is none.

    ``status`` holds ``pmode:0002``, a number that means something only beside ``conf``'s own
    ``< POWER_MODEL ID=2 NAME=15W >``.
    """
    try:
        text = conf.read_text(errors="replace")
    except OSError:
        return None
    names = dict(re.findall(r"^\s*<\s*POWER_MODEL\s+ID=0*(\d+)\s+NAME=(\S+)\s*>", text, re.MULTILINE))
    default = re.search(r"^\s*<\s*PM_CONFIG\s+DEFAULT=0*(\d+)", text, re.MULTILINE)
    number = default[1] if default else None
    try:
        found = re.search(r"pmode:0*(\d+)", status.read_text(errors="replace"))
        number = found[1] if found else number
    except OSError:
        pass
    return names.get(number) if number is not None else None


def matching(board: str) -> list[NamedProfile]:
    return [p for p in load_all(board) if board in p.profile.modules]


def detect() -> NamedProfile | None:
    """This machine's, by its module and the name of its power mode; None if none fits.

    A mode that is in the plain and in the "Super" set is of the set that nvpmodel's configuration has.
    """
    board = board_name()
    if board is None:
        return load("generic-x86-64") if platform.machine() == "x86_64" else None
    found, mode = matching(board), power_mode()
    if mode is None:
        return next((p for p in found if p.profile.default and p.profile.power_mode is None), None)
    of_mode = [p for p in found if p.profile.power_mode == mode]
    try:
        is_super = "NAME=MAXN_SUPER" in NVPMODEL_CONF.read_text(errors="replace")
    except OSError:
        is_super = False
    return next((p for p in of_mode if p.profile.super == is_super), of_mode[0] if of_mode else None)


def chosen(name: str) -> tuple[NamedProfile | None, str]:
    """The profile that ``--profile`` asks for, "auto" by detection, and a warning where it is not the machine's."""
    here = detect()
    if name == "auto":
        board, mode = board_name(), power_mode()
        if here is None and board is not None:
            return None, f"no profile fits this machine ({board}, power mode {mode or 'unknown'}); give --profile"
        return here, ""
    wanted = load(name)
    mode = power_mode()
    actual = f"{board_name() or platform.machine()}, power mode {mode or 'unknown'}"
    if here is None or here.name != wanted.name:
        is_here = f"{here.name} ({actual})" if here else actual
        return (
            wanted,
            f"profile {wanted.name} ({wanted.profile.power_mode or 'no mode'}) is not this machine's: {is_here}",
        )
    return wanted, ""


def describe(named: NamedProfile) -> str:
    """For people."""
    p = named.profile
    clock = f" at {p.cpu.max_mhz:g} MHz" if p.cpu.max_mhz else ", no cap"
    lines = [
        f"{named.name}: {p.board}" + (f", {p.power_mode}" if p.power_mode else "") + (", default" if p.default else ""),
        f"  cpu      {p.cpu.cores or 'all'} cores{clock}" + (f" ({p.cpu.model})" if p.cpu.model else ""),
    ]
    if p.gpu:
        capped = f" at {p.gpu.max_mhz:g} MHz" if p.gpu.max_mhz else ", no cap"
        lines.append(f"  gpu      {p.gpu.streaming_multiprocessors} multiprocessors{capped}")
    if p.memory.bandwidth_gb_s:
        lines.append(f"  memory   {p.memory.bandwidth_gb_s:g} GB/s")
    budget = f"{p.power.budget_w:g} W" if p.power.budget_w else "no budget"
    lines.append(f"  power    {budget}; rails {', '.join(p.power.rails) or 'none'}")
    temperatures = [f"clocks go back at {p.thermal.passive_c:g} C"] if p.thermal.passive_c else []
    temperatures += [f"off at {p.thermal.critical_c:g} C"] if p.thermal.critical_c else []
    if temperatures:
        lines.append(f"  thermal  {', '.join(temperatures)}")
    if p.jetpack:
        lines.append(f"  jetpack  {p.jetpack.oldest} to {p.jetpack.newest}")
    r = p.runtime
    cores = ", ".join(map(str, r.affinity)) or "any"
    limits = [f"deadline {r.deadline_periods:g} sample periods"]
    limits += [f"under {r.max_temperature_c:g} C"] if r.max_temperature_c else []
    limits += [f"under {r.max_power_w:g} W"] if r.max_power_w else []
    lines.append(
        f"  runtime  engines {', '.join(r.engines)}; core {cores}; gpu waits {r.gpu_waits}; {', '.join(limits)}"
    )
    lines += [f"  source   {group}: {text}" for group, text in p.sources.items()]
    return "\n".join(lines)
