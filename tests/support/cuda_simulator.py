"""A GPU for ``edge_ssm.engines.cuda.engine``: every thread of a kernel is a thread of Python, and one runs at a time.

A thread runs until it waits for others, at a barrier or for a word in memory, and then the next one runs, in an order
that a seed determines. So the blocks of a grid, and the host beside a kernel that stays, take turns on any number of
cores; a missing barrier shows, for one thread gets as far as it can before another begins; and a barrier that some
threads never reach is an error instead of a wait without end.

Run with NUMBA_ENABLE_CUDASIM=1, so that the kernels' decorators leave functions of Python.
"""

import random
import threading
from collections import deque
from types import SimpleNamespace

import numpy as np
from numba.cuda.simulator.kernel import FakeCUDAKernel

from edge_ssm.engines.cuda import engine, kernels, persistent
from edge_ssm.engines.cuda.layout import ADDERS
from edge_ssm.engines.cuda.persistent import PersistentCudaEngine
from edge_ssm.engines.options import EngineOptions


class _Turn:
    """Whoever takes turns: a thread of the grid, or the host."""

    def __init__(self):
        self._lock = threading.Lock()
        self._lock.acquire()

    def wait(self):
        self._lock.acquire()

    def begin(self):
        self._lock.release()


class _Thread(_Turn):
    def __init__(self, block, index):
        super().__init__()
        self.block = block
        self.threadIdx = SimpleNamespace(x=index, y=0, z=0)


