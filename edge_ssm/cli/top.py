"""``edge-ssm top``: the runs on this machine, watched from outside."""

from __future__ import annotations

import sys
import time

import click
import msgspec

from edge_ssm.cli.options import Finite
from edge_ssm.hardware.meters.registry import open_file_meter
from edge_ssm.telemetry import status_files
from edge_ssm.telemetry import top as telemetry_top


@click.command("top")
@click.option("--once", is_flag=True, help="Print once and end; this is the default where stdout is not a terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON once, for programs.")
@click.option(
    "--interval",
    type=Finite(0.2, 60),
    default=1.0,
    show_default=True,
    metavar="S",
    help="Time between two updates, in seconds.",
)
def top(once: bool, as_json: bool, interval: float) -> None:
    """Watch the runs on this machine: decisions, latency, power, temperature, events. Ctrl-C ends."""
    if as_json:
        click.echo(msgspec.json.encode(status_files.running()).decode())
        return
    meter = open_file_meter()
    is_watching = not once and sys.stdout is not None and sys.stdout.isatty()
    try:
        while True:
            time.sleep(0 if meter is None else meter.period_s)  # some meters report the time since they were opened
            text = telemetry_top.page(status_files.running(), meter)
            if is_watching:
                click.clear()
            click.echo(text)
            if not is_watching:
                return
            time.sleep(interval)
    except KeyboardInterrupt:
        if not is_watching:  # It was cut short; Ctrl-C is how watching ends.
            raise
