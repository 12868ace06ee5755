"""Firmware profiles: the properties of a board in a power mode, and how the runtime uses it.

Each profile is a TOML file in ``firmware_profiles/`` that also names the source of its figures.
"""

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
"""How the CPU waits for the GPU."""


class Cpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The CPU in a power mode."""

    cores: int | None = None
    """Number of online cores; None if the machine decides."""
    max_mhz: float | None = None
    """Highest clock; None if the mode sets no limit."""
    model: str | None = None


class Gpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The GPU in a power mode."""

    streaming_multiprocessors: int
    max_mhz: float | None = None
    """Highest clock; None if the mode sets no limit."""
    compute_capability: str | None = None


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The memory in a power mode."""

    max_mhz: float | None = None
    """Highest clock; None if the mode sets no limit."""
    bandwidth_gb_s: float | None = None


class Power(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The power supply in a power mode."""

    rails: list[str]
    """Rails that a sensor of the board measures."""
    budget_w: float | None = None
    """Power budget of the whole module in watts; None if the mode has none."""


class Thermal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The board's thermal limits."""

    passive_c: float | None = None
    """Temperature in degrees Celsius from which clocks are reduced."""
    critical_c: float | None = None
    """Temperature in degrees Celsius at which the board shuts down."""


class JetPack(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The JetPack releases that have the power mode."""

    oldest: str
    newest: str


class Runtime(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How edge-ssm runs on the board."""

    engines: list[str]
    """Engines that ``auto`` may choose, in order of preference among equally fast ones."""
    affinity: list[int]
    """Cores that the loop is pinned to; empty for any core."""
    gpu_waits: GpuWaits
    chunk: int = 1
    deadline_periods: float = 1.0
    """Deadline of a decision after its sample, in sample periods."""
    max_temperature_c: float | None = None
    max_power_w: float | None = None


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of a profile's file."""

    board: str
    modules: list[str]
    """Module identifiers in the device tree's ``compatible`` property, such as p3767-0003."""
    default: bool
    """Whether the board starts in this power mode."""
    super: bool
    """Whether the mode belongs to the "Super" set of JetPack 6.2 and later."""
    cpu: Cpu
    memory: Memory
    power: Power
    thermal: Thermal
    runtime: Runtime
    sources: dict[str, str]
    """Source of the figures in each group."""
    power_mode: str | None = None
    """Power mode, by nvpmodel's name: the numbers of modes differ between installations."""
    gpu: Gpu | None = None
    jetpack: JetPack | None = None


@dataclass(frozen=True)
class NamedProfile:
    """A firmware profile and its name."""

    name: str
    """Name of the profile's file without the suffix."""
    profile: Profile


def folder() -> Path:
    """Return the folder of the profiles: inside the installed package, or at the top of a checkout."""
    return _SHIPPED if _SHIPPED.is_dir() else _CHECKOUT


def load_all(containing: str = "") -> list[NamedProfile]:
    """Load all profiles, or those whose text contains ``containing``, sorted by name.

    Parsing every file takes about as long as starting Python, which is why a search can skip most of them.

    Raises InputRefused, naming the file and the field, for an invalid profile.
    """
    contents = [(path, path.read_bytes()) for path in sorted(folder().glob("*.toml"))]
    return [decode(path, content) for path, content in contents if containing.encode() in content]


def decode(path: Path, content: bytes) -> NamedProfile:
    """Decode the content of a profile's file. Raises InputRefused, naming the file and the field."""
    try:
        return NamedProfile(path.stem, msgspec.toml.decode(content, type=Profile))
    except RecursionError:
        raise InputRefused(f"{path}: nested too deeply; expected a firmware profile") from None
    except (msgspec.MsgspecError, ValueError) as error:  # ValueError: not UTF-8, or a number with too many digits
        raise InputRefused(f"{path}: {error}") from None


def load(name: str) -> NamedProfile:
    """Load a profile by name. Raises UsageError if there is none of that name."""
    for path in folder().glob("*.toml"):
        if path.stem == name:
            return decode(path, path.read_bytes())
    raise UsageError(f"profile {name!r}: unknown; edge-ssm boards list shows them")


def board_name(device_tree: Path = Path("/proc/device-tree")) -> str | None:
    """Return the module's identifier in the device tree, such as p3767-0005 or raspberrypi,5-model-b; None without."""
    try:
        compatible = (device_tree / "compatible").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    for entry in compatible:
        if module := re.search(r"p3\d{3}-\d{4}$", entry):
            return module[0]
    return next((entry for entry in compatible if entry.startswith("raspberrypi,")), None)


def power_mode(conf: Path = NVPMODEL_CONF, status: Path = NVPMODEL_STATUS) -> str | None:
    """Return the name of the current power mode in nvpmodel's configuration; None on a machine without nvpmodel.

    ``status`` holds a text such as ``pmode:0002``. The number refers to the line ``< POWER_MODEL ID=2 NAME=15W >`` of
    ``conf``, which also names the default that applies until a mode is set.
    """
    try:
        text = conf.read_text(errors="replace")
    except OSError:
        return None
    names = dict(re.findall(r"^\s*<\s*POWER_MODEL\s+ID=0*(\d+)\s+NAME=(\S+)\s*>", text, re.MULTILINE))
    default = re.search(r"^\s*<\s*PM_CONFIG\s+DEFAULT=0*(\d+)", text, re.MULTILINE)
    number = default[1] if default else None
    try:
        current = re.search(r"pmode:0*(\d+)", status.read_text(errors="replace"))
        number = current[1] if current else number
    except OSError:
        pass
    return names.get(number) if number is not None else None


def profiles_of(board: str) -> list[NamedProfile]:
    """Return the profiles of a board, given its module's identifier (``board_name``)."""
    return [p for p in load_all(board) if board in p.profile.modules]


def detect() -> NamedProfile | None:
    """Return this machine's profile, by its module and the name of its power mode; None if no profile fits.

    A mode name that is both in the plain and in the "Super" set belongs to the set of nvpmodel's configuration.
    """
    board = board_name()
    if board is None:
        return load("generic-x86-64") if platform.machine() == "x86_64" else None
    profiles, mode = profiles_of(board), power_mode()
    if mode is None:
        return next((p for p in profiles if p.profile.default and p.profile.power_mode is None), None)
    same_mode = [p for p in profiles if p.profile.power_mode == mode]
    try:
        is_super = "NAME=MAXN_SUPER" in NVPMODEL_CONF.read_text(errors="replace")
    except OSError:
        is_super = False
    return next((p for p in same_mode if p.profile.super == is_super), same_mode[0] if same_mode else None)


def select(name: str) -> tuple[NamedProfile | None, str]:
    """Return the profile of this name, or for "auto" the machine's own, and a warning if it does not fit the machine.

    The warning is empty if the profile fits. Raises UsageError for an unknown name.
    """
    detected = detect()
    board, mode = board_name(), power_mode()
    if name == "auto":
        if detected is None and board is not None:
            return None, f"no profile fits this machine ({board}, power mode {mode or 'unknown'}); give --board"
        return detected, ""
    entry = load(name)
    if detected is not None and detected.name == entry.name:
        return entry, ""
    machine = f"{board or platform.machine()}, power mode {mode or 'unknown'}"
    if detected is not None:
        machine = f"{detected.name} ({machine})"
    own_mode = entry.profile.power_mode or "no mode"
    return entry, f"profile {entry.name} ({own_mode}) does not match this machine: {machine}"


def describe(entry: NamedProfile) -> str:
    """Return a profile as a page of text."""
    p = entry.profile
    cpu_clock = f" at {p.cpu.max_mhz:g} MHz" if p.cpu.max_mhz else ", no clock limit"
    lines = [
        f"{entry.name}: {p.board}" + (f", {p.power_mode}" if p.power_mode else "") + (", default" if p.default else ""),
        f"  cpu      {p.cpu.cores or 'all'} cores{cpu_clock}" + (f" ({p.cpu.model})" if p.cpu.model else ""),
    ]
    if p.gpu:
        gpu_clock = f" at {p.gpu.max_mhz:g} MHz" if p.gpu.max_mhz else ", no clock limit"
        lines.append(f"  gpu      {p.gpu.streaming_multiprocessors} multiprocessors{gpu_clock}")
    if p.memory.bandwidth_gb_s:
        lines.append(f"  memory   {p.memory.bandwidth_gb_s:g} GB/s")
    budget = f"{p.power.budget_w:g} W" if p.power.budget_w else "no budget"
    lines.append(f"  power    {budget}; rails {', '.join(p.power.rails) or 'none'}")
    temperatures = [f"clocks are reduced at {p.thermal.passive_c:g} C"] if p.thermal.passive_c else []
    temperatures += [f"shutdown at {p.thermal.critical_c:g} C"] if p.thermal.critical_c else []
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
