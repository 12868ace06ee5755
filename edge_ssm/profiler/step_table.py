"""How long one step takes: measured side by side, and predicted for networks that were not measured.

A step table holds the measured steps of many small networks on one machine and engine. ``edge-ssm profile
--step-table`` writes it on the device; on the workstation it stands for the device while a network is being shrunk.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
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
LARGEST = 1 << 22
"""Bytes of a table that is read: a hundred times what one has."""
ROUNDS = 31
STEPS = 100


def measure(engines: Sequence[Engine], samples: Array, rounds: int = ROUNDS) -> list[float]:
    """Median microseconds of a step of each engine, one lane each; ``samples`` (n, d_input) in the sensor's units."""
    return selection.measure(engines, list(np.resize(samples, (STEPS, samples.shape[1]))), rounds)


def features(network: Network) -> dict[str, float]:
    """What a step's time is made of; every count adds its own cost."""
    total = cost(network)
    ends = network.decoder.weight.size
    ends += 0 if isinstance(network.encoder, TokenEncoder) else network.encoder.weight.size
    found = {"call": 1.0, "ends": float(ends), "blocks": float(len(network.blocks))}
    found["states"] = float(sum(b.pairs for b in total.blocks))
    found["low_rank_states"] = float(sum(int(b.ssm.pairs[b.ssm.rank_one].sum()) for b in network.blocks))
    for dtype in ("float32", "float16", "int8"):
        found[f"mixing_{dtype}"] = float(sum(b.mixing.weight.size for b in network.blocks if b.mixing.dtype == dtype))
    found["activations"] = float(sum(b.columns + b.rows for b in total.blocks))
    found["norms"] = float(sum(network.d_model for b in network.blocks if b.norm))
    return found


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    features: dict[str, float]
    step_us: Annotated[float, msgspec.Meta(gt=0)]


class StepTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    engine: str
    machine: str
    rows: Annotated[list[Row], msgspec.Meta(min_length=1)]

    def predict(self, network: Network) -> float:
        """Microseconds of a step of ``network`` on the table's machine: a sum of non-negative costs, least squares."""
        names = sorted(self.rows[0].features)
        costs = _non_negative(
            np.array([[row.features.get(name, 0.0) for name in names] for row in self.rows]),
            np.array([row.step_us for row in self.rows]),
        )
        own = features(network)
        return float(sum(own.get(name, 0.0) * value for name, value in zip(names, costs, strict=True)))


def _non_negative(A: Array, y: Array) -> Array:
    """Least squares of relative errors with x >= 0, by taking out the most negative unknown until none is left."""
    A, y = A / y[:, None], np.ones_like(y)
    scale = np.abs(A).max(axis=0)
    free = [i for i in range(A.shape[1]) if scale[i] > 0]
    x = np.zeros(A.shape[1])
    while free:
        solved = np.linalg.lstsq(A[:, free] / scale[free], y, rcond=None)[0]
        if (solved >= 0).all():
            x[free] = solved / scale[free]
            break
        free.pop(int(solved.argmin()))
    return x


def synthetic(
    h: int, layers: int, active: int, pairs: int, mixed: int, dtype: MixingDtype, rank_one: bool, seed: int = 0
) -> Network:
    """A random network of the given sizes, for timing alone; ``mixed`` columns and rows are left."""
    rng = np.random.default_rng(seed)
    kept = np.arange(mixed)
    blocks = []
    for _ in range(layers):
        s = active * pairs
        A = -0.5 + 1j * np.pi * np.tile(np.arange(pairs), active)
        C = rng.standard_normal(s) + 1j * rng.standard_normal(s)
        P = np.full(s, 0.5 + 0j) if rank_one else None
        D = np.where(np.arange(h) < mixed, 1.0, 0.0).astype(np.float32)
        number = np.full(active, pairs)
        ssm = SSM(np.arange(active), number, A, np.ones_like(A), C, D, np.geomspace(0.001, 0.1, active), P)
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


def tabulate(engine: str) -> StepTable:
    """Measure the steps of synthetic networks on this machine."""
    forms: list[tuple[MixingDtype, bool]] = [("float32", False), ("float16", False), ("int8", False), ("float32", True)]
    networks = []
    for dtype, rank_one in forms:
        for h in (16, 32, 64, 128):
            for active, pairs, mixed in ((1, 1, 1.0), (0.5, 8, 1.0), (1, 8, 0.5), (0.25, 2, 0.25), (1, 32, 1.0)):
                channels = max(1, round(active * h))
                networks.append(
                    synthetic(h, 1 if h > 32 else 2, channels, pairs, max(channels, round(mixed * h)), dtype, rank_one)
                )
    samples = np.random.default_rng(0).standard_normal((STEPS, 1))
    engines = [create(engine, network) for network in networks]
    rows = [Row(features(n), us) for n, us in zip(networks, measure(engines, samples, rounds=11), strict=True)]
    return StepTable(VERSION, engines[0].name, f"{platform.node()} {platform.machine()}", rows)


def save_table(path: Path, table: StepTable) -> None:
    """Raises RunFailed if the place can't be written."""
    try:
        files.write(path, msgspec.json.format(msgspec.json.encode(table), indent=1) + b"\n")
    except OSError as error:
        raise RunFailed(f"{path}: can't be written ({error.strerror})") from None


def load_table(path: Path) -> StepTable:
    """Raises InputRefused, naming the file, for one that is missing, damaged or of another version."""
    content = files.read_regular_file(path, LARGEST, remedy="expected a step table of edge-ssm profile")
    try:
        table = msgspec.json.decode(content, type=StepTable)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise InputRefused(f"{path}: not a step table of edge-ssm profile ({error})") from None
    if table.version != VERSION:
        raise InputRefused(f"{path}: step table version {table.version}, expected {VERSION}; write it again")
    return table