class _Block:
    def __init__(self, index, threads, shared_bytes):
        self.blockIdx = SimpleNamespace(x=index, y=0, z=0)
        # Memory that no thread has written to yet holds anything.
        self.shared = np.full(shared_bytes // 4, np.nan, dtype=np.float32)
        self.alive = [_Thread(self, i) for i in range(threads)]
        self.waiting = []


class _Aborted(Exception):
    """The kernel has failed: its other threads end."""


class _Grid:
    """A kernel that has been launched. It only gets on while the host waits for it."""

    def __init__(self, kernel, blocks, threads, shared_bytes, arguments):
        self.blockDim = SimpleNamespace(x=threads, y=1, z=1)
        self.failure = None
        self._host, self._queue, self._random = _Turn(), deque(), random.Random(0)
        self._blocks = [_Block(i, threads, shared_bytes) for i in range(blocks)]
        for block in self._blocks:
            for thread in block.alive:
                target = threading.Thread(target=self._run, args=(thread, kernel, arguments), daemon=True)
                self._queue.append(thread)
                target.start()

    @property
    def alive(self):
        return any(block.alive for block in self._blocks)

    def advance(self):
        """Give every thread that does not wait at a barrier a turn. Raises what a thread has raised."""
        if not self._queue and self.failure is None:
            self.failure = RuntimeError("threads wait at a barrier that others never reach")
        if self.failure is None:
            self._queue.append(self._host)
            self._pass_on(self._host)
        if self.failure is not None:
            for thread in [thread for block in self._blocks for thread in block.alive]:
                thread.begin()
            raise self.failure

    def pause(self, thread):
        """Let all others have a turn first."""
        self._queue.append(thread)
        self._pass_on(thread)

    def barrier(self, thread):
        thread.block.waiting.append(thread)
        self._open(thread.block)
        self._pass_on(thread)

    def _open(self, block):
        if block.waiting and len(block.waiting) == len(block.alive):
            self._random.shuffle(block.waiting)
            self._queue.extend(block.waiting)
            block.waiting = []

    def _pass_on(self, turn):
        after = self._queue.popleft()
        if after is not turn:
            after.begin()
            self._wait(turn)
        cuda.running = None if turn is self._host else (self, turn)

    def _wait(self, turn):
        turn.wait()
        if self.failure is not None and turn is not self._host:
            raise _Aborted

    def _run(self, thread, kernel, arguments):
        try:
            self._wait(thread)
            cuda.running = self, thread
            kernel(*arguments)
        except _Aborted:
            return
        except Exception as failure:
            self.failure = failure
            thread.block.alive.remove(thread)
            self._host.begin()
        else:
            thread.block.alive.remove(thread)
            self._open(thread.block)
            self._queue.popleft().begin()


class _Cuda:
    """What a kernel finds under the name ``cuda``."""

    running = None
    """(grid, thread) whose turn it is."""

    def __init__(self):
        self.shared = SimpleNamespace(array=self._shared)
        self.local = SimpleNamespace(array=lambda size, kind: np.full(size, np.nan, dtype=str(kind)))
        self.atomic = SimpleNamespace(add=self._add)

    # The names are Numba's.
    blockIdx = property(lambda self: self.running[1].block.blockIdx)  # noqa: N815  # noqa: N815
    threadIdx = property(lambda self: self.running[1].threadIdx)  # noqa: N815  # noqa: N815
    blockDim = property(lambda self: self.running[0].blockDim)  # noqa: N815  # noqa: N815

    def jit(self, **_):
        return lambda function: function

    def syncthreads(self):
        grid, thread = self.running
        grid.barrier(thread)

    def threadfence(self):
        pass

    def pause(self):
        grid, thread = self.running
        grid.pause(thread)

    def _shared(self, size, kind):
        assert size == 0, "shared memory is asked for at launch"
        return self.running[1].block.shared

    def _add(self, array, index, value):
        self.pause()
        old = array[index]
        array[index] += value
        return old


def _load_word(words, i):
    cuda.pause()
    return int(words[i])


cuda = kernels.cuda = _Cuda()
for _name, _value in list(vars(kernels).items()):
    if isinstance(_value, FakeCUDAKernel):
        setattr(kernels, _name, _value.fn)
persistent.POLLS = 1
# The GPU's instructions in Python, where a word is read and written whole too.
kernels.load_word = _load_word
kernels.store_word = lambda words, i, word: words.__setitem__(i, word)
kernels.float_of = lambda word: np.uint32(word & 0xFFFFFFFF).view(np.float32)
kernels.word_of = lambda number, value: (number << 32) | int(np.float32(value).view(np.uint32))


class Simulator:
    name, capability, shared_bytes = "simulator", (8, 7), 48 << 10

    def __init__(self, processors=1):
        self.processors = processors
        self.launches = 0
        self._grid = None

    def kernel(self, name, shared_bytes):
        kind, _, lanes = name.partition("-")
        run, serve = kernels.kernels(int(lanes or 1))
        return serve if kind == "serve" else run

    def upload(self, array):
        return np.ascontiguousarray(array).ravel().copy()

    def write(self, memory, array, start=0):
        memory[start : start + array.size] = np.asarray(array).ravel()

    def read(self, memory):
        return memory.copy()

    def shared_with_host(self, size, kind=np.float32):
        array = np.zeros(size, dtype=kind)
        return array, array

    def arguments(self, values):
        return values

    def run(self, kernel, grid, threads, shared_bytes, arguments):
        self.start(kernel, grid, threads, shared_bytes, arguments)
        self.wait()

    def start(self, kernel, grid, threads, shared_bytes, arguments):
        self.launches += 1
        # Python threads are slow: start only as many as the kernel's sums need.
        self._grid = _Grid(kernel, grid, ADDERS, shared_bytes, arguments)

    def wait(self):
        while self._grid is not None and self._grid.alive:
            self._grid.advance()

    def is_busy(self):
        if self._grid.alive:
            self._grid.advance()
        return self._grid.alive

    def end_setup(self):
        pass


def create_persistent(network, lanes=1, processors=1):
    return PersistentCudaEngine(network, EngineOptions(lanes), Simulator(processors))


def create(network, lanes=1, processors=1):
    return engine.CudaEngine(network, EngineOptions(lanes), Simulator(processors))
