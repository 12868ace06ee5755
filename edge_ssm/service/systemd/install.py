"""Install and remove instances of edge-ssm@.service, on this machine or below a folder that becomes a machine's root.

Everything is checked before the first file is written, and what was written is undone if a later file fails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_ssm import files as edge_ssm_files
from edge_ssm.errors import RunFailed, UsageError
from edge_ssm.io.address import Endpoint
from edge_ssm.service import check, settings_file
from edge_ssm.service.plan import RunPlan, is_loopback

_PACKAGED = Path(__file__).parents[2] / "systemd"
_CHECKOUT = Path(__file__).parents[3] / "systemd"

NAME = r"[a-z][a-z0-9_-]{0,21}"
"""Pattern of an instance's name: part of the name of the unit's user, which has at most 31 characters."""
GROUP = "edge-ssm"
CONFIGURATION = Path("etc/edge-ssm")
UNITS = Path("etc/systemd/system")
PERMISSIONS = ("loopback", "network", "serial", "iio", "gpu")
"""What a drop-in can permit: each opens the unit's sandbox for one requirement of a plan."""
LISTENING = ("tcp-listen", "unix-listen", "udp")
"""Schemes of the sources whose socket systemd may open in their place."""
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")
"""Folders that the unit's sandbox hides (ProtectHome, PrivateTmp)."""
_SHARED_FILES = {
    "edge-ssm@.service": UNITS / "edge-ssm@.service",
    "edge-ssm-compile.service": UNITS / "edge-ssm-compile.service",
    "edge-ssm@.socket": UNITS / "edge-ssm@.socket",
    "edge-ssm.sysusers": Path("etc/sysusers.d/edge-ssm.conf"),
    "edge-ssm.tmpfiles": Path("etc/tmpfiles.d/edge-ssm.conf"),
}
"""Files that all instances share: name of the shipped file, and path below the root."""
_ANY_COMMAND = "/usr/bin/env edge-ssm"
"""How the shipped units call the command."""

Log = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What ``install`` was asked to do."""

    name: str
    config: str
    permissions: tuple[str, ...] = ()
    """Some of PERMISSIONS."""
    socket: bool = False
    """Whether systemd opens the socket on which the source listens."""
    root: Path = Path("/")
    start: bool = True
    force: bool = False
    """Whether to replace an existing configuration, model or key that differs."""


@dataclass(frozen=True)
class _File:
    path: Path
    """Path below the root."""
    content: bytes
    is_guarded: bool = False
    """True for a file that only the service's group may read, because it may hold a password. Without ``force`` it
    never replaces a file that differs."""


def folder() -> Path:
    """Return the folder of the shipped units: inside the installed package, or at the top of a checkout."""
    return _PACKAGED if _PACKAGED.is_dir() else _CHECKOUT


def unit(name: str, kind: str = "service") -> str:
    """Return the name of an instance's unit. Raise UsageError for a name that an instance cannot have."""
    if not re.fullmatch(NAME, name):
        raise UsageError(f"{name[:60]!r}: expected a name of at most 22 of a-z, 0-9, - and _, a letter first")
    return f"edge-ssm@{name}.{kind}"


def install(request: Request, log: Log) -> None:
    """Install an instance, and start it unless the request says otherwise. ``log`` is called with lines for the user.

    Raises
    ------
    UsageError
        The configuration cannot run as a service. Nothing was changed.
    RunFailed
        A file could not be written, or systemd refused.
    """
    unit(request.name)
    if not request.root.is_dir():
        raise UsageError(f"--root {request.root}: no such folder; expected the root of a system")
    plan = check.check(request.config)
    _check_permissions(request, plan)
    _check_paths(request, plan)
    files = [*_unit_files(request, plan, log), *_own_files(request)]
    _check_replaced(request, files)
    _check_root("install")
    for warning in check.warnings(request.config, plan):
        log(f"warning: {warning}")
    _write(request.root, files)
    enabled = [unit(request.name), *([unit(request.name, "socket")] if request.socket else [])]
    other_root = [] if request.root == Path("/") else [f"--root={request.root}"]
    _systemctl(*other_root, "enable", "--quiet", *enabled)
    log(f"{request.root / CONFIGURATION / request.name}.toml: {unit(request.name)} runs it")
    if other_root:
        return
    _systemctl("daemon-reload")
    if request.start:
        if request.socket:
            _systemctl("restart", unit(request.name, "socket"))
        _systemctl("restart", unit(request.name))
        log(f"{unit(request.name)}: started; edge-ssm service status {request.name}")


