"""The search over a plan's rates: candidates run in parallel, and every finished one is on disk.

A search that is killed resumes where it stopped, and the same seeds give the same family wherever the candidates run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from edge_ssm import files, outputs
from edge_ssm.errors import RunFailed, UsageError
from edge_ssm.profiler.step_table import StepTable
from edge_ssm_build.data import datasets
from edge_ssm_build.data.datasets import Dataset
from edge_ssm_build.export.artifact import network_of
from edge_ssm_build.pruning.candidate import make_candidate
from edge_ssm_build.pruning.executors import ExecutorFactory, run_all
from edge_ssm_build.pruning.family import (
    FAILURES,
    Member,
    StepTimer,
    measure_member,
    time_together,
    validation_score,
    write_members,
)
from edge_ssm_build.pruning.plan import Plan
from edge_ssm_build.pruning.target import Target, choose_member, describe_miss, is_last_rate, replaced_member
from edge_ssm_build.training.checkpoint import Checkpoint, dump_checkpoint, load_checkpoint, parse_checkpoint
from edge_ssm_build.training.scoring import as_input, score, split_windows

FAMILY_VERSION = 2
"""Version of the format of ``family.json``."""
TIMED_WINDOWS = 8
"""Number of validation windows that a step is timed on."""


@dataclass(frozen=True)
class Job:
    """One candidate to make, with everything that a worker on another machine needs."""

    start: bytes = field(repr=False)
    base: bytes = field(repr=False)
    data: str
    plan: Plan
    step: int
    seed: int
    resume: str | None


_dataset = lru_cache(maxsize=1)(datasets.load)


def run_job(job: Job) -> bytes:
    """Make the candidate and return it as the bytes of a checkpoint file."""
    start, base = parse_checkpoint(job.start, "candidate's start"), parse_checkpoint(job.base, "base network")
    resume = None if job.resume is None else Path(job.resume)
    candidate, _ = make_candidate(start, base, _dataset(job.data), job.plan, job.step, job.seed, resume)
    return dump_checkpoint(candidate)


@dataclass(frozen=True)
class SearchSettings:
    """Where and how a search runs, apart from its plan."""

    output: Path
    """Folder of the family."""
    method: str = ""
    """Name of the method, for ``family.json``."""
    target: Target = field(default_factory=Target)
    table: StepTable | None = None
    """Step latencies of a device; None to measure steps on this machine."""
    engine: str = "cpu"
    """Engine whose steps are measured."""
    make_executor: ExecutorFactory | None = None
    """Returns executors for the candidates; None to run them in this process."""
    is_remote: bool = False
    """True if the executors run on other machines: candidates then do not write their state to ``output``."""

    def latency_source(self) -> str:
        """Return where the step latencies come from, as text."""
        if self.table is None:
            return f"measured, engine {self.engine}"
        return f"step table of {self.table.machine}, engine {self.table.engine}"


@dataclass(frozen=True)
class SearchResult:
    """The family that a search has made. Everything in it has been written."""

    settings: SearchSettings
    members: list[Member]
    chosen: Member | None
    """Best member within the target; None without a target or if no member meets it."""
    failed_rate: dict[str, Any] | None
    """The rate whose candidates failed and ended the search, and the reason."""
    content: dict[str, Any]
    """Content of ``family.json``."""

    def summary(self) -> list[str]:
        """Return the test scores and the chosen member as lines of text."""
        output = self.settings.output
        tests = [member.test_summary(output) for member in self.members]
        lines = ["test split, balanced accuracy:", *(f"  {line}" for line in tests if line is not None)]
        if self.chosen is not None:
            replaced = replaced_member(self.chosen, self.members, self.settings.target)
            note = "" if replaced is None else f", in place of rate {replaced.rate:g}, which was not written"
            lines.append(f"chosen: rate {self.chosen.rate:g}, {output / 'chosen.safetensors'}{note}")
        return lines

    def raise_for_problems(self) -> None:
        """Raise RunFailed if a member could not be written, a rate failed, or no member meets the target."""
        problems = [f"rate {m.rate:g} was not written: {m.failure}" for m in self.members if m.failure is not None]
        if self.failed_rate is not None:
            problems.append(f"rate {self.failed_rate['rate']:g} could not be made: {self.failed_rate['reason']}")
        if self.settings.target.is_set() and self.chosen is None:
            problems.append(describe_miss(self.members))
        if problems:
            family = self.settings.output / "family.json"
            raise RunFailed(f"{'; '.join(problems)}; {family} lists all members that were made")


def search(
    start: Checkpoint,
    data: Dataset,
    plan: Plan,
    settings: SearchSettings,
    on_member: Callable[[Member], None] = lambda member: None,
) -> SearchResult:
    """Make a family of pruned networks and write it to the output folder.

    The folder gets ``rate-R.pt`` and ``rate-R.safetensors`` for each member, and ``family.json``. With a target, the
    rates are tried in ascending order until it is met or too much accuracy is lost, and the best member within it is
    also written as ``chosen.safetensors``. The test split is read at the end; nothing is chosen by its scores. A member
    whose stream does not agree with the network is neither written nor chosen, and a rate whose candidates fail ends
    the search; all other members and ``family.json`` are written in any case (``SearchResult.raise_for_problems``).

    Parameters
    ----------
    start
        The unpruned network.
    data
        Its data set.
    plan
        The plan of the family.
    settings
        Output folder, target, executors and step timing.
    on_member
        Called with each member as soon as its rate is finished.

    Returns
    -------
    SearchResult
        The family.

    Raises
    ------
    UsageError
        If the output folder holds a search with another plan or checkpoint.
    EdgeSSMError, ArithmeticError
        If the candidates of the first rate fail.
    """
    candidates = settings.output / "candidates"
    candidates.mkdir(parents=True, exist_ok=True)
    origin = {"start": start.history, "recipe": asdict(start.recipe), "data": start.data}
    _claim(settings.output / "plan.json", asdict(plan) | origin)
    base = _with_validation_score(start, data)
    members, failed_rate = _Walk(base, data, plan, settings, on_member).run()
    chosen = choose_member(members, settings.target) if settings.target.is_set() else None
    _write_chosen(settings, chosen)
    content = {
        "version": FAMILY_VERSION,
        "method": settings.method,
        "plan": asdict(plan),
        "data": base.data,
        "kernel": base.model.config.kernel,
        "latency": settings.latency_source(),
        "target": asdict(settings.target),
        "chosen": None if chosen is None else chosen.rate,
        "failed_rate": failed_rate,
        "members": [asdict(m) for m in members],
    }
    files.write(settings.output / "family.json", (json.dumps(content, indent=1) + "\n").encode())
    return SearchResult(settings, members, chosen, failed_rate, content)


class _Walk:
    """The walk over the rates of a plan, from the unpruned network to the last member."""

    def __init__(
        self,
        base: Checkpoint,
        data: Dataset,
        plan: Plan,
        settings: SearchSettings,
        on_member: Callable[[Member], None],
    ) -> None:
        self._data, self._plan, self._settings, self._on_member = data, plan, settings, on_member
        windows, _ = split_windows(data, "validation", base.recipe.window)
        samples = np.concatenate(windows[:TIMED_WINDOWS])
        self._timer = StepTimer(network_of(base), samples, settings.engine, settings.table)
        self._checkpoints = [base]
        self._members = [measure_member(base, 0.0, None, self._timer)]

    def run(self) -> tuple[list[Member], dict[str, Any] | None]:
        """Return the members, written to disk, and the rate that failed and its reason, or None."""
        self._on_member(self._members[0])
        plan, target, failed_rate = self._plan, self._settings.target, None
        with tqdm(total=len(plan.rates) * len(plan.seeds), desc="candidates", unit="") as bar:
            for step, rate in enumerate(plan.rates):
                try:
                    self._add_member(step, bar.update)
                except FAILURES as error:
                    if step == 0:
                        raise
                    failed_rate = {"rate": rate, "reason": str(error)}
                    break
                bar.clear()
                self._on_member(self._members[-1])
                if target.is_set() and is_last_rate(self._members, target) and self._is_finished():
                    return self._members, None
        self._write()
        return self._members, failed_rate

    def _add_member(self, step: int, on_candidate: Callable[[], object]) -> None:
        """Make the candidates of a rate and add the one with the best validation score."""
        candidates = self._run_candidates(step, on_candidate)
        seed = max(self._plan.seeds, key=lambda seed: validation_score(candidates[seed]).rank)
        member = measure_member(candidates[seed], self._plan.rates[step], seed, self._timer)
        self._checkpoints.append(candidates[seed])
        self._members.append(member)

    def _run_candidates(self, step: int, on_candidate: Callable[[], object]) -> dict[int, Checkpoint]:
        """Return the candidates of a rate by seed. Those on disk are read; the others are made and written first."""
        settings, rate = self._settings, self._plan.rates[step]
        start, base = self._checkpoints[-1], self._checkpoints[0]
        folder = settings.output / "candidates"
        paths = {seed: folder / f"rate-{rate:g}-seed-{seed}.pt" for seed in self._plan.seeds}
        candidates, jobs = {}, []
        start_bytes, base_bytes = dump_checkpoint(start), dump_checkpoint(base)
        for seed, path in paths.items():
            if path.exists():
                candidates[seed] = load_checkpoint(path)
                on_candidate()
            else:
                resume = None if settings.is_remote else str(path.with_suffix(".resume").absolute())
                jobs.append(Job(start_bytes, base_bytes, start.data, self._plan, step, seed, resume))
        for job, content in run_all(settings.make_executor, run_job, jobs):
            path = paths[job.seed]
            files.write(path, content)
            path.with_suffix(".resume").unlink(missing_ok=True)
            candidates[job.seed] = parse_checkpoint(content, str(path))
            on_candidate()
        return candidates

    def _is_finished(self) -> bool:
        """Write the members so far; return False if the only ones within the target could not be written."""
        self._write()
        target, members = self._settings.target, self._members
        return choose_member(members, target) is not None or not target.meets_accuracy(members[-1], members[0])

    def _write(self) -> None:
        timed = time_together(self._members, self._checkpoints, self._timer)
        self._members = write_members(timed, self._checkpoints, self._data, self._settings.output)


def _with_validation_score(start: Checkpoint, data: Dataset) -> Checkpoint:
    """Return the checkpoint with a validation score in the last entry of its history."""
    if "validation" in (start.history[-1] if start.history else {}):
        return start
    x, y = split_windows(data, "validation", start.recipe.window)
    reached = score(start.model, as_input(x, start.spec), torch.from_numpy(y))
    return replace(start, history=[*start.history, {"stage": "start", "validation": asdict(reached)}])


def _write_chosen(settings: SearchSettings, chosen: Member | None) -> None:
    """Write the chosen member as ``chosen.safetensors``; without one, remove that of an earlier search."""
    path = settings.output / "chosen.safetensors"
    if chosen is not None and chosen.artifact is not None:
        files.write(path, (settings.output / chosen.artifact).read_bytes())
    elif settings.target.is_set():
        path.unlink(missing_ok=True)


def check_outputs(output: Path, plan: Plan, inputs: Mapping[str, Path]) -> None:
    """Raise InputRefused, before the search, if a file that it writes would overwrite one of ``inputs``."""
    endings = ("pt", "safetensors")
    names = [f"rate-{rate:g}.{ending}" for rate in (0.0, *plan.rates) for ending in endings]
    for name in (*names, "chosen.safetensors", "family.json", "plan.json"):
        outputs.check_places({"--output": output / name}, inputs)


def _claim(path: Path, content: dict[str, Any]) -> None:
    """Write the plan of the search. Raise UsageError if the folder has another one."""
    text = json.dumps(content, indent=1, sort_keys=True)
    if path.exists() and path.read_text() != text:
        raise UsageError(
            f"{path.parent}: holds a search with another plan or checkpoint; use another --output or delete it"
        )
    files.write(path, text.encode())
