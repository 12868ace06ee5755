"""Executors for candidates: this process, local worker processes, or a Dask cluster (``concurrent.futures``)."""

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
ExecutorFactory = Callable[[], Executor]
"""Returns an executor; called again after the last one has broken."""
ATTEMPTS = 3
"""Number of times that a candidate is started when its worker process dies."""


def prepare_process(threads: int = 1) -> None:
    """Configure torch for this process: number of threads, deterministic results, and memory kept between steps."""
    import torch

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # glibc returns large blocks to the system at every free; mapping them again costs a third of a training step.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold, size = -1, -3, 1 << 30
        mallopt(m_mmap_threshold, size)
        mallopt(m_trim_threshold, size)


@contextmanager
def local(workers: int) -> Iterator[ExecutorFactory | None]:
    """Yield a factory of executors with ``workers`` processes each; None for one worker, which is this process."""
    if workers == 1:
        yield None
        return
    pools: list[ProcessPoolExecutor] = []

    def make_executor() -> Executor:
        context = multiprocessing.get_context("spawn")
        pools.append(ProcessPoolExecutor(workers, mp_context=context, initializer=prepare_process))
        return pools[-1]

    try:
        yield make_executor
    finally:
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def cluster(address: str) -> Iterator[ExecutorFactory]:
    """Yield a factory of executors on a Dask cluster. Its workers need edge-ssm[host] and access to the data set.

    Raises
    ------
    UsageError
        If Dask is missing or no scheduler answers at ``address``.
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


def run_all(
    make_executor: ExecutorFactory | None, fn: Callable[[Job], Any], jobs: Sequence[Job]
) -> Iterator[tuple[Job, Any]]:
    """Yield each job with its result, in order of completion, every job exactly once.

    Jobs whose process died are started again, ATTEMPTS times in all. The first job that raises an error ends the run,
    after the results of finished jobs have been yielded. Without executors the jobs run in this process, one by one.

    Raises
    ------
    EdgeSSMError
        The error of the first job that failed; RunFailed for an error of another kind.
    RunFailed
        If worker processes keep dying.
    """
    if make_executor is None:
        for job in jobs:
            yield job, fn(job)
        return
    pending = list(jobs)
    for _ in range(ATTEMPTS):
        executor = make_executor()
        futures = {}
        try:
            for job in pending:
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
                # Cancelled with the others, or an unexpected error.
                failure = failure or error
                continue
            job = futures[future]
            pending.remove(job)
            yield job, result
        if failure is not None:
            raise failure if isinstance(failure, EdgeSSMError) else RunFailed(f"a candidate failed: {failure!r}")
        if not pending:
            return
    raise RunFailed(f"a worker process died {ATTEMPTS} times over the same {len(pending)} candidates; check the memory")
