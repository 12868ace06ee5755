"""``edge-ssm service``: check, install, remove and watch instances of edge-ssm@.service."""

from __future__ import annotations

from pathlib import Path

import click

from edge_ssm.cli.options import NotEmpty
from edge_ssm.service import check as service_check
from edge_ssm.service.systemd import install as systemd_install
from edge_ssm.service.systemd import units
from edge_ssm.text import sanitize

ROOT = click.option(
    "--root",
    type=NotEmpty(),
    default="/",
    show_default=True,
    metavar="DIR",
    help="Root folder of the system that has the service.",
)


@click.group("service")
def service() -> None:
    """Run streams as services of systemd: check a configuration, install it, see its status."""


@service.command("check")
@click.argument("file", type=NotEmpty())
def check(file: str) -> None:
    """Read the configuration FILE and everything it names, and print what will run. Opens no device and no port."""
    plan = service_check.check(file)
    for warning in service_check.warnings(file, plan):
        click.echo(f"edge-ssm: warning: {sanitize(warning)}", err=True)
    click.echo(service_check.describe(plan))


@service.command("install")
@click.argument("name")
@click.option(
    "--config",
    required=True,
    type=NotEmpty(),
    metavar="FILE",
    help="Configuration of the service; it is copied, with the models and keys beside it.",
)
@click.option("--loopback", is_flag=True, help="Allow the service to use addresses of this machine.")
@click.option("--network", is_flag=True, help="Allow the service to use any address.")
@click.option("--serial", is_flag=True, help="Allow the service to use serial lines.")
@click.option("--iio", is_flag=True, help="Allow the service to use IIO buffers.")
@click.option("--gpu", is_flag=True, help="Allow the service to use a Jetson's GPU.")
@click.option("--socket", is_flag=True, help="Let systemd open the socket on which the source listens.")
@ROOT
@click.option("--no-start", is_flag=True, help="Start the service only at the next boot.")
@click.option("--force", is_flag=True, help="Replace an existing configuration, model or key that differs.")
def install(name: str, config: str, socket: bool, root: str, no_start: bool, force: bool, **permissions: bool) -> None:
    """Install edge-ssm@NAME.service, and start it now and at every boot."""
    permitted = tuple(permission for permission in systemd_install.PERMISSIONS if permissions[permission])
    request = systemd_install.Request(name, config, permitted, socket, Path(root).absolute(), not no_start, force)
    systemd_install.install(request, _print)


@service.command("uninstall")
@click.argument("name")
@click.option("--purge", is_flag=True, help="Remove its configuration, snapshots and cache as well.")
@ROOT
def uninstall(name: str, purge: bool, root: str) -> None:
    """Stop edge-ssm@NAME.service and remove it."""
    systemd_install.uninstall(name, purge, Path(root).absolute(), _print)


@service.command("status")
@click.argument("name", required=False)
def status(name: str | None) -> None:
    """Show what systemd and the run itself report about NAME, or about all instances."""
    click.echo(units.describe(name))


def _print(line: str) -> None:
    click.echo(sanitize(line))
