"""The members of a family: their size, speed and scores, and their files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edge_ssm.engines.registry import create
from edge_ssm.errors import EdgeSSMError
from edge_ssm.formats import artifact
from edge_ssm.model.cost import cost
from edge_ssm.model.network import Array, Network
from edge_ssm.profiler.step_table import StepTable, measure
from edge_ssm_build.data.datasets import Dataset
from edge_ssm_build.export.agreement import Agreement
from edge_ssm_build.export.artifact import export_artifact, network_of
from edge_ssm_build.training.checkpoint import Checkpoint, save_checkpoint
from edge_ssm_build.training.scoring import Score

FAILURES = (EdgeSSMError, ArithmeticError, np.linalg.LinAlgError)
"""Errors that a network can cause: a refused artifact or stream, a diverged training, a singular matrix. Any other
error is a defect of this program and ends the search at once."""


@dataclass(frozen=True)
class Member:
    """One network of the family. Rate 0 is the unpruned network."""

    rate: float
    """Share of all operators that is removed."""
    seed: int | None
    """Seed of the winning candidate; None for the unpruned network."""
    checkpoint: str
    """File name of the checkpoint."""
    artifact: str | None
    """File name of the artifact; None for a member that could not be written."""
    active: list[int]
    """Number of active channels of each layer."""
    states: int
    columns: list[int]
    """Number of mixing columns of each layer."""
    rows: list[int]
    """Number of mixing rows of each layer."""
    validation: Score
    parameters: int
    weight_bytes: int
    multiply_adds: int
    """Multiply-adds per step."""
    file_bytes: int
    step_us: float
    """Duration of a step in microseconds, measured or from the step table."""
    base_step_us: float
    """Duration of a step of the unpruned network in the same measurement, in microseconds."""
    test: Score | None = None
    """Test score of the artifact's stream through the CPU engine, as in its provenance."""
    agreement: dict[str, Agreement] | None = None
    """Agreement with the network in float64 over the test split, by engine."""
    failure: str | None = None
    """Reason why the member was not written."""

    def summary(self) -> str:
        """Return the figures of the search as one line of text."""
        saved = 100 * (1 - self.step_us / self.base_step_us)
        return (
            f"rate {self.rate:>4g}: validation {100 * self.validation.balanced_accuracy:.1f} %, "
            f"step {self.step_us:.2f} us ({saved:.0f} % saved), {self.parameters:,} parameters, active {self.active}"
        )

    def test_summary(self, folder: Path) -> str | None:
        """Return the test score and the artifact's path as one line of text, or None without a test score."""
        if self.test is None:
            return None
        line = f"rate {self.rate:g}: {100 * self.test.balanced_accuracy:.1f} %, {folder / str(self.artifact)}"
        agreement = (self.agreement or {}).get("cpu")
        if agreement is None or not agreement.ties:
            return line
        return f"{line}, {agreement.ties} ties, {agreement.ties_differing} of them decided otherwise than in float64"


class StepTimer:
    """Duration of a step of networks, next to the unpruned one: measured here, or predicted by a device's table."""

    def __init__(self, base: Network, samples: Array, engine: str, table: StepTable | None) -> None:
        self._base, self._samples, self._engine, self._table = base, samples, engine, table

    def time(self, networks: Sequence[Network]) -> tuple[list[float], float]:
        """Return microseconds per step of each network, all measured together, and of the unpruned network."""
        if self._table is not None:
            return [self._table.predict(network) for network in networks], self._table.predict(self._base)
        engines = [create(self._engine, network) for network in [*networks, self._base]]
        *steps, base = measure(engines, self._samples)
        return steps, base


def validation_score(checkpoint: Checkpoint) -> Score:
    """Return the validation score in the last entry of the checkpoint's history."""
    return Score(**checkpoint.history[-1]["validation"])


def measure_member(checkpoint: Checkpoint, rate: float, seed: int | None, timer: StepTimer) -> Member:
    """Return the figures of a member, before its files are written."""
    network, name = network_of(checkpoint), f"rate-{rate:g}"
    total = cost(network)
    (step_us,), base_us = timer.time([network])
    return Member(
        rate=rate,
        seed=seed,
        checkpoint=f"{name}.pt",
        artifact=f"{name}.safetensors",
        active=[b.active for b in total.blocks],
        states=sum(2 * b.pairs for b in total.blocks),
        columns=[b.columns for b in total.blocks],
        rows=[b.rows for b in total.blocks],
        validation=validation_score(checkpoint),
        parameters=total.parameters,
        weight_bytes=total.weight_bytes,
        multiply_adds=total.multiply_adds,
        file_bytes=len(artifact.to_bytes(network, {"history": checkpoint.history})[0]),
        step_us=round(step_us, 3),
        base_step_us=round(base_us, 3),
    )


def time_together(members: Sequence[Member], checkpoints: Sequence[Checkpoint], timer: StepTimer) -> list[Member]:
    """Return the members with steps timed in one run: between two rates the speed of the machine may have changed."""
    steps, base_us = timer.time([network_of(checkpoint) for checkpoint in checkpoints])
    return [
        replace(member, step_us=round(step_us, 3), base_step_us=round(base_us, 3))
        for member, step_us in zip(members, steps, strict=True)
    ]


def write_members(
    members: Sequence[Member], checkpoints: Sequence[Checkpoint], data: Dataset, folder: Path
) -> list[Member]:
    """Write each member's checkpoint and artifact; return them with test scores, or with the reason of a failure.

    Members that an earlier call has written, or failed to write, are returned unchanged.
    """
    return [
        member if member.agreement is not None or member.artifact is None else _write(member, checkpoint, data, folder)
        for member, checkpoint in zip(members, checkpoints, strict=True)
    ]


def _write(member: Member, checkpoint: Checkpoint, data: Dataset, folder: Path) -> Member:
    path = folder / str(member.artifact)
    save_checkpoint(folder / member.checkpoint, checkpoint)
    try:
        agreement, provenance = export_artifact(checkpoint, data, path)
    except FAILURES as error:
        path.unlink(missing_ok=True)  # the artifact of an earlier run
        reason = str(error).removeprefix("export: ").removesuffix("; nothing was written")
        return replace(member, artifact=None, failure=reason)
    test = Score(**provenance["scores"]["test"])
    return replace(member, test=test, agreement=agreement, file_bytes=path.stat().st_size)