def uninstall(name: str, purge: bool, root: Path, log: Log) -> None:
    """Stop an instance and remove it; with ``purge`` its configuration, snapshots and cache as well.

    Raises UsageError if there is no such instance, RunFailed if a file cannot be removed.
    """
    service, socket = unit(name), unit(name, "socket")
    configuration = root / CONFIGURATION / f"{name}.toml"
    drop_ins = [root / UNITS / f"{owner}.d" for owner in (service, socket)]
    enabled = _enabled(root)
    if name not in enabled and not configuration.exists() and not any(map(Path.exists, drop_ins)):
        raise UsageError(f"{service}: not installed; edge-ssm service status shows the instances")
    others = (enabled | {path.stem for path in (root / CONFIGURATION).glob("*.toml")}) - {name}
    _check_root("uninstall")
    other_root = [] if root == Path("/") else [f"--root={root}"]
    if (root / UNITS / "edge-ssm@.service").exists():
        _systemctl(*other_root, "disable", "--quiet", *([] if other_root else ["--now"]), socket, service)
    try:
        for path in drop_ins:
            shutil.rmtree(path, ignore_errors=True)
        if purge:
            _purge(root, name)
        if not others:
            for path in _SHARED_FILES.values():
                (root / path).unlink(missing_ok=True)
    except OSError as error:
        raise RunFailed(f"{error.filename}: cannot be removed ({error.strerror})") from None
    if not other_root:
        _systemctl("daemon-reload")
    remainder = "" if purge else f"; its configuration {configuration} and its state stay, see --purge"
    log(f"{service}: removed{remainder}")


def _purge(root: Path, name: str) -> None:
    for path in [root / CONFIGURATION / f"{name}.toml", *_exclusive_files(root, name)]:
        path.unlink(missing_ok=True)
    for kind in ("lib", "cache"):
        (root / f"var/{kind}/edge-ssm/{name}").unlink(missing_ok=True)
        shutil.rmtree(root / f"var/{kind}/private/edge-ssm/{name}", ignore_errors=True)


def _enabled(root: Path) -> set[str]:
    """Return the names of the instances that start at boot."""
    links = (root / UNITS).glob("*.wants/edge-ssm@*.service")
    return {link.name.removeprefix("edge-ssm@").removesuffix(".service") for link in links}


def _exclusive_files(root: Path, name: str) -> list[Path]:
    """Return the models and keys beside the configurations that only this instance's configuration names."""
    users = {}
    for path in (root / CONFIGURATION).glob("*.toml"):
        with suppress(UsageError, OSError):  # A configuration that cannot be read keeps nothing.
            users[path.stem] = set(_relative_paths(settings_file.parse(path.read_bytes(), path.name)))
    exclusive = users.pop(name, set()).difference(*users.values())
    return [root / CONFIGURATION / part for path in exclusive for part in (path, f"{path}.sig")]


def _paths(values: Mapping[str, Any], setting: str) -> list[str]:
    """Return the paths that a configuration has for a setting: none, one or several."""
    value = values.get(setting, [])
    return [value] if isinstance(value, str) else list(value)


def _relative_paths(values: Mapping[str, Any]) -> list[str]:
    """Return the paths below the configuration's folder that a configuration names."""
    paths = [path for setting in settings_file.paths() for path in _paths(values, setting)]
    return [path for path in paths if not os.path.isabs(path) and ".." not in Path(path).parts]


def _check_root(command: str) -> None:
    if os.geteuid() != 0:
        raise UsageError(f"service {command}: needs root; run it with sudo")


def _check_permissions(request: Request, plan: RunPlan) -> None:
    """Raise UsageError if the sandbox would not permit what the configuration requires."""
    permitted = {*request.permissions, *(["loopback"] if "network" in request.permissions else [])}
    if request.socket and plan.source.scheme not in LISTENING:
        key = settings_file.locate(request.config, "input")
        raise UsageError(f"{key}: does not listen; --socket is for {', '.join(LISTENING)}")
    for requirement, setting in plan.requirements.items():
        if requirement not in permitted and not (setting == "input" and request.socket):
            key = settings_file.locate(request.config, setting)
            raise UsageError(f"{key}: the service cannot reach it; add --{requirement}")


