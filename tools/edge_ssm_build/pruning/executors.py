"""Where candidates run: here, in processes beside this one, on a Dask cluster; all concurrent.futures executors."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from edge_ssm.errors import EdgeSSMError, RunFailed, UsageError

Job = TypeVar("Job")
Fresh = Callable[[], Executor]
"""Gives an executor; called again when the last one has broken."""
ATTEMPTS = 3
"""How often a candidate is begun anew when the process that ran it is gone."""


def prepare_process(threads: int = 1) -> None:
    """torch as every command wants it: so many threads, the same result each time, and memory kept between steps."""
    import torch

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # glibc gives large blocks back at every free; touching them anew costs a third of a training step.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold, size = -1, -3, 1 << 30
        mallopt(m_mmap_threshold, size)
        mallopt(m_trim_threshold, size)


@contextmanager
def local(workers: int) -> Iterator[Fresh | None]:
    """A function that gives an executor of ``workers`` processes, a new one when the last has broken; None for one."""
    if workers == 1:
        yield None
        return
    pools: list[ProcessPoolExecutor] = []

    def fresh() -> Executor:
        context = multiprocessing.get_context("spawn")
        pools.append(ProcessPoolExecutor(workers, mp_context=context, initializer=prepare_process))
        return pools[-1]

    try:
        yield fresh
    finally:
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def cluster(address: str) -> Iterator[Fresh]:
    """The same on a Dask cluster. Workers need edge-ssm with the host extra, and the data set at hand.

    Raises UsageError if Dask is missing or no scheduler answers at ``address``.
    """
    try:
        from distributed import Client
    except ImportError:
        raise UsageError("--scheduler needs Dask; pip install 'edge-ssm[cluster]'") from None
    try:
        client = Client(address, timeout="10s", set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise UsageError(f"--scheduler {address}: no Dask scheduler answers ({error})") from None
    client.register_worker_callbacks(prepare_process)
    try:
        yield lambda: client.get_executor(pure=False, retries=ATTEMPTS)
    finally:
        client.close()


def run_all(fresh: Fresh | None, fn: Callable[[Job], Any], jobs: Sequence[Job]) -> Iterator[tuple[Job, Any]]:
    """Each job with its result, in the order in which they end; every job exactly once.

    Jobs whose process died are begun anew, ATTEMPTS times in all. The first job that fails for a reason of its own
    ends the run, after those that have finished were handed out. Without executors each runs here in its turn.
    """
    if fresh is None:
        for job in jobs:
            yield job, fn(job)
        return
    waiting = list(jobs)
    for _ in range(ATTEMPTS):
        executor = fresh()
        futures = {}
        try:
            for job in waiting:
                futures[executor.submit(fn, job)] = job
        except BrokenProcessPool:
            pass
        failure: Exception | None = None
        for future in as_completed(futures):
            try:
                result = future.result()
            except BrokenProcessPool:
                continue
            except EdgeSSMError as error:
                failure = error
                for other in futures:
                    other.cancel()
                continue
            except Exception as error:
                # Cancelled with the rest, or of a kind that nobody foresaw.
                failure = failure or error
                continue
            job = futures[future]
            waiting.remove(job)
            yield job, result
        if failure is not None:
            raise failure if isinstance(failure, EdgeSSMError) else RunFailed(f"a candidate failed: {failure!r}")
        if not waiting:
            return
    raise RunFailed(f"a worker process died {ATTEMPTS} times over the same {len(waiting)} candidates; memory?")
