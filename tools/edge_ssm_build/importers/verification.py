"""Comparison of streams with convolutions; that the two disagree is the oldest complaint of state-spaces users.

This module computes the convolution in float64 in two ways: from the parameters of an imported checkpoint, as its
project computes it (Vandermonde sums; for DPLR the generating function of the truncated C), and from an artifact's.
Neither uses the step parameters that the engines run on. The same independence is the reason why this module has its
own discretization, GELU, layer norm and mixing: an error in those of the engines must not cancel here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_ssm.engines.registry import available, create
from edge_ssm.errors import InputRefused
from edge_ssm.io import messages
from edge_ssm.io.codecs import registry as codecs
from edge_ssm.model.input_range import input_range
from edge_ssm.model.network import ENGINE_ERROR, SSM, Array, Block, Network, TokenEncoder
from edge_ssm_build.export.convert import state_slices, truncated_C
from edge_ssm_build.importers.architecture import ImportedCheckpoint, Layer
from edge_ssm_build.training.kernels import rank_one_kernel

BOUND = ENGINE_ERROR
"""Largest difference of a logit (docs/import.md)."""
STEPS = 1000
"""Number of random samples that an artifact is compared on."""


@dataclass(frozen=True)
class Deviation:
    """Deviation of an engine's stream from an expected one."""

    engine: str
    steps: int
    error: float
    """Largest absolute difference of a pooled logit, over the windows from the first to any of the samples."""


# --- kernels ---------------------------------------------------------------------------------------------------


def _vandermonde(C: Array, log_Abar: Array, length: int) -> Array:
    """Return 2 Re(sum_m C_m Abar_m^l), shape (K, length), for arguments (K, M) complex (S4D paper, eq. 4)."""
    rows = []
    for c, a in zip(C, log_Abar, strict=True):
        rows.append(2 * (c @ np.exp(a[:, None] * np.arange(length))).real)
    return np.array(rows).reshape(len(C), length)


def _diagonal(A: Array, B: Array, C: Array, dt: Array, discretization: str, length: int) -> Array:
    """Return the kernel (K, length) of diagonal channels (K, M) complex, with dt (K, 1) or (K, M)."""
    dt_A = dt * A
    if discretization == "zoh":
        return _vandermonde(C * B * (np.exp(dt_A) - 1) / A, dt_A, length)
    return _vandermonde(C * B * dt / (1 - dt_A / 2), np.log((1 + dt_A / 2) / (1 - dt_A / 2)), length)


def _generating(A: Array, P: Array, B: Array, C: Array, dt: Array, length: int) -> Array:
    """Return the kernel (K, length) from a C truncated to ``length``, channel by channel to bound the memory."""
    rows = []
    for k in range(len(A)):
        a, p, b, c = (torch.from_numpy(np.ascontiguousarray(values[k : k + 1])) for values in (A, P, B, C))
        rows.append(rank_one_kernel(a, p, b, c, torch.from_numpy(dt[k : k + 1]), length)[0].numpy())
    return np.array(rows).reshape(len(A), length)


def _dense_Abar(A: Array, P: Array, dt: float) -> Array:
    """Return the bilinear state matrix of one channel, shape (2M, 2M).

    ``export.convert`` computes its powers too, on the way to an artifact. This must stay independent of it.
    """
    diagonal, vector = np.concatenate([A, A.conj()]), np.concatenate([P, P.conj()])
    half = dt / 2 * (np.diag(diagonal) - np.outer(vector, vector.conj()))
    identity = np.eye(len(diagonal))
    return np.linalg.solve(identity - half, identity + half)


def checkpoint_kernel(layer: Layer, discretization: str, length: int) -> Array:
    """Return a layer's kernel (K, length) as state-spaces does, doubling the reach of a truncated C as needed."""
    if layer.P is None:
        return _diagonal(layer.A, layer.B, layer.C, layer.dt, discretization, length)
    C, reach = layer.C.copy(), layer.l_kernel
    for k in range(len(C)):
        Abar, full = _dense_Abar(layer.A[k], layer.P[k], float(layer.dt[k, 0])), np.concatenate([C[k], C[k].conj()])
        covered = layer.l_kernel or length
        power = np.linalg.matrix_power(Abar, covered)
        if not layer.l_kernel:
            full = full - full @ power
        while covered < length:
            full, power, covered = full + full @ power, power @ power, 2 * covered
        C[k], reach = full[: len(C[k])], covered
    return _generating(layer.A, layer.P, layer.B, C, layer.dt[:, 0], reach)[:, :length]


