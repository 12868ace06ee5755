"""The command ``edge-ssm``: the group of its commands, and what it does with errors.

A command's module is imported when the command is used, so that each starts with only what it needs.
"""

from __future__ import annotations

from edge_ssm.cli import signals

# isort: split
import errno
import os
import sys
from contextlib import suppress
from importlib import import_module
from typing import Any, TextIO

import click

import edge_ssm
from edge_ssm.errors import EdgeSSMError
from edge_ssm.text import sanitize

COMMANDS = {
    "boards": "edge_ssm.cli.boards:boards",
    "compile": "edge_ssm.cli.compile:compile_kernels",
    "doctor": "edge_ssm.cli.doctor:doctor",
    "inspect": "edge_ssm.cli.models:inspect",
    "profile": "edge_ssm.cli.profile:profile",
    "profiles": "edge_ssm.cli.boards:profiles",
    "run": "edge_ssm.cli.run:run",
    "service": "edge_ssm.cli.service:service",
    "top": "edge_ssm.cli.top:top",
    "verify-signature": "edge_ssm.cli.models:verify_signature",
}
"""Module and object of each command."""
LOST_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)
"""Errors of writing to a standard output that cannot take more."""


class LazyGroup(click.Group):
    """A group that imports the module of a command only when it is asked for that command."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command; None if there is none of this name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(edge_ssm.__version__, prog_name="edge-ssm")
def cli() -> None:
    """Run pruned S4 and S4D models on small devices, one sensor sample at a time."""


def run_command(command: click.Command, prog_name: str) -> int:
    """Run a click command, with errors as one line on standard error. Return the exit status (``edge_ssm.errors``)."""
    try:
        status = _invoke(command, prog_name)
        if sys.stdout is not None:
            sys.stdout.flush()  # Here the error can be reported; when the interpreter ends it cannot.
        return status if isinstance(status, int) else 0
    except EdgeSSMError as error:
        message, status = str(error), error.exit_status
    except BrokenPipeError:  # the reader of stdout or stderr went away, as `| head` does
        _discard_output()
        return 0
    except OSError as error:  # of standard output: whatever opens a file reports its own errors
        _discard_output()
        unnamed = "output: cannot be written" if error.errno in LOST_OUTPUT else "the system refused a call"
        message, status = f"{error.filename or unnamed} ({error.strerror})", 1
    except KeyboardInterrupt:
        message, status = "interrupted", signals.INTERRUPTED
    except signals.Terminated:
        return signals.TERMINATED
    except click.Abort:
        message, status = "interrupted", signals.INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as error:
        with suppress(OSError):
            click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        hint = f"; see {prog_name} --help" if isinstance(error, click.UsageError) else ""
        message, status = error.format_message() + hint, 2
    with suppress(OSError):  # A full disk may be that of stderr too: the exit status remains.
        click.echo(f"{prog_name}: error: {sanitize(' '.join(message.split()), 4000)}", err=True)
    return status


def _invoke(command: click.Command, prog_name: str) -> Any:
    """Do what ``command.main`` does, which would print an empty line for a Ctrl-C."""
    if f"_{prog_name}_COMPLETE".replace("-", "_").upper() in os.environ:  # a shell asks for completions
        return command.main(prog_name=prog_name, standalone_mode=False)
    try:
        with command.make_context(prog_name, sys.argv[1:]) as context:
            return command.invoke(context)
    except click.exceptions.Exit as end:  # of --help and --version
        return end.exit_code


def _discard_output() -> None:
    """Give up on what Python still holds for a standard output that cannot be written."""
    for file in (sys.stdout, sys.stderr):
        try:
            if file is not None:
                file.flush()
        except OSError:
            _redirect_to_null(file)


def _redirect_to_null(file: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def _is_verifying() -> bool:
    """Return whether a verification that timed out still runs in a thread."""
    verification = sys.modules.get("edge_ssm.engines.verification")
    return verification is not None and bool(verification.left_running())


def main() -> None:
    """Run ``edge-ssm`` with the arguments of the process, and end the process."""
    status = run_command(cli, "edge-ssm")
    if _is_verifying():
        _discard_output()
        os._exit(status)  # The interpreter's end under a graph that still runs would abort the process.
    sys.exit(status)
