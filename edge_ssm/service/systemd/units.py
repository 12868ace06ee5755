"""Describe the instances of edge-ssm@.service: what systemd knows of them, and what they report themselves."""

from __future__ import annotations

import subprocess

from edge_ssm.errors import RunFailed, UsageError
from edge_ssm.service.systemd.install import unit
from edge_ssm.telemetry import status_files
from edge_ssm.telemetry.status import Status
from edge_ssm.text import sanitize

_PROPERTIES = (
    "Id",
    "LoadState",
    "ActiveState",
    "SubState",
    "Result",
    "MainPID",
    "NRestarts",
    "ExecMainStatus",
    "StatusText",
    "UnitFileState",
    "ActiveEnterTimestamp",
)
_RESULTS = {
    "watchdog": "its loop did not respond",
    "exit-code": "it ended with status {status}",
    "signal": "it was killed by signal {status}",
    "core-dump": "it was killed by signal {status}",
    "oom-kill": "the machine ran out of memory",
    "start-limit-hit": "it failed too often, and was given up: systemctl reset-failed {unit}",
    "timeout": "it did not start or stop in time",
}
"""What the values of systemd's property Result mean."""


def describe(name: str | None) -> str:
    """Return the status of an instance in words, or of all instances.

    Raises UsageError if there is no such instance, RunFailed if systemd cannot be asked.
    """
    names = [unit(name)] if name is not None else _instances()
    statuses = {status.pid: status for status in status_files.running()}
    parts = []
    for instance in names:
        properties = _properties(instance)
        is_idle = properties.get("ActiveState") == "inactive" and properties.get("UnitFileState") != "enabled"
        if name is not None and (is_idle or properties.get("LoadState") == "not-found"):
            raise UsageError(f"{instance}: neither enabled nor running; see edge-ssm service install")
        parts.append(in_words(properties, statuses.get(int(properties.get("MainPID") or 0))))
    return "\n\n".join(parts) or "no instance is installed; see edge-ssm service install"


def in_words(properties: dict[str, str], status: Status | None) -> str:
    """Return the status of an instance, a line for each fact, from systemd's properties and the run's own status."""
    lines = [*_unit_lines(properties), *(_run_lines(status) if status is not None else [])]
    # The status holds names of files and addresses, which are foreign text.
    return "\n".join(sanitize(line) for line in lines)


def _unit_lines(properties: dict[str, str]) -> list[str]:
    name, active, result = (properties.get(key, "") for key in ("Id", "ActiveState", "Result"))
    state = f"{active or 'unknown'} ({properties.get('SubState', '')})"
    if active == "active":
        state += f", process {properties.get('MainPID', '0')}, since {properties.get('ActiveEnterTimestamp', '')}"
    lines = [
        f"{name}: {state}",
        f"  at boot   {'started' if properties.get('UnitFileState') == 'enabled' else 'not started'}",
        f"  restarts  {properties.get('NRestarts', '0')}",
    ]
    if result in _RESULTS:
        status = properties.get("ExecMainStatus", "")
        lines.append(f"  last end  {_RESULTS[result].format(status=status, unit=name)}")
        if status == "2" and result == "exit-code":
            lines.append(f"  why       journalctl -u {name}; it is not tried again until it is started")
    if properties.get("StatusText"):
        lines.append(f"  says      {properties['StatusText']}")
    return lines


def _run_lines(status: Status) -> list[str]:
    dropped = ", ".join(f"{n} {reason}" for reason, n in sorted(status.dropped.items())) or "none"
    late, read = f"late {status.deadline_misses}", f"{status.samples} samples, {status.samples_per_s:.0f} per s"
    lines = [
        f"  model     {status.model}, digest {status.model_digest[:12]}, engine {status.engine}",
        f"  source    {status.source}, {status.source_state}; {read}",
        f"  decided   {status.decisions}, last {status.last or '-'}; {late}; dropped {dropped}",
        f"  step      p50 {status.step_p50_us:.1f} us, p99 {status.step_p99_us:.1f} us; {status.resident_mb:.0f} MB",
    ]
    if status.snapshot_age_s is not None:
        lines.append(f"  snapshot  {status.snapshot_age_s:.0f} s old")
    if status.output_problem:
        lines.append(f"  output    {status.output_problem}")
    return [*lines, *(f"  event     {event}" for event in status.events[-3:])]


def _instances() -> list[str]:
    """Return the names of all instances that systemd knows, running or not."""
    loaded = _systemctl("list-units", "--all", "--plain", "--no-legend", "--no-pager", "edge-ssm@*.service")
    files = _systemctl("list-unit-files", "--no-legend", "--no-pager", "edge-ssm@*.service")
    names = {line.split()[0] for line in [*loaded.splitlines(), *files.splitlines()] if line.strip()}
    return sorted(names - {"edge-ssm@.service"})


def _properties(instance: str) -> dict[str, str]:
    output = _systemctl("show", instance, f"--property={','.join(_PROPERTIES)}")
    return {key: value for key, _, value in (line.partition("=") for line in output.splitlines())}


def _systemctl(*arguments: str) -> str:
    try:
        process = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise RunFailed(f"systemctl: cannot be run ({error.strerror}); is this a system with systemd?") from None
    if process.returncode:
        raise RunFailed(f"systemctl {arguments[0]}: {' '.join(process.stderr.split())[:300]}")
    return process.stdout
