"""A recording's samples as an array, for what measures on them."""

from __future__ import annotations

import numpy as np

from edge_ssm import files
from edge_ssm.errors import InputRefused
from edge_ssm.io import messages
from edge_ssm.io.codecs import registry as codecs
from edge_ssm.model.input_range import input_range
from edge_ssm.model.network import Array, Network

MOST_SAMPLES = 4096
MOST_BYTES = 1 << 24


def read(path: str, network: Network) -> Array:
    """(n, d_input) in the sensor's units: the first samples that ``network`` can take. Raises InputRefused."""
    try:
        with files.open_regular_file(path) as file:
            content = file.read(MOST_BYTES)
    except OSError as error:
        raise InputRefused(f"{path}: {files.read_problem(error)}") from None
    decoder = codecs.decoder(codecs.guess_format(path), network.input)
    rows = [item.values for item in decoder.feed(content) if isinstance(item, messages.Frame)]
    allowed = input_range(network)
    good = [row for row in rows[:MOST_SAMPLES] if not allowed.bad(row).any()]
    if not good:
        raise InputRefused(f"{path}: no sample that {', '.join(network.input.channels)} can take")
    return np.stack(good)
