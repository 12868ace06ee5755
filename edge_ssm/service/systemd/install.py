"""Instances of edge-ssm@.service on this machine, or below a folder that becomes a machine's root: put there, taken
away. Everything is checked before the first file is written, and what was written is taken back if a later one fails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_ssm import files as edge_ssm_files
from edge_ssm.errors import RunFailed, UsageError
from edge_ssm.io.address import Endpoint
from edge_ssm.service import plan as service_plan
from edge_ssm.service import settings as service_settings

_SHIPPED = Path(__file__).parents[2] / "systemd"
_CHECKOUT = Path(__file__).parents[3] / "systemd"

NAME = r"[a-z][a-z0-9_-]{0,21}"
"""Part of the name of the user that the unit runs as, which has at most 31 characters."""
GROUP = "edge-ssm"
CONFIGURATION = Path("etc/edge-ssm")
UNITS = Path("etc/systemd/system")
OPENINGS = ("loopback", "network", "serial", "iio", "gpu")
"""Drop-ins, each of which opens the unit's sandbox for one thing."""
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")
"""What the unit's sandbox hides (ProtectHome, PrivateTmp)."""
_GENERAL = {
    "edge-ssm@.service": UNITS / "edge-ssm@.service",
    "edge-ssm-compile.service": UNITS / "edge-ssm-compile.service",
    "edge-ssm@.socket": UNITS / "edge-ssm@.socket",
    "edge-ssm.sysusers": Path("etc/sysusers.d/edge-ssm.conf"),
    "edge-ssm.tmpfiles": Path("etc/tmpfiles.d/edge-ssm.conf"),
}
_ANYWHERE = "/usr/bin/env edge-ssm"
"""How the shipped units name the command."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    name: str
    config: str
    openings: tuple[str, ...] = ()
    """Of OPENINGS."""
    socket: bool = False
    """systemd opens the socket that the source listens on."""
    root: Path = Path("/")
    start: bool = True
    force: bool = False
    """Replace a configuration, model or key that is there and differs."""


@dataclass(frozen=True)
class _File:
    path: Path
    """Below the root."""
    content: bytes
    guarded: bool = False
    """For the service's group only: it may hold a password. Never replaced by another content unasked."""


def folder() -> Path:
    """Where the units lie: inside the installed package, or at the top of a checkout."""
    return _SHIPPED if _SHIPPED.is_dir() else _CHECKOUT


def unit(name: str, kind: str = "service") -> str:
    """Raises UsageError for what can't be an instance."""
    if not re.fullmatch(NAME, name):
        raise UsageError(f"{name[:60]!r}: expected a name of at most 22 of a-z, 0-9, - and _, a letter first")
    return f"edge-ssm@{name}.{kind}"


def install(request: Request, say: Say) -> None:
    """Raises UsageError before anything is changed, RunFailed where a change could not be made."""
    unit(request.name)
    if not request.root.is_dir():
        raise UsageError(f"--root {request.root}: no such folder; expected the root of a system")
    plan = service_plan.check(request.config)
    _check_openings(request, plan)
    _check_visible(request, plan)
    files = [*_units(request, plan, say), *_own_files(request)]
    for file in files:
        there = request.root / file.path
        if file.guarded and not request.force and there.exists() and there.read_bytes() != file.content:
            raise UsageError(f"{there}: is there and differs from the new one; --force replaces it")
    _need_root("install")
    for warning in plan.warnings:
        say(f"warning: {warning}")
    _put(request.root, files)
    enabled = [unit(request.name), *([unit(request.name, "socket")] if request.socket else [])]
    on_root = [] if request.root == Path("/") else [f"--root={request.root}"]
    _systemctl(*on_root, "enable", "--quiet", *enabled)
    say(f"{request.root / CONFIGURATION / request.name}.toml: {unit(request.name)} runs it")
    if on_root:
        return
    _systemctl("daemon-reload")
    if request.start:
        if request.socket:
            _systemctl("restart", unit(request.name, "socket"))
        _systemctl("restart", unit(request.name))
        say(f"{unit(request.name)}: started; edge-ssm service status {request.name}")


