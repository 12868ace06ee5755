"""A GPU for the CUDA engines, in Numba's simulator: every thread of a kernel is a Python thread.

Run with NUMBA_ENABLE_CUDASIM=1. The simulator runs one block after another. Where blocks wait for one another,
``_run_concurrently`` runs all of them at once, each with its own shared memory.
"""

import sys
import threading
import time

import numpy as np
from numba import cuda
from numba.cuda.simulator import kernel as simulated
from numba.cuda.simulator.kernelapi import FakeCUDAModule, FakeCUDAShared

from edge_ssm.engines.cuda import engine, kernels, persistent
from edge_ssm.engines.cuda.layout import ADDERS
from edge_ssm.engines.cuda.persistent import PersistentCudaEngine
from edge_ssm.engines.options import EngineOptions

persistent.POLLS = 1
# The GPU's instructions in Python, where a word is read and written whole too.
kernels.load_word = lambda words, i: (time.sleep(1e-3), int(words[i]))[1]
kernels.store_word = lambda words, i, word: words.__setitem__(i, word)
kernels.float_of = lambda word: np.uint32(word & 0xFFFFFFFF).view(np.float32)
kernels.word_of = lambda number, value: (number << 32) | int(np.float32(value).view(np.uint32))


class _Module(FakeCUDAModule):
    def __init__(self, grid, threads, shared_bytes):
        super().__init__(grid, threads, shared_bytes)
        self._of_block = {i: FakeCUDAShared(shared_bytes) for i in range(grid[0])}

    @property
    def shared(self):
        return self._of_block[self.blockIdx.x]


def _run_concurrently(kernel, grid, threads, shared_bytes, arguments):
    module = _Module((grid, 1, 1), (threads, 1, 1), shared_bytes)
    failures = []

    def run(block):
        try:
            simulated.BlockManager(kernel.fn, (grid, 1, 1), (threads, 1, 1), False).run((block, 0, 0), *arguments)
        except Exception as failure:
            failures.append(failure)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads that poll must not keep the others from running
    try:
        with simulated._push_kernel_context(module), simulated.swapped_cuda_module(kernel.fn, module):
            blocks = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(grid)]
            for block in blocks:
                block.start()
            for block in blocks:
                block.join()
    finally:
        sys.setswitchinterval(before)
    if failures:
        raise failures[0]


class Simulator:
    name, capability, shared_bytes = "Numba's simulator", (8, 7), 48 << 10

    def __init__(self, processors=1):
        self.processors = processors
        self.launches = 0

    def kernel(self, name, shared_bytes):
        kind, _, lanes = name.partition("-")
        run, serve = kernels.kernels(int(lanes or 1))
        return cuda.jit(serve if kind == "serve" else run)

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
        self.launches += 1
        # Python threads are slow: start only as many as the kernel's sums need.
        if blocks_of(arguments) > 1:
            _run_concurrently(kernel, grid, ADDERS, shared_bytes, arguments)
        else:
            kernel[grid, ADDERS, 0, shared_bytes](*arguments)

    def start(self, kernel, grid, threads, shared_bytes, arguments):
        self.launches += 1
        arguments = kernel, grid, ADDERS, shared_bytes, arguments
        self._serving = threading.Thread(target=_run_concurrently, args=arguments, daemon=True)
        self._serving.start()

    def wait(self):
        self._serving.join(60)
        assert not self._serving.is_alive()

    def is_busy(self):
        time.sleep(5e-3)  # polling keeps the kernel's threads from running
        return self._serving.is_alive()

    def end_setup(self):
        pass


def blocks_of(arguments):
    """Return the number of blocks of a group: the last number before the scratch memory and the counters."""
    return arguments[-3]


def create_persistent(network, lanes=1, processors=1):
    return PersistentCudaEngine(network, EngineOptions(lanes), Simulator(processors))


def create(network, lanes=1, processors=1):
    return engine.CudaEngine(network, EngineOptions(lanes), Simulator(processors))
