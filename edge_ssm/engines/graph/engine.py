"""What the engines have in common that run a graph in another project's runtime (``onnx``, ``tflite``).

The graph comes from an exported file, or is made here from the network, where the package for that is installed.
Samples are checked and normalised in float64 before they become the graph's float32.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from edge_ssm.engines.base import Engine, refusal
from edge_ssm.engines.graph.denormals import Flushing
from edge_ssm.errors import ArtifactError, UsageError
from edge_ssm.formats import exported
from edge_ssm.formats.containers import GraphKind
from edge_ssm.formats.exported import Graph
from edge_ssm.formats.graph.parts import cells_of
from edge_ssm.model.input_range import input_range
from edge_ssm.model.network import Array, Network, TokenEncoder

MOST_THREADS = 256
FEW = 16
"""Up to so many channels of one sample are sooner compared one by one than by NumPy's calls."""


@dataclass(frozen=True)
class Slot:
    """A group of a layer's states in the graph."""

    names: tuple[str, str]
    """Of the real and of the imaginary part, as inputs."""
    shape: tuple[int, int]  # (k, n)
    block: int
    states: Array  # (s,) places in the block's axis of S
    cells: Array  # (s,) places of the same in (k, n), flat


class ExportedEngine(Engine):
    kind: ClassVar[GraphKind]
    dtype: ClassVar[npt.DTypeLike] = np.dtype(np.float32)

    def __init__(self, network: Network, lanes: int = 1, graph: Graph | None = None, threads: int = 1) -> None:
        super().__init__(network, lanes)
        if not 1 <= threads <= MOST_THREADS:
            raise UsageError(f"threads: {threads}, expected 1 to {MOST_THREADS}")
        self.graph = self._fitting(graph)
        self._slots = _slots(network, self.graph)
        self._range = input_range(network)
        self._token = isinstance(network.encoder, TokenEncoder)
        self._mean, self._std = network.input.mean, network.input.std
        self._step_shape = (network.d_input,) if lanes == 1 else (lanes, network.d_input)
        few = not self._token and network.d_input <= FEW
        self._limits = list(zip(self._range.low.tolist(), self._range.high.tolist(), strict=True)) if few else None
        self._flushing = Flushing()
        with self._flushing.kept():
            self._open(threads)

    def _fitting(self, graph: Graph | None) -> Graph:
        """The file's own graph, or one made here: of an artifact, or for another sample rate than the file's."""
        if graph is not None and graph.kind == self.kind:
            if graph.spec.fingerprint == self.fingerprint:
                return graph
            spec, alternative = graph.spec, ", or stream at the file's own sample rate, or take --engine cpu"
            return exported.build(
                self.kind, self.network, spec.weights, spec.input_maxima, spec.chunk, alternative=alternative
            )
        command = f"edge-ssm-build export MODEL --to {self.kind} --output MODEL.{self.kind}"
        return exported.build(self.kind, self.network, alternative=f", or on the workstation: {command}")

    def step(self, sample: npt.ArrayLike, out: Array | None = None) -> Array:
        x = np.asarray(sample, dtype=np.float64)
        if out is not None or self.lanes > 1 or x.shape != self._step_shape:
            return super().step(x, out)
        # A small network's step is mostly calls: as few as can be for one sample of one lane.
        result = np.empty((1, self.network.d_output), dtype=np.float32)
        z = (x - self._mean) / self._std if self._within(x) else self._normalised(x[None, None])[0, 0]
        self._flushing.enter()
        try:
            self._advance(0, z[None], result)
        finally:
            self._flushing.leave()
        outputs: Array = result[0]
        return outputs

    def _within(self, sample: Array) -> bool:
        """Whether a sample (d_input,) is known to be fit for the state, without much looking."""
        limits = self._limits
        return limits is not None and all(
            low <= v <= high for v, (low, high) in zip(sample.tolist(), limits, strict=True)
        )

    def _run(self, samples: Array, outputs: Array) -> None:
        if not len(samples):
            return
        z = self._normalised(samples)
        self._flushing.enter()
        try:
            for lane in range(self.lanes):
                self._advance(lane, z[:, lane], outputs[:, lane])
        finally:
            self._flushing.leave()

    def _normalised(self, samples: Array) -> Array:
        """(T, lanes, d_input) -> the graph's input of the same shape, float64. Raises SampleError."""
        if self._range.bad(samples).any():
            raise refusal(self.network, samples)
        z: Array = samples if self._token else (samples - self._mean) / self._std
        return z

    @abstractmethod
    def _open(self, threads: int) -> None:
        """Make the runtime's session, all states zero. Raises ArtifactError for a graph that does not fit."""

    @abstractmethod
    def _advance(self, lane: int, z: Array, outputs: Array) -> None:
        """(T, d_input), T at least 1 -> (T, d_output), one lane's samples in turn."""

    @abstractmethod
    def _read(self, lane: int) -> list[tuple[Array, Array]]:
        """Copies of a lane's states, real and imaginary part (k, n) of each slot."""

    @abstractmethod
    def _write(self, lane: int, states: list[tuple[Array, Array]]) -> None:
        """Take over float32 states, as ``_read`` gives them."""

    def reset(self, lane: int | None = None) -> None:
        zeros = [(np.zeros(slot.shape, np.float32), np.zeros(slot.shape, np.float32)) for slot in self._slots]
        for one in range(self.lanes) if lane is None else (lane,):
            self._write(one, zeros)

    def _state(self) -> tuple[Array, ...]:
        found = tuple(np.zeros((self.lanes, len(b.ssm.A)), dtype=np.complex64) for b in self.network.blocks)
        for lane in range(self.lanes):
            for slot, (re, im) in zip(self._slots, self._read(lane), strict=True):
                found[slot.block][lane, slot.states] = (re + 1j * im).ravel()[slot.cells]
        return found

    def _set_state(self, state: tuple[Array, ...]) -> None:
        for lane in range(self.lanes):
            parts = []
            for slot in self._slots:
                both = np.zeros(slot.shape[0] * slot.shape[1], dtype=np.complex64)
                both[slot.cells] = state[slot.block][lane, slot.states]
                re, im = (np.ascontiguousarray(part).reshape(slot.shape) for part in (both.real, both.imag))
                parts.append((re, im))
            self._write(lane, parts)

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs for one sample."""
        shapes: dict[str, tuple[int, ...]] = {"input": (1, self.network.d_input)}
        return shapes | {name: slot.shape for slot in self._slots for name in slot.names}

    def _check(self, given: dict[str, tuple[int, ...]], made: dict[str, tuple[int, ...]]) -> None:
        """Raise ArtifactError unless the graph's inputs and outputs have the names and shapes that they should have."""
        expected = self._expected()
        outputs = {f"new.{name}": shape for name, shape in expected.items() if name != "input"}
        for found, wanted in ((given, expected), (made, outputs | {"output": (1, self.network.d_output)})):
            for name, shape in wanted.items():
                if found.get(name) != shape:
                    raise ArtifactError(
                        f"{self.kind} graph: tensor {name} is {found.get(name, 'missing')}, expected {shape}; "
                        "export it again"
                    )


def _slots(network: Network, graph: Graph) -> list[Slot]:
    slots = []
    for i, (states, block) in enumerate(zip(graph.spec.states, network.blocks, strict=True)):
        for state in states:
            at, cells = cells_of(block.ssm.pairs, np.array(state.channels, dtype=np.int64), state.pairs)
            slots.append(Slot((state.re, state.im), (len(state.channels), state.pairs), i, at, cells))
    return slots
