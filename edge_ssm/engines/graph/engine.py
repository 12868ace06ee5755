"""The common part of the engines that run an exported graph in another project's runtime (``onnx``, ``tflite``).

The graph comes from an exported file, or is built from the network if the package for that is installed. Samples are
checked and normalised in float64 before they become the float32 input of the graph.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from edge_ssm.engines.base import Engine, sample_error
from edge_ssm.engines.graph.denormals import Flushing
from edge_ssm.engines.options import DEFAULT_OPTIONS, EngineOptions
from edge_ssm.errors import ArtifactError, UsageError
from edge_ssm.formats import exported
from edge_ssm.formats.containers import GraphKind
from edge_ssm.formats.exported import Graph
from edge_ssm.formats.graph.parts import cells_of
from edge_ssm.model.input_range import input_range
from edge_ssm.model.network import Array, Network, TokenEncoder

MOST_THREADS = 256
FEW_CHANNELS = 16
"""Number of channels up to which a sample is compared faster value by value than by NumPy."""


@dataclass(frozen=True)
class StateTensor:
    """A pair of tensors of the graph that hold the real and imaginary parts of some states of a layer."""

    names: tuple[str, str]
    """Names of the real and the imaginary part, as inputs of the graph."""
    shape: tuple[int, int]
    """Shape (channels, pairs) of each of the two tensors."""
    block: int
    """Index of the layer."""
    states: Array
    """Shape (n,), int64: indices of the states in the layer's axis of S."""
    cells: Array
    """Shape (n,), int64: indices of the same states in the flattened tensor."""


class ExportedEngine(Engine):
    """Runs an exported graph. A subclass implements it for one runtime."""

    kind: ClassVar[GraphKind]
    """Format of the graph."""
    dtype: ClassVar[npt.DTypeLike] = np.dtype(np.float32)

    def __init__(self, network: Network, options: EngineOptions = DEFAULT_OPTIONS) -> None:
        super().__init__(network, options)
        threads = options.threads or 1
        if not 1 <= threads <= MOST_THREADS:
            raise UsageError(f"threads: {threads}, expected 1 to {MOST_THREADS}")
        self.graph = self._fitting_graph(options.graph)
        self.graph_weights = self.graph.spec.weights
        self._tensors = _state_tensors(network, self.graph)
        self._range = input_range(network)
        self._token = isinstance(network.encoder, TokenEncoder)
        self._mean, self._std = network.input.mean, network.input.std
        self._step_shape = (network.d_input,) if self.lanes == 1 else (self.lanes, network.d_input)
        few = not self._token and network.d_input <= FEW_CHANNELS
        self._limits = list(zip(self._range.low.tolist(), self._range.high.tolist(), strict=True)) if few else None
        self._flushing = Flushing()
        with self._flushing.preserved():
            self._open(threads)

    def _fitting_graph(self, graph: Graph | None) -> Graph:
        """Return ``graph`` if it is that of the network, or else build one.

        A graph is built for an artifact, for a file of another format, and for another sample rate than the file's.
        """
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
        """Advance every lane by one sample and return the outputs, written to ``out`` if it is given."""
        x = np.asarray(sample, dtype=np.float64)
        if out is not None or self.lanes > 1 or x.shape != self._step_shape:
            return super().step(x, out)
        # Calls are most of a small network's step: a single sample of a single lane takes as few as possible.
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
        """Return whether a sample (d_input,) is known to be acceptable. False means that it must be checked."""
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
        """Return the graph's input for samples (T, L, d_input): same shape, float64. Raises SampleError."""
        if self._range.bad(samples).any():
            raise sample_error(self.network, samples)
        z: Array = samples if self._token else (samples - self._mean) / self._std
        return z

    @abstractmethod
    def _open(self, threads: int) -> None:
        """Create the runtime's session, with all states zero. Raises ArtifactError for a graph that does not fit."""

    @abstractmethod
    def _advance(self, lane: int, z: Array, outputs: Array) -> None:
        """Step the samples of one lane, (T, d_input) with T at least 1, into ``outputs`` (T, d_output)."""

    @abstractmethod
    def _read(self, lane: int) -> list[tuple[Array, Array]]:
        """Return copies of a lane's states: the real and the imaginary part of each of ``_tensors``."""

    @abstractmethod
    def _write(self, lane: int, states: list[tuple[Array, Array]]) -> None:
        """Replace a lane's states by float32 states in the form that ``_read`` returns."""

    def reset(self, lane: int | None = None) -> None:
        """Set the state of one lane, or of all lanes, to zero."""
        zeros = [(np.zeros(t.shape, np.float32), np.zeros(t.shape, np.float32)) for t in self._tensors]
        for index in range(self.lanes) if lane is None else (lane,):
            self._write(index, zeros)

    def _state(self) -> tuple[Array, ...]:
        state = tuple(np.zeros((self.lanes, len(b.ssm.A)), dtype=np.complex64) for b in self.network.blocks)
        for lane in range(self.lanes):
            for tensor, (re, im) in zip(self._tensors, self._read(lane), strict=True):
                state[tensor.block][lane, tensor.states] = (re + 1j * im).ravel()[tensor.cells]
        return state

    def _set_state(self, state: tuple[Array, ...]) -> None:
        for lane in range(self.lanes):
            parts = []
            for tensor in self._tensors:
                x = np.zeros(tensor.shape[0] * tensor.shape[1], dtype=np.complex64)
                x[tensor.cells] = state[tensor.block][lane, tensor.states]
                re, im = (np.ascontiguousarray(part).reshape(tensor.shape) for part in (x.real, x.imag))
                parts.append((re, im))
            self._write(lane, parts)

    def _input_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes that the graph's inputs must have for one sample, by name."""
        shapes: dict[str, tuple[int, ...]] = {"input": (1, self.network.d_input)}
        return shapes | {name: tensor.shape for tensor in self._tensors for name in tensor.names}

    def _check(self, inputs: dict[str, tuple[int, ...]], outputs: dict[str, tuple[int, ...]]) -> None:
        """Raise ArtifactError unless the graph's inputs and outputs have the expected names and shapes."""
        expected_inputs = self._input_shapes()
        expected_outputs = {f"new.{name}": shape for name, shape in expected_inputs.items() if name != "input"}
        expected_outputs["output"] = (1, self.network.d_output)
        for shapes, expected in ((inputs, expected_inputs), (outputs, expected_outputs)):
            for name, shape in expected.items():
                if shapes.get(name) != shape:
                    raise ArtifactError(
                        f"{self.kind} graph: tensor {name} is {shapes.get(name, 'missing')}, expected {shape}; "
                        "export it again"
                    )


def _state_tensors(network: Network, graph: Graph) -> list[StateTensor]:
    tensors = []
    for i, (states, block) in enumerate(zip(graph.spec.states, network.blocks, strict=True)):
        for state in states:
            indices, cells = cells_of(block.ssm.pairs, np.array(state.channels, dtype=np.int64), state.pairs)
            shape = len(state.channels), state.pairs
            tensors.append(StateTensor((state.re, state.im), shape, i, indices, cells))
    return tensors


def error_line(error: Exception) -> str:
    """Return the text of a runtime's error as one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]
