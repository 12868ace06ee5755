"""An NVIDIA GPU through the driver's own interface (CUDA Driver API 12): memory, modules, launches. No compiler.

Every call's status is looked at; a failure is an EngineUnavailable while an engine is being made, a RunFailed later.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_ssm.engines.cuda import cache as cuda_cache
from edge_ssm.errors import EngineUnavailable, RunFailed
from edge_ssm.model.network import Array

DEVICE_MAP = 2
"""CU_MEMHOSTALLOC_DEVICEMAP: the GPU reads and writes the host's pages in place."""
BLOCKING_SYNC, SPIN, YIELD = 4, 1, 2
"""Of CUctx_flags: how a thread waits."""
WAITS = {"spin": SPIN, "yield": YIELD, "block": BLOCKING_SYNC}
_TOOLKIT = "compile with the toolkit that the driver knows: JetPack 6 has CUDA 12.6, JetPack 7 CUDA 13"


@dataclass(frozen=True)
class Memory:
    """Of the GPU: an address, and how many values of what type."""

    address: int
    size: int
    dtype: np.dtype[Any]


class Device:
    """One GPU, its primary context, and a stream. ``waits``: a key of WAITS."""

    def __init__(self, index: int = 0, waits: str = "spin") -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise EngineUnavailable(
                f"engine 'cuda': cuda-bindings does not load ({error}); pip install 'edge-ssm[cuda]'"
            ) from None
        self._driver: Any = driver
        self._error: type[Exception] = EngineUnavailable
        try:
            self._do("cuInit", 0)
        except EngineUnavailable:
            raise
        except Exception as error:  # the package has its own for a library that is not there
            raise EngineUnavailable(f"engine 'cuda': no NVIDIA driver here ({type(error).__name__})") from None
        if self._do("cuDeviceGetCount") <= index:
            raise EngineUnavailable(f"engine 'cuda': no GPU number {index} here")
        self._device = self._do("cuDeviceGet", index)
        self._do("cuDevicePrimaryCtxSetFlags", self._device, WAITS[waits])
        self._context = self._do("cuDevicePrimaryCtxRetain", self._device)
        self._do("cuCtxSetCurrent", self._context)
        self._stream = self._do("cuStreamCreate", 1)
        self.name = self._do("cuDeviceGetName", 256, self._device).split(b"\0")[0].decode()
        self.driver_version: int = self._do("cuDriverGetVersion")
        attribute = driver.CUdevice_attribute
        of = {
            "major": attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            "minor": attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            "processors": attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            "shared": attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        }
        found = {name: int(self._do("cuDeviceGetAttribute", which, self._device)) for name, which in of.items()}
        self.capability = found["major"], found["minor"]
        self.processors, self.shared_bytes = found["processors"], found["shared"]

    def running(self) -> None:
        """From here on a failure is one of a run, not of making an engine."""
        self._error = RunFailed

    def _do(self, call: str, *arguments: Any) -> Any:
        status, *found = getattr(self._driver, call)(*arguments)
        if int(status) != 0:
            raise self._error(f"engine 'cuda': {self._meaning(call, status)}")
        if not found:
            return None
        return found[0] if len(found) == 1 else tuple(found)

    def _meaning(self, call: str, status: Any) -> str:
        name = status.name.removeprefix("CUDA_ERROR_").lower().replace("_", " ")
        if "ptx" in name:
            cuda = f"CUDA {self.driver_version // 1000}.{self.driver_version % 1000 // 10}"
            return f"the driver ({cuda}) does not take the kernel ({name}); {_TOOLKIT}"
        if name == "out of memory":
            return "the GPU is out of memory; use fewer lanes"
        return f"{call} failed ({name})"

    def kernel(self, name: str, shared_bytes: int) -> Any:
        """The kernel of ``cuda_compiler.KERNELS`` for this GPU, allowed ``shared_bytes`` of dynamic shared memory."""
        kept = cuda_cache.load(f"sm_{self.capability[0]}{self.capability[1]}")[name]
        loaded = self._do("cuModuleLoadData", kept.ptx + b"\0")
        function = self._do("cuModuleGetFunction", loaded, kept.header.entry.encode())
        attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._do("cuFuncSetAttribute", function, attribute, shared_bytes)
        return function

    def upload(self, array: Array) -> Memory:
        flat = np.ascontiguousarray(array).ravel()
        address = int(self._do("cuMemAlloc", max(1, flat.nbytes)))
        self._do("cuMemcpyHtoD", address, flat.ctypes.data, flat.nbytes)
        return Memory(address, flat.size, flat.dtype)

    def write(self, memory: Memory, array: Array, start: int = 0) -> None:
        """Values of ``array`` to where value number ``start`` is."""
        flat = np.ascontiguousarray(array, dtype=memory.dtype).ravel()
        self._do("cuMemcpyHtoD", memory.address + start * memory.dtype.itemsize, flat.ctypes.data, flat.nbytes)

    def read(self, memory: Memory) -> Array:
        found = np.empty(memory.size, dtype=memory.dtype)
        self._do("cuMemcpyDtoH", found.ctypes.data, memory.address, found.nbytes)
        return found

    def shared_with_host(self, size: int, kind: type[np.generic] = np.float32) -> tuple[Array, Memory]:
        """``size`` zeros that the host and the GPU both see: no copy on Tegra, whose memory is one."""
        dtype = np.dtype(kind)
        host = int(self._do("cuMemHostAlloc", size * dtype.itemsize, DEVICE_MAP))
        memory = (ctypes.c_char * (size * dtype.itemsize)).from_address(host)
        array: Array = np.frombuffer(memoryview(memory), dtype=dtype)
        array[...] = 0
        return array, Memory(int(self._do("cuMemHostGetDevicePointer", host, 0)), size, dtype)

    def arguments(self, values: list[Memory | int]) -> Any:
        """A kernel's: a Memory is its address, the last one, of atomic counters, a Numba array, an int an int32."""
        packed: list[Any] = []
        kinds: list[Any] = []
        for i, value in enumerate(values):
            if isinstance(value, int):
                packed.append(value)
                kinds.append(ctypes.c_int32)
            elif i == len(values) - 1:
                # numba's array: owner, parent, items, bytes of one, data, shape, strides.
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
        """Launch, and do not wait."""
        self._do("cuLaunchKernel", function, grid, 1, 1, threads, 1, 1, shared_bytes, self._stream, arguments, 0)

    def wait(self) -> None:
        self._do("cuStreamSynchronize", self._stream)

    def running_still(self) -> bool:
        """Whether what was started has not ended; raises as every call does if it failed."""
        (status,) = self._driver.cuStreamQuery(self._stream)
        if status == self._driver.CUresult.CUDA_ERROR_NOT_READY:
            return True
        if int(status) != 0:
            raise self._error(f"engine 'cuda': {self._meaning('the kernel that serves', status)}")
        return False

    def run(self, function: Any, grid: int, threads: int, shared_bytes: int, arguments: Any) -> None:
        """Launch, and wait until it is done."""
        driver = self._driver
        (status,) = driver.cuLaunchKernel(function, grid, 1, 1, threads, 1, 1, shared_bytes, self._stream, arguments, 0)
        if int(status) == 0:
            (status,) = driver.cuStreamSynchronize(self._stream)
        if int(status) != 0:
            raise self._error(f"engine 'cuda': {self._meaning('a launch', status)}")
