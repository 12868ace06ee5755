"""The interface of all engines.

An engine runs the recurrence of a network: it maps samples to outputs of the decoder and owns the recurrent state. It
knows nothing of windows. Pooling comes after the engine (``runtime.windows``), which is exact because the decoder is
linear: decoder(mean(h)) = mean(decoder(h)).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from edge_ssm.engines.options import DEFAULT_OPTIONS, EngineOptions
from edge_ssm.errors import SampleError, SnapshotError, UsageError
from edge_ssm.model.discretize import StepParameters, decayed, step_parameters
from edge_ssm.model.input_range import input_range
from edge_ssm.model.network import Array, MixingDtype, Network, fingerprint
from edge_ssm.model.validation import check


@dataclass(frozen=True)
class Snapshot:
    """The recurrent state of all lanes. Every engine of the same network restores it, rounded to its own precision."""

    fingerprint: str
    """``network.fingerprint`` of the network that the state belongs to."""
    state: tuple[Array, ...]
    """One array per block, shape (lanes, S), complex: x of ``discretize.StepParameters``."""


class Engine(ABC):
    """Runs L independent streams (lanes) of one network.

    A sample has shape (d_input,) for one lane, or (L, d_input), in the units of the sensor: the engine normalises it.
    A chunk of T samples has the additional leading axis T. Outputs have d_output in place of d_input.

    Stepping a chunk gives the same bits as stepping its samples one by one.
    """

    name: ClassVar[str]
    dtype: ClassVar[npt.DTypeLike]
    """Type of the outputs."""
    lost: str = ""
    """Why another engine took over from this one while it ran (``failover``); empty if none did."""
    where: str = ""
    """Device on which the engine runs, if its runtime chose the device."""
    warning: str = ""
    """What users should know about that choice, in one line."""
    graph_weights: MixingDtype = "float32"
    """Type of the weights in the exported graph that the engine runs; float32 for engines that run no graph."""

    def __init__(self, network: Network, options: EngineOptions = DEFAULT_OPTIONS) -> None:
        if options.lanes < 1:
            raise UsageError(f"lanes: {options.lanes}, expected 1 or more")
        check(network)
        self.network = network
        self.lanes = options.lanes
        self.fingerprint = fingerprint(network)

    def step(self, sample: npt.ArrayLike, out: Array | None = None) -> Array:
        """Advance every lane by one sample and return the outputs, written to ``out`` if it is given.

        Raises
        ------
        SampleError
            A value is not finite, lies beyond ``INPUT_LIMIT`` standard deviations, or is not a token of the
            vocabulary. The state is unchanged.
        """
        x = np.asarray(sample, dtype=np.float64)
        outputs: Array = self._chunk(x[None], None if out is None else out[None])[0]
        return outputs

    def chunk(self, samples: npt.ArrayLike, out: Array | None = None) -> Array:
        """Advance every lane by T samples and return the outputs.

        Raises SampleError, as ``step`` does, if any sample of the chunk is bad; the state is then unchanged.
        """
        return self._chunk(np.asarray(samples, dtype=np.float64), out)

    def _chunk(self, samples: Array, out: Array | None) -> Array:
        x = self._with_lanes(samples)
        shape = (*samples.shape[:-1], self.network.d_output)
        outputs = np.empty(shape, dtype=self.dtype) if out is None else out
        if outputs.shape != shape or outputs.dtype != self.dtype:
            raise UsageError(f"out: {outputs.dtype} {outputs.shape}, expected {np.dtype(self.dtype)} {shape}")
        if not outputs.flags.c_contiguous:
            raise UsageError("out: must be C-contiguous")
        self._run(np.ascontiguousarray(x), outputs.reshape(len(x), self.lanes, self.network.d_output))
        return outputs

    def _with_lanes(self, samples: Array) -> Array:
        """(T, d_input) or (T, L, d_input) -> (T, L, d_input)."""
        expected = (self.lanes, self.network.d_input)
        if samples.ndim == 2 and self.lanes == 1:
            samples = samples[:, None, :]
        if samples.ndim != 3 or samples.shape[1:] != expected:
            raise UsageError(f"samples: shape {samples.shape[1:]} per step, expected (lanes, d_input) = {expected}")
        return samples

    @abstractmethod
    def _run(self, samples: Array, outputs: Array) -> None:
        """Step samples (T, L, d_input), float64, into ``outputs`` (T, L, d_output). Both are C-contiguous.

        Raises SampleError before the state changes.
        """

    @abstractmethod
    def reset(self, lane: int | None = None) -> None:
        """Set the state of one lane, or of all lanes, to zero."""

    @cached_property
    def _step_parameters(self) -> list[StepParameters]:
        """Parameters of one step, for each block."""
        return [step_parameters(block.ssm, self.network.discretization) for block in self.network.blocks]

    def skip(self, k: int = 1, lane: int | None = None) -> None:
        """Let every state decay by Abar^k in closed form, as over ``k`` samples without input.

        This is exact for one block. In a network of several blocks it is an approximation: it takes the inputs of
        the later blocks as zero.
        """
        state, lanes = self._state(), slice(None) if lane is None else lane
        for x, step in zip(state, self._step_parameters, strict=True):
            x[lanes] = decayed(step, x[lanes].astype(np.complex128), k)
        self._set_state(state)

    @abstractmethod
    def _state(self) -> tuple[Array, ...]:
        """Return a copy of the state, as in ``Snapshot.state``."""

    @abstractmethod
    def _set_state(self, state: tuple[Array, ...]) -> None:
        """Replace the state. The caller has checked the shapes."""

    def snapshot(self) -> Snapshot:
        """Return a copy of the state of all lanes."""
        return Snapshot(self.fingerprint, self._state())

    def restore(self, snapshot: Snapshot) -> None:
        """Replace the state by a snapshot's.

        Raises SnapshotError if the snapshot belongs to another network or number of lanes, or holds a non-finite
        value; the state is then unchanged.
        """
        if snapshot.fingerprint != self.fingerprint:
            raise SnapshotError(
                f"snapshot: made for network {snapshot.fingerprint[:12]}..., this one is {self.fingerprint[:12]}...; "
                "start without it"
            )
        expected = [(self.lanes, len(block.ssm.A)) for block in self.network.blocks]
        shapes = [array.shape for array in snapshot.state]
        if shapes != expected:
            raise SnapshotError(f"snapshot: state shapes {shapes}, expected {expected} (lanes, states)")
        if not all(np.isfinite(array).all() for array in snapshot.state):
            raise SnapshotError("snapshot: contains a non-finite state; start without it")
        self._set_state(snapshot.state)


def sample_error(network: Network, samples: Array) -> SampleError:
    """Return the error for the first bad value of ``samples`` (T, L, d_input). It names step, lane and channel."""
    limits = input_range(network)
    t, lane, channel = (int(i) for i in np.argwhere(limits.bad(samples))[0])
    value, name = samples[t, lane, channel], network.input.channels[channel]
    kind = "a whole number" if limits.whole else "a value"
    return SampleError(
        f"sample {t}, lane {lane}, channel {name!r}: {value}, expected {kind} from {limits.low[channel]:g} to "
        f"{limits.high[channel]:g}; treat it as a gap"
    )