def uninstall(name: str, purge: bool, root: Path, say: Say) -> None:
    """Stop an instance and take it away; ``purge``: its configuration, snapshots and cache too.

    Raises UsageError where there is none, RunFailed.
    """
    service, socket = unit(name), unit(name, "socket")
    configured = root / CONFIGURATION / f"{name}.toml"
    drop_ins = [root / UNITS / f"{of}.d" for of in (service, socket)]
    enabled = _enabled(root)
    if name not in enabled and not configured.exists() and not any(map(Path.exists, drop_ins)):
        raise UsageError(f"{service}: not installed; edge-ssm service status shows what is")
    others = (enabled | {path.stem for path in (root / CONFIGURATION).glob("*.toml")}) - {name}
    _need_root("uninstall")
    on_root = [] if root == Path("/") else [f"--root={root}"]
    if (root / UNITS / "edge-ssm@.service").exists():
        _systemctl(*on_root, "disable", "--quiet", *([] if on_root else ["--now"]), socket, service)
    try:
        for place in drop_ins:
            shutil.rmtree(place, ignore_errors=True)
        if purge:
            for place in [configured, *_its_alone(root, name)]:
                place.unlink(missing_ok=True)
            for kind in ("lib", "cache"):
                (root / f"var/{kind}/edge-ssm/{name}").unlink(missing_ok=True)
                shutil.rmtree(root / f"var/{kind}/private/edge-ssm/{name}", ignore_errors=True)
        if not others:
            for place in _GENERAL.values():
                (root / place).unlink(missing_ok=True)
    except OSError as error:
        raise RunFailed(f"{error.filename}: can't be removed ({error.strerror})") from None
    if not on_root:
        _systemctl("daemon-reload")
    left = "" if purge else f"; its configuration {configured} and its state stay, see --purge"
    say(f"{service}: removed{left}")


def _enabled(root: Path) -> set[str]:
    links = (root / UNITS).glob("*.wants/edge-ssm@*.service")
    return {link.name.removeprefix("edge-ssm@").removesuffix(".service") for link in links}


def _its_alone(root: Path, name: str) -> list[Path]:
    """Models and keys beside the configurations that only this instance's names."""
    named = {}
    for path in (root / CONFIGURATION).glob("*.toml"):
        with suppress(UsageError, OSError):  # One that can't be read keeps nothing.
            named[path.stem] = set(_beside(service_settings.parse(path.read_bytes(), path.name)))
    mine = named.pop(name, set()).difference(*named.values())
    return [root / CONFIGURATION / place for path in mine for place in (path, f"{path}.sig")]


def _beside(values: dict[str, Any]) -> list[str]:
    """The relative paths among a configuration's."""
    found = [values.get(field, []) for field in service_settings.FILES]
    paths = [path for one in found for path in ([one] if isinstance(one, str) else one)]
    return [path for path in paths if not os.path.isabs(path) and ".." not in Path(path).parts]


def _need_root(command: str) -> None:
    if os.geteuid() != 0:
        raise UsageError(f"service {command}: needs root; run it with sudo")


def _check_openings(request: Request, plan: service_plan.Plan) -> None:
    """Whether the sandbox lets through what the configuration names. Raises UsageError."""
    given = {*request.openings, *(["loopback"] if "network" in request.openings else [])}
    if request.socket and plan.source.scheme not in service_plan.LISTENING:
        key = service_settings.where(request.config, "input")
        raise UsageError(f"{key}: does not listen; --socket is for {', '.join(service_plan.LISTENING)}")
    for opening, field in plan.needs.items():
        if opening in given or (field == "input" and request.socket):
            continue
        raise UsageError(
            f"{service_settings.where(request.config, field)}: the service can't reach it; add --{opening}"
        )


def _check_visible(request: Request, plan: service_plan.Plan) -> None:
    """Whether files lie where the service can read and write them. Raises UsageError."""
    settings, state = plan.settings, f"/var/lib/edge-ssm/{request.name}"
    for field, found in (("input", plan.source), ("output", plan.sink)):
        if found.scheme == "file" or found.scheme.startswith("unix"):
            _check_path(request, field, found, state)
    if settings.state is not None and os.path.normpath(settings.state) != state:
        key = service_settings.where(request.config, "state")
        raise UsageError(f"{key}: {settings.state!r}; the service keeps its state in {state}, leave it out")


def _check_path(request: Request, field: str, found: Endpoint, state: str) -> None:
    path, key = os.path.normpath(found.path), service_settings.where(request.config, field)
    if not os.path.isabs(path):
        raise UsageError(f"{key}: {path!r}; a service has no folder that it starts in, give the whole path")
    if _below(path, HIDDEN):
        raise UsageError(f"{key}: {path!r}; hidden from the service, put it elsewhere (such as below /srv or /run)")
    if field == "output" and found.scheme == "file" and not _below(path, (state, "/dev")):
        raise UsageError(f"{key}: {path!r}; the service may write below {state} only")


