"""The samples of a recording as an array, for measurements on real data."""

from __future__ import annotations

import numpy as np

from edge_ssm import files
from edge_ssm.errors import InputRefused
from edge_ssm.io import messages
from edge_ssm.io.codecs import registry as codecs
from edge_ssm.model.input_range import input_range
from edge_ssm.model.network import Array, Network

MAX_SAMPLES = 4096
MAX_BYTES = 1 << 24
"""Bytes that are read of a recording; the rest of a longer one is ignored."""


def read(path: str, network: Network) -> Array:
    """Return the first samples that ``network`` accepts: shape (n, d_input), in the sensor's units.

    Raises InputRefused if there are none or the file cannot be read.
    """
    try:
        with files.open_regular_file(path) as file:
            content = file.read(MAX_BYTES)
    except OSError as error:
        raise InputRefused(f"{path}: {files.read_problem(error)}") from None
    decoder = codecs.decoder(codecs.guess_format(path), network.input)
    rows = [item.values for item in decoder.feed(content) if isinstance(item, messages.Frame)]
    accepted = input_range(network)
    samples = [row for row in rows[:MAX_SAMPLES] if not accepted.bad(row).any()]
    if not samples:
        raise InputRefused(f"{path}: no sample that {', '.join(network.input.channels)} can take")
    return np.stack(samples)
