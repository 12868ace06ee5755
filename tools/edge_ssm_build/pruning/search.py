"""The search over a plan's rates: candidates in parallel, every finished one on disk, the family at the end.

A search that is killed goes on where it was, and the same seeds give the same family wherever the candidates ran.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from edge_ssm import files
from edge_ssm.engines.registry import create
from edge_ssm.errors import EdgeSSMError, RunFailed, UsageError
from edge_ssm.formats import artifact
from edge_ssm.model.cost import cost
from edge_ssm.model.network import Network
from edge_ssm.profiler import report
from edge_ssm.profiler.step_table import StepTable, measure
from edge_ssm_build.data import datasets
from edge_ssm_build.data.datasets import Dataset
from edge_ssm_build.export.artifact import Agreement, export
from edge_ssm_build.export.convert import to_network
from edge_ssm_build.pruning.executors import Fresh, run_all
from edge_ssm_build.pruning.plan import Plan, candidate
from edge_ssm_build.training.checkpoint import (
    Checkpoint,
    dump_checkpoint,
    load_checkpoint,
    parse_checkpoint,
    save_checkpoint,
)
from edge_ssm_build.training.scoring import Score, as_input, score, split_windows

FAILURES = (EdgeSSMError, ArithmeticError, np.linalg.LinAlgError)
"""What a network can be at fault for: a refused artifact or stream, a training that diverged, a matrix without an
inverse. Any other error is one of this program and ends the search at once."""


@dataclass(frozen=True)
class Target:
    """What the search aims at; without any bound it makes every rate's member."""

    latency_us: float | None = None
    accuracy_loss: float | None = None
    """Points of balanced accuracy on the validation split, against the unpruned network."""
    size_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("--target-latency", self.latency_us), ("--max-accuracy-loss", self.accuracy_loss)):
            if value is not None and not math.isfinite(value):
                raise UsageError(f"{name} {value}: expected a finite number")

    def given(self) -> bool:
        return (self.latency_us, self.accuracy_loss, self.size_bytes) != (None, None, None)


@dataclass(frozen=True)
class Member:
    """One network of the family; rate 0 is the unpruned one."""

    rate: float
    seed: int | None
    """Of the candidate that won; None for the unpruned network."""
    checkpoint: str
    artifact: str | None
    """None for a member that failed: it has no artifact."""
    active: list[int]
    """Active channels a layer."""
    states: int
    columns: list[int]
    rows: list[int]
    validation: Score
    parameters: int
    weight_bytes: int
    multiply_adds: int
    file_bytes: int
    step_us: float
    """Measured, or told by the step table."""
    base_step_us: float
    """Of the unpruned network, in the same measurement."""
    test: Score | None = None
    """Of the artifact's stream through the CPU engine, as its provenance states it."""
    agreement: dict[str, Agreement] | None = None
    """By engine, with the network in float64 over the test split."""
    failure: str | None = None
    """Why the member was not written."""


@dataclass(frozen=True)
class Job:
    """One candidate, with all that a worker on another machine needs."""

    start: bytes = field(repr=False)
    base: bytes = field(repr=False)
    data: str
    plan: Plan
    step: int
    seed: int
    resume: str | None


_dataset = lru_cache(maxsize=1)(datasets.load)


def run_job(job: Job) -> bytes:
    """The finished candidate as a checkpoint's bytes."""
    start, base = parse_checkpoint(job.start, "candidate's start"), parse_checkpoint(job.base, "base network")
    resume = None if job.resume is None else Path(job.resume)
    made, _ = candidate(start, base, _dataset(job.data), job.plan, job.step, job.seed, resume)
    return dump_checkpoint(made)


class StepTimer:
    """Step latency of a member beside the unpruned network's: measured here, or by a device's table."""

    def __init__(self, base: Network, samples: Any, engine: str, table: StepTable | None) -> None:
        self.base, self.samples, self.engine, self.table = base, samples, engine, table

    def __call__(self, networks: Sequence[Network]) -> tuple[list[float], float]:
        """Microseconds of a step of each network, all measured together, and of the unpruned one beside them."""
        if self.table is not None:
            return [self.table.predict(network) for network in networks], self.table.predict(self.base)
        *steps, base = measure([create(self.engine, network) for network in [*networks, self.base]], self.samples)
        return steps, base


