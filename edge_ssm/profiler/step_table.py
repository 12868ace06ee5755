"""The duration of a step: measured, and predicted for networks that were not measured.

A step table holds the measured step times of many small networks on one machine and engine. ``edge-ssm profile
--step-table`` writes it on the device; on the workstation it represents the device while a network is being pruned.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from edge_ssm import files
from edge_ssm.engines import selection
from edge_ssm.engines.registry import Engine, create
from edge_ssm.errors import InputRefused, RunFailed
from edge_ssm.model.cost import cost
from edge_ssm.model.network import (
    MIXING_DTYPES,
    SSM,
    Array,
    Block,
    Decoder,
    InputSpec,
    LinearEncoder,
    Mixing,
    MixingDtype,
    Network,
    Norm,
    TokenEncoder,
)
from edge_ssm.model.transforms import quantised

VERSION = 1
MAX_BYTES = 1 << 22
"""Size of the largest table that is read: about a hundred times the size of an ordinary one."""
ROUNDS, TABLE_ROUNDS = 31, 11
STEPS = 100
"""Steps per round and engine."""


def measure(engines: Sequence[Engine], samples: Array, rounds: int = ROUNDS) -> list[float]:
    """Return the median duration of a step of each engine in microseconds.

    The engines have one lane each and take turns. ``samples`` has shape (n, d_input), in the sensor's units.
    """
    return selection.measure(engines, list(np.resize(samples, (STEPS, samples.shape[1]))), rounds)


def features(network: Network) -> dict[str, float]:
    """Return the counts on which the duration of a step depends; each adds its own cost."""
    costs, blocks = cost(network).blocks, network.blocks
    ends = network.decoder.weight.size
    ends += 0 if isinstance(network.encoder, TokenEncoder) else network.encoder.weight.size
    mixing = {
        f"mixing_{dtype}": sum(b.mixing.weight.size for b in blocks if b.mixing.dtype == dtype)
        for dtype in MIXING_DTYPES
    }
    counts = {
        "call": 1,
        "ends": ends,
        "blocks": len(blocks),
        "states": sum(c.pairs for c in costs),
        "low_rank_states": sum(int(b.ssm.pairs[b.ssm.rank_one].sum()) for b in blocks),
        **mixing,
        "activations": sum(c.columns + c.rows for c in costs),
        "norms": sum(network.d_model for b in blocks if b.norm),
    }
    return {name: float(count) for name, count in counts.items()}


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The measured step of one network."""

    features: dict[str, float]
    step_us: Annotated[float, msgspec.Meta(gt=0)]


class StepTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The measured steps of several networks on one machine and engine."""

    version: int
    engine: str
    machine: str
    rows: Annotated[list[Row], msgspec.Meta(min_length=1)]

    def predict(self, network: Network) -> float:
        """Return the predicted duration of a step of ``network`` on the table's machine in microseconds.

        The prediction is a weighted sum of ``features`` whose non-negative weights are fitted to the table.
        """
        names = sorted(self.rows[0].features)
        costs = _non_negative(
            np.array([[row.features.get(name, 0.0) for name in names] for row in self.rows]),
            np.array([row.step_us for row in self.rows]),
        )
        counts = features(network)
        return float(sum(counts.get(name, 0.0) * value for name, value in zip(names, costs, strict=True)))


def _non_negative(A: Array, y: Array) -> Array:
    """Minimise the relative errors of A x = y in the least-squares sense with x >= 0.

    The most negative unknown is set to zero until no unknown is negative, which need not be the exact optimum.
    """
    A, y = A / y[:, None], np.ones_like(y)
    scale = np.abs(A).max(axis=0)
    free = [i for i in range(A.shape[1]) if scale[i] > 0]
    x = np.zeros(A.shape[1])
    while free:
        solution = np.linalg.lstsq(A[:, free] / scale[free], y, rcond=None)[0]
        if (solution >= 0).all():
            x[free] = solution / scale[free]
            break
        free.pop(int(solution.argmin()))
    return x


def synthetic(
    h: int, layers: int, active: int, pairs: int, mixed: int, dtype: MixingDtype, rank_one: bool, seed: int = 0
) -> Network:
    """Return a random network of the given sizes, for timing only.

    Parameters
    ----------
    h, layers
        Number of channels, and of blocks.
    active, pairs
        Number of active channels per block, and of conjugate pairs of states per active channel.
    mixed
        Number of columns and rows of the mixing that are left.
    dtype
        Type of the mixing weights.
    rank_one
        Whether the active channels have a rank-one term.
    seed
        Seed of the random numbers.
    """
    rng = np.random.default_rng(seed)
    kept = np.arange(mixed)
    blocks = []
    for _ in range(layers):
        s = active * pairs
        A = -0.5 + 1j * np.pi * np.tile(np.arange(pairs), active)
        C = rng.standard_normal(s) + 1j * rng.standard_normal(s)
        P = np.full(s, 0.5 + 0j) if rank_one else None
        D = np.where(np.arange(h) < mixed, 1.0, 0.0).astype(np.float32)
        ssm = SSM(
            np.arange(active), np.full(active, pairs), A, np.ones_like(A), C, D, np.geomspace(0.001, 0.1, active), P
        )
        weight = (rng.standard_normal((2 * mixed, mixed)) / np.sqrt(h)).astype(np.float32)
        mixing = quantised(Mixing("glu", weight, np.zeros(2 * h, dtype=np.float32), kept, kept), dtype)
        blocks.append(Block(ssm, mixing, Norm("layer", np.ones(h, np.float32), np.zeros(h, np.float32))))
    return Network(
        input=InputSpec(("x",), np.zeros(1), np.ones(1)),
        encoder=LinearEncoder(np.ones((h, 1), dtype=np.float32), np.zeros(h, dtype=np.float32)),
        blocks=tuple(blocks),
        decoder=Decoder(np.ones((2, h), dtype=np.float32), np.zeros(2, dtype=np.float32)),
        prenorm=False,
        discretization="bilinear",
        pooling="mean",
        window=100,
    )


def _networks() -> list[Network]:
    """Return the networks of a table."""
    kinds: list[tuple[MixingDtype, bool]] = [("float32", False), ("float16", False), ("int8", False), ("float32", True)]
    # Share of active channels, pairs per channel, share of the mixing's columns and rows.
    shapes = ((1, 1, 1.0), (0.5, 8, 1.0), (1, 8, 0.5), (0.25, 2, 0.25), (1, 32, 1.0))
    networks = []
    for (dtype, rank_one), h, (active_share, pairs, mixed_share) in product(kinds, (16, 32, 64, 128), shapes):
        active = max(1, round(active_share * h))
        mixed = max(active, round(mixed_share * h))
        networks.append(synthetic(h, 1 if h > 32 else 2, active, pairs, mixed, dtype, rank_one))
    return networks


def tabulate(engine: str) -> StepTable:
    """Measure the steps of synthetic networks on this machine."""
    networks = _networks()
    samples = np.random.default_rng(0).standard_normal((STEPS, 1))
    engines = [create(engine, network) for network in networks]
    durations_us = measure(engines, samples, rounds=TABLE_ROUNDS)
    rows = [Row(features(network), us) for network, us in zip(networks, durations_us, strict=True)]
    return StepTable(VERSION, engines[0].name, f"{platform.node()} {platform.machine()}", rows)


def save_table(path: Path, table: StepTable) -> None:
    """Write a table as JSON. Raises RunFailed if the file cannot be written."""
    try:
        files.write(path, msgspec.json.format(msgspec.json.encode(table), indent=1) + b"\n")
    except OSError as error:
        raise RunFailed(f"{path}: cannot be written ({error.strerror})") from None


def load_table(path: Path) -> StepTable:
    """Read a table. Raises InputRefused, naming the file, for one that is missing, damaged or of another version."""
    content = files.read_regular_file(path, MAX_BYTES, remedy="expected a step table of edge-ssm profile")
    try:
        table = msgspec.json.decode(content, type=StepTable)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or too many digits
        raise InputRefused(f"{path}: not a step table of edge-ssm profile ({error})") from None
    if table.version != VERSION:
        raise InputRefused(f"{path}: step table version {table.version}, expected {VERSION}; write it again")
    return table
