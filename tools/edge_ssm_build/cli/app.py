"""The command ``edge-ssm-build``. Commands parse, call one function and print; they import torch only when they run."""

from __future__ import annotations

from edge_ssm.cli import signals  # noqa: F401  a Ctrl-C while the other modules load prints no traceback

# isort: split
import sys

import click

import edge_ssm
from edge_ssm.cli.app import run_command
from edge_ssm.cli.models import verify_signature
from edge_ssm_build.cli.export import export
from edge_ssm_build.cli.importing import import_, verify
from edge_ssm_build.cli.prune import prune, report
from edge_ssm_build.cli.signing import keygen, sign
from edge_ssm_build.cli.train import data, evaluate, record, train


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(edge_ssm.__version__, prog_name="edge-ssm-build")
def cli() -> None:
    """Train, prune and export S4 and S4D models for edge-ssm."""


for command in (data, train, evaluate, prune, report, export, import_, verify, record, keygen, sign, verify_signature):
    cli.add_command(command)


def main() -> None:
    """Run the command line and exit with its status."""
    sys.exit(run_command(cli, "edge-ssm-build"))