def network_of(checkpoint: Checkpoint) -> Network:
    return to_network(checkpoint.model, checkpoint.spec, checkpoint.recipe.window, checkpoint.labels)


def _member(checkpoint: Checkpoint, rate: float, seed: int | None, name: str, timer: StepTimer) -> Member:
    network = network_of(checkpoint)
    total = cost(network)
    (here,), base = timer([network])
    return Member(
        rate=rate,
        seed=seed,
        checkpoint=f"{name}.pt",
        artifact=f"{name}.safetensors",
        active=[b.active for b in total.blocks],
        states=sum(2 * b.pairs for b in total.blocks),
        columns=[b.columns for b in total.blocks],
        rows=[b.rows for b in total.blocks],
        validation=_reached(checkpoint),
        parameters=total.parameters,
        weight_bytes=total.weight_bytes,
        multiply_adds=total.multiply_adds,
        file_bytes=len(artifact.to_bytes(network, {"history": checkpoint.history})[0]),
        step_us=round(here, 3),
        base_step_us=round(base, 3),
    )


def _reached(checkpoint: Checkpoint) -> Score:
    return Score(**checkpoint.history[-1]["validation"])


def _candidates(
    current: Checkpoint,
    base: Checkpoint,
    todo: Plan,
    step: int,
    folder: Path,
    fresh: Fresh | None,
    remote: bool,
    done: Callable[[], None],
) -> dict[int, Checkpoint]:
    """By seed. Those on disk are taken from there; the rest are run, and each is on disk before it counts."""
    rate = todo.rates[step]
    paths = {seed: folder / f"rate-{rate:g}-seed-{seed}.pt" for seed in todo.seeds}
    finished = {}
    jobs = []
    start_bytes, base_bytes = dump_checkpoint(current), dump_checkpoint(base)
    for seed, path in paths.items():
        if path.exists():
            finished[seed] = load_checkpoint(path)
            done()
        else:
            resume = None if remote else str(path.with_suffix(".resume").absolute())
            jobs.append(Job(start_bytes, base_bytes, current.data, todo, step, seed, resume))
    for job, content in run_all(fresh, run_job, jobs):
        files.write(paths[job.seed], content)
        paths[job.seed].with_suffix(".resume").unlink(missing_ok=True)
        finished[job.seed] = parse_checkpoint(content, str(paths[job.seed]))
        done()
    return finished


