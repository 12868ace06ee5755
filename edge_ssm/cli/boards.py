"""``edge-ssm boards``: the boards and power modes that edge-ssm knows."""

from __future__ import annotations

import click

from edge_ssm.errors import EdgeSSMError
from edge_ssm.hardware import boards as known_boards


@click.group("boards")
def boards() -> None:
    """List the boards and power modes that edge-ssm knows."""


@boards.command("list")
def list_boards() -> None:
    """List all boards and power modes, one per line; * marks this machine's."""
    here = known_boards.detect()
    for named in known_boards.load_all():
        board = named.profile
        mark = "*" if here is not None and here.name == named.name else " "
        default = " default" if board.default else ""
        click.echo(f"{mark} {named.name:32} {board.board:24} {board.power_mode or '-':12}{default}")


@boards.command("show")
@click.argument("name")
def show(name: str) -> None:
    """Show all figures of the board NAME, with their sources."""
    click.echo(known_boards.describe(known_boards.load(name)))


@boards.command("detect")
def detect() -> None:
    """Print the name of this machine's board and power mode."""
    named, problem = known_boards.select("auto")
    if named is None:
        raise EdgeSSMError(problem or "no board fits this machine; edge-ssm boards list shows those that are known")
    click.echo(named.name)


# The earlier name of the group, which works until version 1.0.
profiles = click.Group("profiles", boards.commands, help=boards.help, hidden=True)
