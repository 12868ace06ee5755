"""What systemd says of the instances of edge-ssm@.service, in words, beside what they tell of themselves."""

from __future__ import annotations

import subprocess

from edge_ssm.errors import RunFailed, UsageError
from edge_ssm.service.systemd.install import unit
from edge_ssm.telemetry import status, status_files
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
    "watchdog": "its loop stood still",
    "exit-code": "it ended with status {status}",
    "signal": "it was killed by signal {status}",
    "core-dump": "it was killed by signal {status}",
    "oom-kill": "the machine ran out of memory",
    "start-limit-hit": "it failed too often, and was given up: systemctl reset-failed {unit}",
    "timeout": "it did not start or stop in time",
}


def describe(name: str | None) -> str:
    """Of one instance, or all that systemd knows. Raises UsageError, RunFailed."""
    names = [unit(name)] if name is not None else _all()
    told = {status.pid: status for status in status_files.running()}
    parts = []
    for of in names:
        found = _show(of)
        idle = found.get("ActiveState") == "inactive" and found.get("UnitFileState") != "enabled"
        if name is not None and (idle or found.get("LoadState") == "not-found"):
            raise UsageError(f"{of}: neither enabled nor running; see edge-ssm service install")
        parts.append(in_words(found, told.get(int(found.get("MainPID") or 0))))
    return "\n\n".join(parts) or "no instance is installed; see edge-ssm service install"


def in_words(found: dict[str, str], told: status.Status | None) -> str:
    """``found``: systemd's properties. ``told``: what the run says itself, where it runs."""
    active, pid = found.get("ActiveState", "unknown"), found.get("MainPID", "0")
    state = f"{active} ({found.get('SubState', '')})"
    if active == "active":
        state += f", process {pid}, since {found.get('ActiveEnterTimestamp', '')}"
    lines = [
        f"{found.get('Id', '')}: {state}",
        f"  at boot   {'started' if found.get('UnitFileState') == 'enabled' else 'not started'}",
        f"  restarts  {found.get('NRestarts', '0')}",
    ]
    if (words := _RESULTS.get(found.get("Result", ""))) is not None:
        status = found.get("ExecMainStatus", "")
        lines.append(f"  last end  {words.format(status=status, unit=found.get('Id', ''))}")
        if status == "2" and found.get("Result") == "exit-code":
            lines.append(f"  why       journalctl -u {found.get('Id', '')}; it is not tried again until it is started")
    if found.get("StatusText"):
        lines.append(f"  says      {found['StatusText']}")
    if told is not None:
        dropped = ", ".join(f"{n} {reason}" for reason, n in sorted(told.dropped.items())) or "none"
        lines += [
            f"  model     {told.model}, digest {told.model_digest[:12]}, engine {told.engine}",
            f"  source    {told.source}, {told.source_state}; {told.samples} samples, {told.samples_per_s:.0f} per s",
            f"  decided   {told.decisions}, last {told.last or '-'}; late {told.deadline_misses}; dropped {dropped}",
            f"  step      p50 {told.step_p50_us:.1f} us, p99 {told.step_p99_us:.1f} us; {told.resident_mb:.0f} MB",
        ]
        if told.snapshot_age_s is not None:
            lines.append(f"  snapshot  {told.snapshot_age_s:.0f} s old")
        if told.output_problem:
            lines.append(f"  output    {told.output_problem}")
        lines += [f"  event     {event}" for event in told.events[-3:]]
    # What a run tells holds names from files and addresses, which are other people's text.
    return "\n".join(sanitize(line) for line in lines)


def _all() -> list[str]:
    listed = _systemctl("list-units", "--all", "--plain", "--no-legend", "--no-pager", "edge-ssm@*.service")
    files = _systemctl("list-unit-files", "--no-legend", "--no-pager", "edge-ssm@*.service")
    names = {line.split()[0] for line in [*listed.splitlines(), *files.splitlines()] if line.strip()}
    return sorted(names - {"edge-ssm@.service"})


def _show(of: str) -> dict[str, str]:
    pairs = (line.partition("=") for line in _systemctl("show", of, f"--property={','.join(_PROPERTIES)}").splitlines())
    return {key: value for key, _, value in pairs}


def _systemctl(*arguments: str) -> str:
    try:
        done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise RunFailed(f"systemctl: can't be run ({error.strerror}); is this a system with systemd?") from None
    if done.returncode:
        raise RunFailed(f"systemctl {arguments[0]}: {' '.join(done.stderr.split())[:300]}")
    return done.stdout