def network_kernel(ssm: SSM, discretization: str, length: int) -> Array:
    """Return the kernel (K, length) of an artifact's layer, whose channels may have different numbers of states."""
    rows = []
    rank_one = ssm.rank_one
    truncated = truncated_C(ssm, length) if rank_one.any() else ssm.C
    for k, states in enumerate(state_slices(ssm.pairs)):
        A, B, dt = ssm.A[None, states], ssm.B[None, states], ssm.dt[k : k + 1]
        if rank_one[k]:
            assert ssm.P is not None
            rows.append(_generating(A, ssm.P[None, states], B, truncated[None, states], dt, length)[0])
        else:
            rows.append(_diagonal(A, B, ssm.C[None, states], dt[:, None], discretization, length)[0])
    return np.array(rows).reshape(len(ssm.pairs), length)


# --- networks --------------------------------------------------------------------------------------------------


def _convolve(kernel: Array, v: Array) -> Array:
    """Convolve causally, by FFT: (K, T), (T, K) -> (T, K)."""
    n = 2 * len(v)
    spectrum = np.fft.rfft(v, n=n, axis=0) * np.fft.rfft(kernel.T, n=n, axis=0)
    result: Array = np.fft.irfft(spectrum, n=n, axis=0)[: len(v)]
    return result


def _gelu(y: Array) -> Array:
    x = torch.from_numpy(np.ascontiguousarray(y))
    result: Array = torch.nn.functional.gelu(x).numpy()
    return result


def _layer_norm(u: Array, eps: float = 1e-5) -> Array:
    centred = u - u.mean(axis=1, keepdims=True)
    result: Array = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + eps)
    return result


def _mix(g: Array, weight: Array, bias: Array) -> Array:
    """Apply the position-wise map, with a gate (GLU) if there are twice as many rows: (T, H) -> (T, H)."""
    z = g @ weight.T + bias
    if z.shape[1] == 2 * g.shape[1]:
        value, gate = np.split(z, 2, axis=1)
        z = value / (1 + np.exp(-gate))
    result: Array = z
    return result


def _run(u: Array, blocks: Iterator[tuple[Callable[[Array], Array], Callable[[Array], Array]]], prenorm: bool) -> Array:
    """Pass the residual stream (T, H) through pairs of a layer and its norm."""
    for layer, norm in blocks:
        u = u + layer(norm(u) if prenorm else u)
        u = u if prenorm else norm(u)
    return u


def checkpoint_outputs(checkpoint: ImportedCheckpoint, samples: Array) -> Array:
    """Map samples (T, d_input) in the sensor's units to outputs (T, d_output), with the checkpoint's own parameters."""
    arch = checkpoint.arch

    def layer_of(layer: Layer) -> Callable[[Array], Array]:
        def apply(v: Array) -> Array:
            y = v.copy()  # a pruned channel is passed unchanged
            kernel = checkpoint_kernel(layer, checkpoint.discretization, len(v))
            y[:, layer.active] = _convolve(kernel, v[:, layer.active]) + layer.D * v[:, layer.active]
            return _mix(_gelu(y), layer.weight, layer.bias)

        return apply

    def norm_of(layer: Layer) -> Callable[[Array], Array]:
        if layer.running is None:
            return lambda u: _layer_norm(u) * layer.norm_weight + layer.norm_bias
        mean, variance = layer.running
        return lambda u: (u - mean) / np.sqrt(variance + 1e-5) * layer.norm_weight + layer.norm_bias

    if checkpoint.encoder is not None:
        x = samples
        if arch.mean:
            x = x - np.array(arch.mean)
        if arch.std:
            x = x / np.array(arch.std)
        u = x @ checkpoint.encoder[0].T + checkpoint.encoder[1]
    else:
        assert checkpoint.embedding is not None
        u = checkpoint.embedding[samples[:, 0].astype(np.int64)]
    u = _run(u, ((layer_of(layer), norm_of(layer)) for layer in checkpoint.layers), checkpoint.prenorm)
    outputs: Array = u @ checkpoint.decoder[0].T + checkpoint.decoder[1]
    return outputs


def network_outputs(network: Network, samples: Array) -> Array:
    """Return the outputs (T, d_output) of a network, pruned or not, for samples (T, d_input)."""
    h = network.d_model

    def layer_of(block: Block) -> Callable[[Array], Array]:
        def apply(v: Array) -> Array:
            ssm, mixing = block.ssm, block.mixing
            y = v * ssm.D.astype(np.float64)
            if len(ssm.active):
                kernel = network_kernel(ssm, network.discretization, len(v))
                y[:, ssm.active] += _convolve(kernel, v[:, ssm.active])
            parts = 2 if mixing.kind == "glu" else 1
            full = np.zeros((parts, h, h))
            for matrix, weight in zip(full, np.split(mixing.values(), parts), strict=True):
                matrix[np.ix_(mixing.rows, mixing.columns)] = weight
            return _mix(_gelu(y), full.reshape(parts * h, h), mixing.bias.astype(np.float64))

        return apply

    def norm_of(block: Block) -> Callable[[Array], Array]:
        norm = block.norm
        if norm is None:
            return lambda u: u
        if norm.kind == "layer":
            return lambda u: _layer_norm(u, norm.eps) * norm.weight.astype(np.float64) + norm.bias
        return lambda u: u * norm.weight.astype(np.float64) + norm.bias

    if isinstance(network.encoder, TokenEncoder):
        u = network.encoder.embedding[samples[:, 0].astype(np.int64)].astype(np.float64)
    else:
        x = (samples - network.input.mean) / network.input.std
        u = x @ network.encoder.weight.T.astype(np.float64) + network.encoder.bias
    u = _run(u, ((layer_of(block), norm_of(block)) for block in network.blocks), network.prenorm)
    outputs: Array = u @ network.decoder.weight.T.astype(np.float64) + network.decoder.bias
    return outputs


