"""Check a configuration file without running it, and describe in words what it would run."""

from __future__ import annotations

import msgspec

from edge_ssm.errors import EdgeSSMError, UsageError
from edge_ssm.service import plan as service_plan
from edge_ssm.service import settings_file
from edge_ssm.service.plan import RunPlan
from edge_ssm.service.settings import SETTINGS, Settings, merge
from edge_ssm.text import sanitize

DESCRIBED = ("model", "input", "output")
"""Settings that other lines of the description show."""


def check(path: str) -> RunPlan:
    """Return the plan of the configuration file ``path``.

    Raises UsageError, naming the file, the line and the key, for whatever keeps the configuration from running.
    """
    try:
        return service_plan.resolve(merge(settings_file.read(path), {}), path)
    except EdgeSSMError as error:
        if not error.setting:
            raise
        reason = str(error).removeprefix(f"{SETTINGS[error.setting].flag}: ")
        raise UsageError(f"{settings_file.locate(path, error.setting)}: {reason}", setting=error.setting) from None


def warnings(path: str, plan: RunPlan) -> list[str]:
    """Return the plan's warnings, each with the file, the line and the key that it is about."""
    return [f"{settings_file.locate(path, warning.setting)}: {warning.text}" for warning in plan.warnings]


def describe(plan: RunPlan) -> str:
    """Return the plan in words, a line for each part."""
    parts = [
        *_models(plan),
        ("source", _source(plan)),
        ("windows", _windows(plan)),
        ("engine", _engine(plan)),
        ("sink", _sink(plan)),
        ("state", _state(plan)),
        ("page", _page(plan)),
        ("settings", _changed(plan.settings)),
    ]
    # A path or a label is foreign text: a newline within must not begin a line of its own.
    return "\n".join(sanitize(f"{word:<9} {line}") for word, line in parts if line)


def _models(plan: RunPlan) -> list[tuple[str, str]]:
    settings, network = plan.settings, plan.model.network
    signed = ", signed" if settings.require_signature else ""
    reloaded = ", reloaded when it changes" if settings.reload else ""
    channels = network.input.channels
    return [
        ("model", f"{settings.model}, digest {plan.model.model.digest[:12]}{signed}{reloaded}"),
        ("reads", f"{len(channels)} channels: {', '.join(channels)}"),
        *(("member", f"{member.path}, digest {member.model.digest[:12]}") for member in plan.members),
    ]


def _source(plan: RunPlan) -> str:
    settings = plan.settings
    followed = ", followed" if settings.follow else ""
    stale = f", stale after {settings.stale_after:g} s" if settings.stale_after else ""
    return f"{plan.source.redacted}, {plan.codec}{followed}{stale}"


def _windows(plan: RunPlan) -> str:
    network, windows = plan.model.network, plan.windows
    rate = f" at {plan.sample_rate_hz:g} Hz" if plan.sample_rate_hz else ""
    is_pooled = network.pooling != "none"
    outputs = f"{network.window} samples, hop {windows.hop}" if is_pooled else "an output per sample"
    return f"{outputs}{rate}; {windows.lanes} at once; gaps: {plan.settings.gap}"


def _engine(plan: RunPlan) -> str:
    board = plan.board.name if plan.board else "none"
    chunk = "as many samples as the budget allows" if plan.chunk is None else plan.chunk
    cores = f"; cores {', '.join(map(str, sorted(plan.cores)))}" if plan.cores else ""
    priority = f"; real-time priority {plan.settings.fifo}" if plan.settings.fifo else ""
    deadline = f"deadline {plan.deadline_periods:g} periods"
    return f"{plan.model.engine}; profile {board}; {chunk} a call; {deadline}{cores}{priority}"


def _sink(plan: RunPlan) -> str:
    rotated = f", rotated at {plan.settings.rotate_bytes} bytes" if plan.settings.rotate_bytes else ""
    return f"{'stdout' if plan.sink.scheme == 'std' else plan.sink.redacted}{rotated}"


def _state(plan: RunPlan) -> str:
    if plan.state is None:
        return "none kept by this file (edge-ssm@.service keeps its own)"
    return f"{plan.state}, every {plan.settings.snapshot_interval:g} s"


def _page(plan: RunPlan) -> str:
    if plan.listen is None:
        return ""
    host, port = plan.listen
    return f"{host} port {port}{', with metrics' if plan.settings.prometheus else ''}"


def _changed(settings: Settings) -> str:
    """Return every setting that differs from its default, by its key."""
    values = msgspec.structs.asdict(settings)
    changed = [
        f"{setting.key} = {values[name]}"
        for name, setting in SETTINGS.items()
        if name not in DESCRIBED and values[name] != setting.default
    ]
    return ", ".join(changed)
