"""Runs as services: started, and their decisions read."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np

from edge_ssm.model.network import SSM
from support import commands

EDGE_SSM = [sys.executable, "-c", "from edge_ssm.cli.app import main; main()"]


def shrunk(ssm, keep):
    """The SSM without all channels but ``keep`` (positions)."""
    states = np.concatenate([np.arange(ssm.pairs[:k].sum(), ssm.pairs[: k + 1].sum()) for k in keep]).astype(int)
    return SSM(
        ssm.active[keep], ssm.pairs[keep], ssm.A[states], ssm.B[states], ssm.C[states], ssm.D, ssm.dt[keep], None
    )


def smaller(network, keep):
    return replace(network, blocks=tuple(replace(b, ssm=shrunk(b.ssm, np.array(keep))) for b in network.blocks))


def start(*arguments, **options):
    return commands.Process(
        [*EDGE_SSM, "run", *map(str, arguments)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    )


def decisions(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if "event" not in line], [line for line in lines if "event" in line]