# --- comparisons -----------------------------------------------------------------------------------------------


def random_samples(network: Network, steps: int, seed: int = 0) -> Array:
    """Return random samples (steps, d_input): tokens, or slow and fast noise with an offset for slow states."""
    rng = np.random.default_rng(seed)
    if isinstance(network.encoder, TokenEncoder):
        return rng.integers(0, len(network.encoder.embedding), (steps, 1)).astype(np.float64)
    noise = rng.standard_normal((steps, network.d_input))
    smooth = np.empty_like(noise)
    level = np.zeros(network.d_input)
    for t, value in enumerate(noise):
        level = 0.98 * level + 0.2 * value
        smooth[t] = level
    limits = input_range(network)
    x = network.input.mean + network.input.std * (smooth + 0.5 * noise + 0.5)
    clipped: Array = np.clip(x, limits.low, limits.high)
    return clipped


def read_samples(network: Network, path: Path) -> Array:
    """Return the valid samples (T, d_input) of a recording, as ``edge-ssm run`` reads it.

    Raises
    ------
    InputRefused
        If the recording cannot be read or has no valid sample.
    """
    decoder = codecs.decoder(codecs.guess_format(str(path)), network.input)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputRefused(f"{path}: cannot be read ({error.strerror})") from None
    frames = [message for message in [*decoder.feed(content), *decoder.finish()] if isinstance(message, messages.Frame)]
    values = np.array([frame.values for frame in frames]).reshape(-1, network.d_input)
    valid: Array = values[~input_range(network).bad(values).any(axis=1)]
    if not len(valid):
        raise InputRefused(f"{path}: no sample with the channels {', '.join(network.input.channels)}")
    return valid


def _pool_prefixes(outputs: Array, pooling: str) -> Array:
    """Return, for every t, the pooled output of the window 0..t, shape (T, d_output)."""
    if pooling != "mean":
        return outputs
    running: Array = np.cumsum(outputs, axis=0) / np.arange(1, len(outputs) + 1)[:, None]
    return running


def _compare(network: Network, expected: Array, samples: Array, engines: list[str]) -> list[Deviation]:
    deviations = []
    for name in engines:
        outputs = create(name, network).chunk(samples).astype(np.float64)
        difference = _pool_prefixes(outputs, network.pooling) - _pool_prefixes(expected, network.pooling)
        deviations.append(Deviation(name, len(samples), float(np.abs(difference).max())))
    return deviations


def compare_with_checkpoint(
    network: Network, checkpoint: ImportedCheckpoint, samples: Array | None = None, engines: list[str] | None = None
) -> list[Deviation]:
    """Compare the stream of each engine, by default of all available ones, with the checkpoint's own convolution."""
    x = random_samples(network, max(STEPS, checkpoint.window)) if samples is None else samples
    return _compare(network, checkpoint_outputs(checkpoint, x), x, engines or available(network))


def compare_with_convolution(
    network: Network, steps: int = STEPS, engines: list[str] | None = None, samples: Array | None = None
) -> list[Deviation]:
    """Compare the stream of each engine, by default of all available ones, with the network's own convolution.

    The input is ``samples`` (T, d_input) or, if that is None, ``steps`` random samples.
    """
    x = random_samples(network, steps) if samples is None else samples
    return _compare(network, network_outputs(network, x), x, engines or available(network))


def measure_drift(
    network: Network, engine: str, steps: int, on_progress: Callable[[int], Any] = lambda samples: None
) -> Deviation:
    """Compare an engine with the float64 reference over one long stream, without resetting the state.

    The deviation is that of the logits of every window. ``on_progress`` is called with the number of samples of each.
    """
    tested, reference = create(engine, network), create("reference", network)
    worst, window = 0.0, network.window
    samples = random_samples(network, max(1, min(steps, 20_000) // window) * window)
    for start in range(0, steps, window):
        part = samples[start % len(samples) :][: min(window, steps - start)]
        difference = tested.chunk(part) - reference.chunk(part)
        logits = difference.mean(axis=0) if network.pooling == "mean" else difference[-1]
        worst = max(worst, float(np.abs(logits).max()))
        on_progress(len(part))
    return Deviation(engine, steps, worst)
