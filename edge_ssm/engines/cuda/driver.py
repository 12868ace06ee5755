"""An NVIDIA GPU through the CUDA Driver API (version 12): memory, modules and launches, without a compiler.

The status of every call is checked. A failure raises EngineUnavailable while an engine is created, and RunFailed from
then on.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_ssm.engines.cuda import cache as cuda_cache
from edge_ssm.engines.options import Synchronization
from edge_ssm.errors import EngineUnavailable, RunFailed
from edge_ssm.model.network import Array

DEVICE_MAP = 2
"""CU_MEMHOSTALLOC_DEVICEMAP: the GPU reads and writes the host's pages in place."""
SYNCHRONIZATION_FLAGS: dict[Synchronization, int] = {"spin": 1, "yield": 2, "block": 4}
"""CUctx_flags: CU_CTX_SCHED_SPIN, CU_CTX_SCHED_YIELD and CU_CTX_SCHED_BLOCKING_SYNC."""
_TOOLKIT = "compile with the driver's CUDA version or an older one: JetPack 6 has CUDA 12.6, JetPack 7 CUDA 13"


@dataclass(frozen=True)
class Memory:
    """An array in the GPU's memory: address, number of values, and their type."""

    address: int
    size: int
    dtype: np.dtype[Any]


class Device:
    """One GPU, its primary context, and a stream."""

    def __init__(self, index: int = 0, synchronization: Synchronization = "spin") -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise EngineUnavailable(
                f"engine 'cuda': cuda-bindings does not load ({error}); pip install 'edge-ssm[cuda]'"
            ) from None
        self._driver: Any = driver
        self._error: type[Exception] = EngineUnavailable
        try:
            self.call("cuInit", 0)
        except EngineUnavailable:
            raise
        except Exception as error:  # the package raises an exception of its own if the driver's library is missing
            raise EngineUnavailable(f"engine 'cuda': no NVIDIA driver ({type(error).__name__})") from None
        if self.call("cuDeviceGetCount") <= index:
            raise EngineUnavailable(f"engine 'cuda': no GPU number {index}")
        self._device = self.call("cuDeviceGet", index)
        self.call("cuDevicePrimaryCtxSetFlags", self._device, SYNCHRONIZATION_FLAGS[synchronization])
        self._context = self.call("cuDevicePrimaryCtxRetain", self._device)
        self.call("cuCtxSetCurrent", self._context)
        self.stream = self.call("cuStreamCreate", 1)
        self.name = self.call("cuDeviceGetName", 256, self._device).split(b"\0")[0].decode()
        self.driver_version: int = self.call("cuDriverGetVersion")
        attribute = driver.CUdevice_attribute
        attributes = {
            "major": attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            "minor": attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            "processors": attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            "shared": attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        }
        values = {name: int(self.call("cuDeviceGetAttribute", a, self._device)) for name, a in attributes.items()}
        self.capability = values["major"], values["minor"]
        self.processors, self.shared_bytes = values["processors"], values["shared"]

    def end_setup(self) -> None:
        """Raise RunFailed instead of EngineUnavailable from now on: the engine has been created."""
        self._error = RunFailed

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the driver. Return its result, a tuple of several results, or None."""
        status, *results = getattr(self._driver, name)(*arguments)
        if int(status) != 0:
            raise self._error(f"engine 'cuda': {self.explain(name, status)}")
        if not results:
            return None
        return results[0] if len(results) == 1 else tuple(results)

    def explain(self, call: str, status: Any) -> str:
        """Return what the status of a failed call means."""
        name = status.name.removeprefix("CUDA_ERROR_").lower().replace("_", " ")
        if "ptx" in name:
            cuda = f"CUDA {self.driver_version // 1000}.{self.driver_version % 1000 // 10}"
            return f"the driver ({cuda}) does not accept the kernel ({name}); {_TOOLKIT}"
        if name == "out of memory":
            return "the GPU is out of memory; use fewer lanes"
        return f"{call} failed ({name})"

    def kernel(self, name: str, shared_bytes: int) -> Any:
        """Load a kernel (``compiler.KERNELS``) that may use ``shared_bytes`` of dynamic shared memory."""
        kernel = cuda_cache.load(f"sm_{self.capability[0]}{self.capability[1]}")[name]
        module = self.call("cuModuleLoadData", kernel.ptx + b"\0")
        function = self.call("cuModuleGetFunction", module, kernel.header.entry.encode())
        attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self.call("cuFuncSetAttribute", function, attribute, shared_bytes)
        return function

    def upload(self, array: Array) -> Memory:
        """Copy an array to new memory of the GPU."""
        flat = np.ascontiguousarray(array).ravel()
        address = int(self.call("cuMemAlloc", max(1, flat.nbytes)))
        self.call("cuMemcpyHtoD", address, flat.ctypes.data, flat.nbytes)
        return Memory(address, flat.size, flat.dtype)

    def write(self, memory: Memory, array: Array, start: int = 0) -> None:
        """Copy an array to the GPU's memory, beginning at value number ``start``."""
        flat = np.ascontiguousarray(array, dtype=memory.dtype).ravel()
        self.call("cuMemcpyHtoD", memory.address + start * memory.dtype.itemsize, flat.ctypes.data, flat.nbytes)

    def read(self, memory: Memory) -> Array:
        """Return a copy of the GPU's memory."""
        values = np.empty(memory.size, dtype=memory.dtype)
        self.call("cuMemcpyDtoH", values.ctypes.data, memory.address, values.nbytes)
        return values

    def shared_with_host(self, size: int, kind: type[np.generic] = np.float32) -> tuple[Array, Memory]:
        """Allocate ``size`` zeros that the host and the GPU both access; on Tegra they do so without copying.

        Returns the host's array, and the same memory as the GPU sees it.
        """
        dtype = np.dtype(kind)
        host = int(self.call("cuMemHostAlloc", size * dtype.itemsize, DEVICE_MAP))
        memory = (ctypes.c_char * (size * dtype.itemsize)).from_address(host)
        array: Array = np.frombuffer(memoryview(memory), dtype=dtype)
        array[...] = 0
        return array, Memory(int(self.call("cuMemHostGetDevicePointer", host, 0)), size, dtype)

    def arguments(self, values: list[Memory | int]) -> Any:
        """Return the arguments of a launch: an int becomes an int32, a Memory its address.

        The last Memory, which holds the atomic counters, becomes a Numba array.
        """
        packed: list[Any] = []
        kinds: list[Any] = []
        for i, value in enumerate(values):
            if isinstance(value, int):
                packed.append(value)
                kinds.append(ctypes.c_int32)
            elif i == len(values) - 1:
                # Fields of Numba's array: meminfo, parent, nitems, itemsize, data, shape, strides.
                packed += [0, 0, value.size, value.dtype.itemsize, value.address, value.size, value.dtype.itemsize]
                kinds += [
                    ctypes.c_void_p,
                    ctypes.c_void_p,
                    *[ctypes.c_int64] * 2,
                    ctypes.c_void_p,
                    *[ctypes.c_int64] * 2,
                ]
            else:
                packed.append(value.address)
                kinds.append(ctypes.c_void_p)
        return tuple(packed), tuple(kinds)

    def start(self, function: Any, grid: int, threads: int, shared_bytes: int, arguments: Any) -> None:
        """Launch a kernel, and return at once."""
        self.call("cuLaunchKernel", function, grid, 1, 1, threads, 1, 1, shared_bytes, self.stream, arguments, 0)

    def wait(self) -> None:
        """Wait until all launched kernels have ended."""
        self.call("cuStreamSynchronize", self.stream)

    def is_busy(self) -> bool:
        """Return whether a launched kernel still runs. Raises an error if it failed."""
        (status,) = self._driver.cuStreamQuery(self.stream)
        if status == self._driver.CUresult.CUDA_ERROR_NOT_READY:
            return True
        if int(status) != 0:
            raise self._error(f"engine 'cuda': {self.explain('the persistent kernel', status)}")
        return False

    def run(self, function: Any, grid: int, threads: int, shared_bytes: int, arguments: Any) -> None:
        """Launch a kernel, and wait until it has ended."""
        driver = self._driver
        (status,) = driver.cuLaunchKernel(function, grid, 1, 1, threads, 1, 1, shared_bytes, self.stream, arguments, 0)
        if int(status) == 0:
            (status,) = driver.cuStreamSynchronize(self.stream)
        if int(status) != 0:
            raise self._error(f"engine 'cuda': {self.explain('a launch', status)}")
