"""A GPU for ``edge_ssm.engines.cuda``, by Numba's simulator: every thread of a kernel is a thread of Python.

Run with NUMBA_ENABLE_CUDASIM=1. One block a group of lanes: the simulator's blocks run one after another, and can't
wait for each other.
"""

import numpy as np
from numba import cuda

from edge_ssm.engines import cuda as engine
from edge_ssm.engines import cuda_kernel


class Simulator:
    name, capability, shared_bytes = "Numba's simulator", (8, 7), 48 << 10

    def __init__(self, processors=1):
        self.processors = processors
        self.launches = 0

    def kernel(self, lanes_together, shared_bytes):
        return cuda.jit(cuda_kernel.kernel(lanes_together))

    def upload(self, array):
        return np.ascontiguousarray(array).ravel().copy()

    def write(self, memory, array, start=0):
        memory[start : start + array.size] = np.asarray(array).ravel()

    def read(self, memory):
        return memory.copy()

    def shared_with_host(self, size):
        array = np.zeros(size, dtype=np.float32)
        return array, array

    def arguments(self, values):
        return values

    def run(self, kernel, grid, threads, shared_bytes, arguments):
        self.launches += 1
        # A thread of Python is slow: as few as the kernel's sums need.
        kernel[grid, engine.ADDERS, 0, shared_bytes](*arguments)

    def running(self):
        pass


def create(network, lanes=1, processors=1):
    made = engine.CudaEngine(network, lanes, Simulator(processors))
    assert made._plan.blocks == 1
    return made