def _check_paths(request: Request, plan: RunPlan) -> None:
    """Raise UsageError if the service could not read or write a file where it is."""
    settings, state = plan.settings, f"/var/lib/edge-ssm/{request.name}"
    for setting, endpoint in (("input", plan.source), ("output", plan.sink)):
        if endpoint.scheme == "file" or endpoint.scheme.startswith("unix"):
            _check_path(request, setting, endpoint, state)
    if settings.state is not None and os.path.normpath(settings.state) != state:
        key = settings_file.locate(request.config, "state")
        raise UsageError(f"{key}: {settings.state!r}; the service keeps its state in {state}, leave it out")


def _check_path(request: Request, setting: str, endpoint: Endpoint, state: str) -> None:
    path, key = os.path.normpath(endpoint.path), settings_file.locate(request.config, setting)
    if not os.path.isabs(path):
        raise UsageError(f"{key}: {path!r}; a service has no working folder, give the absolute path")
    if _is_below(path, HIDDEN):
        raise UsageError(f"{key}: {path!r}; hidden from the service, put it elsewhere (such as below /srv or /run)")
    if setting == "output" and endpoint.scheme == "file" and not _is_below(path, (state, "/dev")):
        raise UsageError(f"{key}: {path!r}; the service may write below {state} only")