def search(
    start: Checkpoint,
    data: Dataset,
    todo: Plan,
    output: Path,
    fresh: Fresh | None,
    *,
    method: str = "",
    target: Target | None = None,
    table: StepTable | None = None,
    engine: str = "cpu",
    remote: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Make the family and return what ``family.json`` says; ``rate-R.pt`` and ``rate-R.safetensors`` a member.

    With a target the rates are walked upwards until it is met or the accuracy is gone, and the best member within it
    is also written as ``chosen.safetensors``. The test split is read at the end; nothing is chosen by its scores.
    ``method`` names the plan. A member whose stream is not what the network says is not written, and is not chosen; a
    rate whose candidates fail ends the search. Whatever fails, every other member and ``family.json`` are written.
    Raises UsageError if ``output`` holds a search with another plan or checkpoint; RunFailed, after everything was
    written, if a member failed or none meets the target; RunFailed at once if the first rate fails.
    """
    target = target or Target()
    folder = output / "candidates"
    folder.mkdir(parents=True, exist_ok=True)
    beginning = {"start": start.history, "recipe": asdict(start.recipe), "data": start.data}
    _claim(output / "plan.json", asdict(todo) | beginning)
    if "validation" not in (start.history[-1] if start.history else {}):
        x, y = split_windows(data, "validation", start.recipe.window)
        reached = score(start.model, as_input(x, start.spec), torch.from_numpy(y))
        start = replace(start, history=[*start.history, {"stage": "start", "validation": asdict(reached)}])
    samples = np.concatenate(split_windows(data, "validation", start.recipe.window)[0][:8])
    timer = StepTimer(network_of(start), samples, engine, table)
    members, checkpoints = [_member(start, 0.0, None, "rate-0", timer)], [start]
    say(_line(members[0]))
    finished, failed_rate = False, None
    with tqdm(total=len(todo.rates) * len(todo.seeds), desc="candidates", unit="") as bar:
        for step, rate in enumerate(todo.rates):
            try:
                found = _candidates(checkpoints[-1], start, todo, step, folder, fresh, remote, bar.update)
                winner = max(todo.seeds, key=lambda seed: _rank(_reached(found[seed])))
                member = _member(found[winner], rate, winner, f"rate-{rate:g}", timer)
            except FAILURES as error:
                if step == 0:
                    raise
                failed_rate = {"rate": rate, "reason": str(error)}
                break
            checkpoints.append(found[winner])
            members.append(member)
            bar.clear()
            say(_line(members[-1]))
            if target.given() and _stop(members, target):
                members = _written(_timed_together(members, checkpoints, timer), checkpoints, data, output)
                finished = _choose(members, target) is not None or not _good(members[-1], members, target)
                if finished:
                    break
    if not finished:
        members = _written(_timed_together(members, checkpoints, timer), checkpoints, data, output)
    chosen = _choose(members, target) if target.given() else None
    if chosen is not None and chosen.artifact is not None:
        files.write(output / "chosen.safetensors", (output / chosen.artifact).read_bytes())
    elif target.given():
        (output / "chosen.safetensors").unlink(missing_ok=True)
    family = {
        "version": 2,
        "method": method,
        "plan": asdict(todo),
        "data": start.data,
        "kernel": start.model.config.kernel,
        "latency": f"step table of {table.machine}, engine {table.engine}" if table else f"measured, engine {engine}",
        "target": asdict(target),
        "chosen": None if chosen is None else chosen.rate,
        "failed_rate": failed_rate,
        "members": [asdict(m) for m in members],
    }
    files.write(output / "family.json", (json.dumps(family, indent=1) + "\n").encode())
    say("test split, balanced accuracy:")
    for m in members:
        if m.test is not None:
            say(f"  rate {m.rate:g}: {100 * m.test.balanced_accuracy:.1f} %, {output / str(m.artifact)}{_ties(m)}")
    if chosen is not None:
        say(f"chosen: rate {chosen.rate:g}, {output / 'chosen.safetensors'}{_instead(chosen, members, target)}")
    problems = [f"rate {m.rate:g} was not written: {m.failure}" for m in members if m.failure is not None]
    if failed_rate is not None:
        problems.append(f"rate {failed_rate['rate']:g} could not be made: {failed_rate['reason']}")
    if target.given() and chosen is None:
        problems.append(_nearest(members, target))
    if problems:
        raise RunFailed(f"{'; '.join(problems)}; {output / 'family.json'} has all that were made")
    return family


def check_places(output: Path, todo: Plan, inputs: Mapping[str, Path]) -> None:
    """Before the search. Raises InputRefused where a file that it writes is one of ``inputs``, which would be lost."""
    names = [f"rate-{rate:g}.{ending}" for rate in (0.0, *todo.rates) for ending in ("pt", "safetensors")]
    for name in (*names, "chosen.safetensors", "family.json", "plan.json"):
        report.check_places({"--output": output / name}, inputs)


def _written(members: Sequence[Member], checkpoints: Sequence[Checkpoint], data: Dataset, output: Path) -> list[Member]:
    """Each with its checkpoint and artifact on disk, or with the reason why it has no artifact."""
    result = []
    for member, checkpoint in zip(members, checkpoints, strict=True):
        if member.agreement is not None or member.artifact is None:  # an earlier call was at it
            result.append(member)
            continue
        path = output / member.artifact
        save_checkpoint(output / member.checkpoint, checkpoint)
        try:
            agreement, made_by = export(checkpoint, data, path)
        except FAILURES as error:
            path.unlink(missing_ok=True)  # what an earlier run left there
            reason = str(error).removeprefix("export: ").removesuffix("; nothing was written")
            result.append(replace(member, artifact=None, failure=reason))
            continue
        test = Score(**made_by["scores"]["test"])
        result.append(replace(member, test=test, agreement=agreement, file_bytes=path.stat().st_size))
    return result


def _timed_together(members: Sequence[Member], checkpoints: Sequence[Checkpoint], timer: StepTimer) -> list[Member]:
    """With steps measured in one go: between two rates the machine may have changed its pace."""
    steps, base_us = timer([network_of(checkpoint) for checkpoint in checkpoints])
    return [
        replace(member, step_us=round(step_us, 3), base_step_us=round(base_us, 3))
        for member, step_us in zip(members, steps, strict=True)
    ]


def _rank(reached: Score) -> tuple[float, float]:
    return reached.balanced_accuracy, -reached.loss


def _line(m: Member) -> str:
    saved = 100 * (1 - m.step_us / m.base_step_us)
    return (
        f"rate {m.rate:>4g}: validation {100 * m.validation.balanced_accuracy:.1f} %, step {m.step_us:.2f} us "
        f"({saved:.0f} % saved), {m.parameters:,} parameters, active {m.active}"
    )


def _loss(m: Member, members: Sequence[Member]) -> float:
    return 100 * (members[0].validation.balanced_accuracy - m.validation.balanced_accuracy)


def _small(m: Member, target: Target) -> bool:
    """Whether latency and size are within what was asked for."""
    fast = target.latency_us is None or m.step_us <= target.latency_us
    return fast and (target.size_bytes is None or m.file_bytes <= target.size_bytes)


def _good(m: Member, members: Sequence[Member], target: Target) -> bool:
    return target.accuracy_loss is None or _loss(m, members) <= target.accuracy_loss


def _stop(members: Sequence[Member], target: Target) -> bool:
    """Upwards only gets smaller: stop where that is enough, or where too much accuracy is gone."""
    bounded = target.latency_us is not None or target.size_bytes is not None
    return not _good(members[-1], members, target) or (bounded and _small(members[-1], target))


def _choose(members: Sequence[Member], target: Target) -> Member | None:
    """Of those that did not fail the most accurate within a bound on latency or size; with a bound on accuracy alone
    the fastest."""
    within = [m for m in members if m.failure is None and _small(m, target) and _good(m, members, target)]
    if not within:
        return None
    if target.latency_us is None and target.size_bytes is None:
        return min(within, key=lambda m: m.step_us)
    return max(within, key=lambda m: _rank(m.validation))


def _instead(chosen: Member, members: Sequence[Member], target: Target) -> str:
    """For people: that the chosen member stands in for one that failed."""
    wanted = _choose([replace(m, failure=None) for m in members], target)
    if wanted is None or wanted.rate == chosen.rate:
        return ""
    return f", in place of rate {wanted.rate:g}, which was not written"


def _ties(m: Member) -> str:
    agreement = (m.agreement or {}).get("cpu")
    if agreement is None or not agreement.ties:
        return ""
    return f", {agreement.ties} ties, {agreement.ties_differing} of them decided otherwise than in float64"


def _nearest(members: Sequence[Member], target: Target) -> str:
    last = next((m for m in reversed(members) if m.failure is None), members[-1])
    return (
        f"target: no member meets it; the smallest, rate {last.rate:g}, has step {last.step_us:.2f} us, "
        f"{last.file_bytes} bytes and loses {_loss(last, members):.1f} points"
    )


def _claim(path: Path, content: dict[str, Any]) -> None:
    buffer = io.StringIO()
    json.dump(content, buffer, indent=1, sort_keys=True)
    if path.exists() and path.read_text() != buffer.getvalue():
        raise UsageError(
            f"{path.parent}: holds a search with another plan or checkpoint; use another --output or delete it"
        )
    files.write(path, buffer.getvalue().encode())
