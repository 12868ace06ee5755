"""What every engine is: a recurrence from samples to outputs, with state it can hand out and take back.

An engine knows nothing of windows: it yields the decoder's output for every sample. Pooling is done after it
(``stream.windows``), which is exact because the decoder is linear: decoder(mean(h)) = mean(decoder(h)).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from edge_ssm.errors import SampleError, SnapshotError, UsageError
from edge_ssm.model.discretize import StepParameters, decayed, step_parameters
from edge_ssm.model.input_range import input_range
from edge_ssm.model.network import Array, Network, fingerprint
from edge_ssm.model.validation import check


@dataclass(frozen=True)
class Snapshot:
    """The recurrent state of all lanes. Any engine of the same network restores it (rounded to its own precision)."""

    fingerprint: str
    """``network.fingerprint`` of the network that the state belongs to."""
    state: tuple[Array, ...]
    """One array a block, (lanes, S) complex: x of ``discretize.StepParameters``."""


class Engine(ABC):
    """Runs ``lanes`` independent streams of one network.

    A sample is (d_input,) for one lane or (lanes, d_input), in the sensor's own units (the engine normalises);
    a chunk has one more axis in front, T samples. Outputs have d_output as last axis instead. A chunk equals as
    many steps, bit for bit.
    """

    name: ClassVar[str]
    dtype: ClassVar[npt.DTypeLike]
    """Of the outputs."""
    lost: str = ""
    """Why the engine was replaced by another while it ran (``fallback``); empty if it was not."""
    where: str = ""
    """On what it runs, where its runtime chose that."""
    warning: str = ""
    """What its user should know of that choice, in one line."""

    def __init__(self, network: Network, lanes: int = 1) -> None:
        if lanes < 1:
            raise UsageError(f"lanes: {lanes}, expected 1 or more")
        check(network)
        self.network = network
        self.lanes = lanes
        self.fingerprint = fingerprint(network)

    def step(self, sample: npt.ArrayLike, out: Array | None = None) -> Array:
        """Advance every lane by one sample; returns the outputs, in ``out`` if given (d_output as last axis).

        Raises SampleError, with the state untouched, if a value is not finite, lies past ``network.INPUT_LIMIT``
        after normalisation, or is no token of the vocabulary.
        """
        x = np.asarray(sample, dtype=np.float64)
        outputs: Array = self._chunk(x[None], None if out is None else out[None])[0]
        return outputs

    def chunk(self, samples: npt.ArrayLike, out: Array | None = None) -> Array:
        """Advance every lane by T samples. The whole chunk is refused, as ``step`` refuses a sample, if one is bad."""
        return self._chunk(np.asarray(samples, dtype=np.float64), out)

    def _chunk(self, samples: Array, out: Array | None) -> Array:
        x = self._laned(samples)
        result = np.empty((*samples.shape[:-1], self.network.d_output), dtype=self.dtype) if out is None else out
        if result.shape != (*samples.shape[:-1], self.network.d_output) or result.dtype != self.dtype:
            raise UsageError(f"out: {result.dtype} {result.shape}, expected {self.dtype} of the samples' leading axes")
        if not result.flags.c_contiguous:
            raise UsageError("out: must be C-contiguous")
        self._run(np.ascontiguousarray(x), result.reshape(len(x), self.lanes, self.network.d_output))
        return result

    def _laned(self, samples: Array) -> Array:
        """(T, d_input) or (T, lanes, d_input) -> (T, lanes, d_input)."""
        expected = (self.lanes, self.network.d_input)
        if samples.ndim == 2 and self.lanes == 1:
            samples = samples[:, None, :]
        if samples.ndim != 3 or samples.shape[1:] != expected:
            raise UsageError(f"samples: shape {samples.shape[1:]} a step, expected (lanes, d_input) = {expected}")
        return samples

    @abstractmethod
    def _run(self, samples: Array, outputs: Array) -> None:
        """(T, lanes, d_input) float64 -> (T, lanes, d_output), both C-contiguous. Raises SampleError first."""

    @abstractmethod
    def reset(self, lane: int | None = None) -> None:
        """Set the state of one lane, or of all, to zero."""

    @cached_property
    def _step_parameters(self) -> list[StepParameters]:
        """Of each block."""
        return [step_parameters(block.ssm, self.network.discretization) for block in self.network.blocks]

    def skip(self, k: int = 1, lane: int | None = None) -> None:
        """Let every state decay by Abar^k, as over ``k`` samples without input, in closed form.

        In a network of several blocks this is an approximation: the later blocks' inputs are taken as zero.
        """
        state, lanes = self._state(), slice(None) if lane is None else lane
        for x, step in zip(state, self._step_parameters, strict=True):
            x[lanes] = decayed(step, x[lanes].astype(np.complex128), k)
        self._set_state(state)

    @abstractmethod
    def _state(self) -> tuple[Array, ...]:
        """A copy of the state, as ``Snapshot.state``."""

    @abstractmethod
    def _set_state(self, state: tuple[Array, ...]) -> None:
        """Take over a state whose shapes were checked."""

    def snapshot(self) -> Snapshot:
        return Snapshot(self.fingerprint, self._state())

    def restore(self, snapshot: Snapshot) -> None:
        """Take a snapshot's state over. Raises SnapshotError, with the state untouched, if it does not belong here."""
        if snapshot.fingerprint != self.fingerprint:
            raise SnapshotError(
                f"snapshot: made for network {snapshot.fingerprint[:12]}..., this one is {self.fingerprint[:12]}...; "
                "start without it"
            )
        expected = [(self.lanes, len(block.ssm.A)) for block in self.network.blocks]
        found = [array.shape for array in snapshot.state]
        if found != expected:
            raise SnapshotError(f"snapshot: state shapes {found}, expected {expected} (lanes, states)")
        if not all(np.isfinite(array).all() for array in snapshot.state):
            raise SnapshotError("snapshot: holds a non-finite state; start without it")
        self._set_state(snapshot.state)


def refusal(network: Network, samples: Array) -> SampleError:
    """The error for the first bad value of ``samples`` (T, lanes, d_input); its text names step, lane and channel."""
    allowed = input_range(network)
    t, lane, channel = (int(i) for i in np.argwhere(allowed.bad(samples))[0])
    value, name = samples[t, lane, channel], network.input.channels[channel]
    expected = (
        f"{'a whole number' if allowed.whole else 'a value'} from {allowed.low[channel]:g} to {allowed.high[channel]:g}"
    )
    return SampleError(f"sample {t}, lane {lane}, channel {name!r}: {value}, expected {expected}; treat it as a gap")