def _is_below(path: str, folders: Sequence[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)


def _check_replaced(request: Request, files: Sequence[_File]) -> None:
    """Raise UsageError if a configuration, model or key would be replaced by a different one without ``force``."""
    for file in files:
        existing = request.root / file.path
        if file.is_guarded and not request.force and existing.exists() and existing.read_bytes() != file.content:
            raise UsageError(f"{existing}: exists and differs from the new one; --force replaces it")


def _command(root: Path, log: Log) -> str:
    """Return the path of the command, for the units below ``root``. Raise UsageError if a service cannot run it."""
    path = os.path.join(sysconfig.get_path("scripts"), "edge-ssm")
    if not os.path.exists(path):
        path = shutil.which("edge-ssm") or path
    if not os.path.exists(root / path.lstrip("/")):
        log(f"{root}: has no {path}; its units look for edge-ssm in the usual folders")
        return _ANY_COMMAND
    if _is_below(os.path.normpath(path), HIDDEN):
        raise UsageError(
            f"{path}: hidden from the service; install edge-ssm in an environment such as /opt/edge-ssm "
            "(python3 -m venv /opt/edge-ssm), and run this command from there"
        )
    return path


def _unit_files(request: Request, plan: RunPlan, log: Log) -> list[_File]:
    """Return the units with the path of the command, and the instance's drop-ins."""
    command, files = _command(request.root, log), []
    for name, path in _SHARED_FILES.items():
        text = (folder() / name).read_text()
        files.append(_File(path, text.replace(_ANY_COMMAND, command).encode()))
    drop_ins = UNITS / f"{unit(request.name)}.d"
    for permission in request.permissions:
        name = f"edge-ssm-{permission}.conf"
        files.append(_File(drop_ins / name, (folder() / name).read_bytes()))
    if request.socket:
        path = UNITS / f"{unit(request.name, 'socket')}.d" / "address.conf"
        files.append(_File(path, _socket_drop_in(plan.source)))
    return files


def _socket_drop_in(source: Endpoint) -> bytes:
    """Return the drop-in of the socket unit with the source's address."""
    kind = "ListenDatagram" if source.scheme == "udp" else "ListenStream"
    if source.scheme == "unix-listen":
        return f"[Socket]\nListenStream=\n{kind}={source.socket_path()}\n".encode()
    host, port = source.host_and_port()
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    permitted = "IPAddressAllow=localhost" if is_loopback(host) else "IPAddressDeny="
    return f"[Socket]\nListenStream=\n{kind}={address}\n{permitted}\n".encode()


def _own_files(request: Request) -> list[_File]:
    """Return the configuration and the files beside it that it names. Raise UsageError for a path elsewhere."""
    config = Path(request.config)
    content = config.read_bytes()
    files = [_File(CONFIGURATION / f"{request.name}.toml", content, is_guarded=True)]
    values = settings_file.parse(content, config.name)
    for setting in settings_file.paths():
        for path in _paths(values, setting):
            key = settings_file.locate(request.config, setting)
            if os.path.isabs(path):
                check_public(request.root, path, key)
                continue
            if ".." in Path(path).parts:
                raise UsageError(f"{key}: {path!r}; expected a path below the configuration's folder, or absolute")
            for part in (path, f"{path}.sig"):
                if part == path or (config.parent / part).exists():
                    files.append(_File(CONFIGURATION / part, (config.parent / part).read_bytes(), is_guarded=True))
    return files


def check_public(root: Path, path: str, key: str) -> None:
    """Raise UsageError if the service's user could not read a file that stays where it is; ``key`` names it."""
    if _is_below(os.path.normpath(path), HIDDEN):
        raise UsageError(f"{key}: {path!r}; hidden from the service, put it beside the configuration, or below /opt")
    file = root / path.lstrip("/")
    if not file.exists() or file.is_relative_to(root / CONFIGURATION):
        return  # It will be copied later, or lies where the service's group may read.
    parents = [parent for parent in file.parents if parent != root and parent.is_relative_to(root)]
    if not file.stat().st_mode & 0o004 or not all(parent.stat().st_mode & 0o001 for parent in parents):
        raise UsageError(f"{key}: {path!r}; the service's user cannot read it, see chmod o+r (and o+x of its folders)")


def _write(root: Path, files: list[_File]) -> None:
    """Write all files, or none. Raise RunFailed if one cannot be written."""
    previous: list[tuple[Path, bytes | None]] = []
    try:
        # The group of the other files comes from this one.
        users = next(file for file in files if file.path == _SHARED_FILES["edge-ssm.sysusers"])
        for file in [users, *(file for file in files if file is not users)]:
            path = root / file.path
            if file.path.parent.parts[:2] == CONFIGURATION.parts:
                _make_guarded_folder(root, path.parent)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
            previous.append((path, path.read_bytes() if path.exists() else None))
            edge_ssm_files.write(path, file.content)
            if file is users:
                _call("systemd-sysusers", f"--root={root}", str(root / file.path))
            if file.is_guarded:
                os.chown(path, 0, _group(root))
                path.chmod(0o640)
        _call("systemd-tmpfiles", f"--root={root}", "--create", str(root / _SHARED_FILES["edge-ssm.tmpfiles"]))
    except (OSError, RunFailed) as error:
        for path, content in reversed(previous):
            if content is None:
                path.unlink(missing_ok=True)
            else:
                edge_ssm_files.write(path, content)
        if isinstance(error, RunFailed):
            raise
        raise RunFailed(f"{error.filename}: cannot be written ({error.strerror}); nothing was changed") from None


def _make_guarded_folder(root: Path, path: Path) -> None:
    """Create a folder for the service's group, and those above it, below /etc."""
    for folder in [path, *path.parents]:
        if folder == root / CONFIGURATION.parent:
            break
        if not folder.is_dir():
            folder.mkdir(mode=0o750, parents=True)
            os.chown(folder, 0, _group(root))


def _group(root: Path) -> int:
    """Return the number of the service's group in the system below ``root``."""
    for line in (root / "etc/group").read_text().splitlines():
        name, _, number, *_ = line.split(":")
        if name == GROUP:
            return int(number)
    raise RunFailed(f"{root / 'etc/group'}: no group {GROUP}; systemd-sysusers did not create it")


def _systemctl(*arguments: str) -> None:
    _call("systemctl", *arguments)


def _call(*command: str) -> None:
    """Run a command. Raise RunFailed, with what it printed, if it fails."""
    try:
        process = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise RunFailed(f"{command[0]}: cannot be run ({error.strerror}); is this a system with systemd?") from None
    if process.returncode:
        reason = " ".join((process.stderr or process.stdout).split()) or f"status {process.returncode}"
        raise RunFailed(f"{' '.join(command)}: {reason[:300]}")
