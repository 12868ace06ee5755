"""``edge-ssm run``: its options follow from the declarations of the settings."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import click

from edge_ssm import log
from edge_ssm.cli.options import explicit_parameters, setting_option
from edge_ssm.errors import EdgeSSMError, RunFailed, UsageError
from edge_ssm.service import run as service_run
from edge_ssm.service.settings import SETTINGS, Settings, merge
from edge_ssm.telemetry.summary import summary


@click.command("run")
@click.argument("model", required=False)
@click.option(
    "--config",
    metavar="FILE",
    help="Configuration of a service (TOML); options on the command line take precedence.",
)
@click.option(
    "--stream",
    is_flag=True,
    help="Process the input sample by sample and write each decision when it is due; this is always so.",
)
@click.pass_context
def run(context: click.Context, /, config: str | None, stream: bool, **options: Any) -> None:
    """Classify a sensor stream with MODEL: an artifact of edge-ssm-build, or a .onnx or .tflite file of its export."""
    explicit = explicit_parameters(context) & set(SETTINGS)
    values = {name: list(value) if isinstance(value := options[name], tuple) else value for name in explicit}
    settings = merge(_file_values(config), values)
    _check_standard_streams(settings)
    log.configure()
    outcome = service_run.run(settings, config)
    counters, network = outcome.counters, outcome.network
    with suppress(OSError):  # The decisions matter, and they are written.
        click.echo(summary(counters, network, outcome.engine, outcome.chunk), err=True)
    if outcome.failure:
        raise RunFailed(outcome.failure)
    if counters.malformed and not counters.samples:
        raise EdgeSSMError(
            f"{outcome.source}: no valid sample among {counters.malformed} rows; expected {outcome.format} with "
            f"{len(network.input.channels)} channels ({', '.join(network.input.channels)})"
        )


run.params += [setting_option(setting) for name, setting in SETTINGS.items() if name != "model"]


def _file_values(config: str | None) -> dict[str, Any]:
    if config is None:
        return {}
    from edge_ssm.service import settings_file  # the TOML reader, which a run without a file does not need

    return settings_file.read(config)


def _check_standard_streams(settings: Settings) -> None:
    if settings.input == "-" and sys.stdin is None:
        raise UsageError("standard input is closed; give --input")
    if settings.output == "-" and sys.stdout is None:
        raise UsageError("standard output is closed; give --output")
    if settings.input == "-" and sys.stdin.isatty():
        click.echo("edge-ssm: reading samples from the terminal, Ctrl-D ends", err=True)