def _below(path: str, folders: Sequence[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)


def _command(root: Path, say: Say) -> str:
    """The command's path, as the units of ``root`` shall name it. Raises UsageError."""
    path = os.path.join(sysconfig.get_path("scripts"), "edge-ssm")
    if not os.path.exists(path):
        path = shutil.which("edge-ssm") or path
    if not os.path.exists(root / path.lstrip("/")):
        say(f"{root}: has no {path}; its units look for edge-ssm in the usual folders")
        return _ANYWHERE
    if _below(os.path.normpath(path), HIDDEN):
        raise UsageError(
            f"{path}: hidden from the service; install edge-ssm in an environment such as /opt/edge-ssm "
            "(python3 -m venv /opt/edge-ssm), and run this with that one"
        )
    return path


def _units(request: Request, plan: service_plan.Plan, say: Say) -> list[_File]:
    command, files = _command(request.root, say), []
    for name, place in _GENERAL.items():
        text = (folder() / name).read_text()
        files.append(_File(place, text.replace(_ANYWHERE, command).encode()))
    drop_ins = UNITS / f"{unit(request.name)}.d"
    for opening in request.openings:
        name = f"edge-ssm-{opening}.conf"
        files.append(_File(drop_ins / name, (folder() / name).read_bytes()))
    if request.socket:
        files.append(_File(UNITS / f"{unit(request.name, 'socket')}.d" / "address.conf", _listening(plan.source)))
    return files


def _listening(source: Endpoint) -> bytes:
    """The drop-in of the socket unit that has the source's address."""
    kind = "ListenDatagram" if source.scheme == "udp" else "ListenStream"
    if source.scheme == "unix-listen":
        return f"[Socket]\nListenStream=\n{kind}={source.socket_path()}\n".encode()
    host, port = source.host_and_port()
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    allowed = "IPAddressAllow=localhost" if service_plan.loopback(host) else "IPAddressDeny="
    return f"[Socket]\nListenStream=\n{kind}={address}\n{allowed}\n".encode()


def _own_files(request: Request) -> list[_File]:
    """The configuration, and what it names by relative paths, which lies beside it. Raises UsageError."""
    config = Path(request.config)
    content = config.read_bytes()
    files = [_File(CONFIGURATION / f"{request.name}.toml", content, guarded=True)]
    named = service_settings.parse(content, config.name)
    for field in service_settings.FILES:
        found = named.get(field, [])
        for path in [found] if isinstance(found, str) else found:
            key = service_settings.where(request.config, field)
            if os.path.isabs(path):
                _check_public(request.root, path, key)
                continue
            if ".." in Path(path).parts:
                raise UsageError(f"{key}: {path!r}; expected a path below the configuration's folder, or a whole one")
            for beside in (path, f"{path}.sig"):
                if beside == path or (config.parent / beside).exists():
                    content = (config.parent / beside).read_bytes()
                    files.append(_File(CONFIGURATION / beside, content, guarded=True))
    return files


def _check_public(root: Path, path: str, key: str) -> None:
    """A file that stays where it is must be one that the service's user can read."""
    if _below(os.path.normpath(path), HIDDEN):
        raise UsageError(f"{key}: {path!r}; hidden from the service, put it beside the configuration, or below /opt")
    there = root / path.lstrip("/")
    if not there.exists() or there.is_relative_to(root / CONFIGURATION):
        return  # It comes later, or lies where the service's group may read.
    folders = [place for place in there.parents if place != root and place.is_relative_to(root)]
    if not there.stat().st_mode & 0o004 or not all(place.stat().st_mode & 0o001 for place in folders):
        raise UsageError(f"{key}: {path!r}; the service's user can't read it, see chmod o+r (and o+x of its folders)")


def _put(root: Path, files: list[_File]) -> None:
    """All of them or none. Raises RunFailed."""
    before: list[tuple[Path, bytes | None]] = []
    try:
        users = next(file for file in files if file.path == _GENERAL["edge-ssm.sysusers"])
        for file in [users, *(file for file in files if file is not users)]:
            path = root / file.path
            if file.path.parent.parts[:2] == CONFIGURATION.parts:
                _guarded_folder(root, path.parent)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
            before.append((path, path.read_bytes() if path.exists() else None))
            edge_ssm_files.write(path, file.content)
            if file is users:
                _call("systemd-sysusers", f"--root={root}", str(root / file.path))
            if file.guarded:
                os.chown(path, 0, _group(root))
                path.chmod(0o640)
        _call("systemd-tmpfiles", f"--root={root}", "--create", str(root / _GENERAL["edge-ssm.tmpfiles"]))
    except (OSError, RunFailed) as error:
        for path, content in reversed(before):
            if content is None:
                path.unlink(missing_ok=True)
            else:
                edge_ssm_files.write(path, content)
        if isinstance(error, RunFailed):
            raise
        raise RunFailed(f"{error.filename}: can't be written ({error.strerror}); nothing was changed") from None


def _guarded_folder(root: Path, path: Path) -> None:
    for place in [path, *path.parents]:
        if place == root / CONFIGURATION.parent:
            break
        if not place.is_dir():
            place.mkdir(mode=0o750, parents=True)
            os.chown(place, 0, _group(root))


def _group(root: Path) -> int:
    for line in (root / "etc/group").read_text().splitlines():
        name, _, number, *_ = line.split(":")
        if name == GROUP:
            return int(number)
    raise RunFailed(f"{root / 'etc/group'}: no group {GROUP}; systemd-sysusers did not make it")


def _systemctl(*arguments: str) -> None:
    _call("systemctl", *arguments)


def _call(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise RunFailed(f"{command[0]}: can't be run ({error.strerror}); is this a system with systemd?") from None
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split()) or f"status {done.returncode}"
        raise RunFailed(f"{' '.join(command)}: {reason[:300]}")
