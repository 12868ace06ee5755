"""Jobs for other processes, which import them by name."""

import os

from edge_ssm.errors import RunFailed


def broken(job):
    os._exit(3)


def refuses(job):
    raise RunFailed("no good")
