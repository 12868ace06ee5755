"""Conversion of an imported checkpoint to a network, and to an artifact if its stream agrees with the checkpoint."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

import edge_ssm
from edge_ssm.errors import RunFailed, UsageError
from edge_ssm.formats import artifact
from edge_ssm.model.network import (
    SSM,
    Array,
    Block,
    Decoder,
    Discretization,
    InputSpec,
    LinearEncoder,
    Mixing,
    Network,
    Norm,
    TokenEncoder,
)
from edge_ssm.model.validation import check
from edge_ssm_build.export.convert import untruncated_C
from edge_ssm_build.importers.architecture import ImportedCheckpoint, Layer
from edge_ssm_build.importers.diagonalization import diagonalize
from edge_ssm_build.importers.verification import BOUND, STEPS, Deviation, compare_with_checkpoint, read_samples

EPS = 1e-5
"""Epsilon of LayerNorm and BatchNorm in all formats: torch's default."""


def _float32(values: Array) -> Array:
    return values.astype(np.float32)


def _ssm(layer: Layer, h: int) -> SSM:
    """Return the operators of a layer of h channels, with C untruncated."""
    k, m = layer.A.shape
    A, B, dt = layer.A, layer.B, layer.dt
    if dt.shape[1] > 1:
        # Each state has its own step. Only dt A and dt B matter, so A and B can absorb the differences.
        mean = np.exp(np.log(dt).mean(axis=1, keepdims=True))
        A, B, dt = A * dt / mean, B * dt / mean, mean
    pairs = np.full(k, m, dtype=np.int64)
    flat = [values.reshape(-1) for values in (A, B, layer.C)]
    P = None if layer.P is None else layer.P.reshape(-1)
    C = flat[2]
    if P is not None and layer.l_kernel:
        C = untruncated_C(flat[0], P, C, dt[:, 0], pairs, layer.l_kernel)
    D = np.ones(h)
    D[layer.active] = layer.D
    return SSM(layer.active, pairs, flat[0], flat[1], C, _float32(D), dt[:, 0], P)


def _block(layer: Layer, h: int, discretization: Discretization) -> Block:
    """Return a layer of h channels as a block."""
    kind: Any = "glu" if layer.weight.shape[0] == 2 * h else "plain"
    every = np.arange(h)
    mixing = Mixing(kind, _float32(layer.weight), _float32(layer.bias), every, every)
    return Block(diagonalize(_ssm(layer, h), discretization), mixing, _norm(layer))


def _norm(layer: Layer) -> Norm:
    """Return the layer's norm; BatchNorm becomes an affine map by its running statistics."""
    if layer.running is None:
        return Norm("layer", _float32(layer.norm_weight), _float32(layer.norm_bias), EPS)
    mean, variance = layer.running
    scale = layer.norm_weight / np.sqrt(variance + EPS)
    return Norm("affine", _float32(scale), _float32(layer.norm_bias - mean * scale))


def to_network(checkpoint: ImportedCheckpoint) -> Network:
    """Return the checkpoint as a network.

    Raises
    ------
    UsageError
        If the names or statistics in ARCH.toml do not have the right length.
    NetworkError
        If a value is outside the range that engines support.
    """
    arch, h = checkpoint.arch, checkpoint.d_model
    d_input = 1 if checkpoint.encoder is None else checkpoint.encoder[0].shape[1]
    d_output = checkpoint.decoder[0].shape[0]
    for name, expected in (("channels", d_input), ("mean", d_input), ("std", d_input), ("labels", d_output)):
        count = len(getattr(arch, name))
        if count not in (0, expected):
            raise UsageError(f"ARCH {name}: {count} given, expected {expected} or none")
    encoder: LinearEncoder | TokenEncoder
    if checkpoint.encoder is not None:
        encoder = LinearEncoder(_float32(checkpoint.encoder[0]), _float32(checkpoint.encoder[1]))
    else:
        assert checkpoint.embedding is not None
        encoder = TokenEncoder(_float32(checkpoint.embedding))
    network = Network(
        input=InputSpec(
            channels=tuple(arch.channels or ([f"x{i}" for i in range(d_input)] if d_input > 1 else ["x"])),
            mean=np.array(arch.mean or [0.0] * d_input),
            std=np.array(arch.std or [1.0] * d_input),
            sample_rate_hz=arch.sample_rate_hz,
        ),
        encoder=encoder,
        blocks=tuple(_block(layer, h, checkpoint.discretization) for layer in checkpoint.layers),
        decoder=Decoder(_float32(checkpoint.decoder[0]), _float32(checkpoint.decoder[1])),
        prenorm=checkpoint.prenorm,
        discretization=checkpoint.discretization,
        pooling=checkpoint.pooling,
        window=checkpoint.window,
        labels=tuple(arch.labels),
    )
    check(network)
    return network


def import_checkpoint(
    checkpoint: ImportedCheckpoint, source: Path, output: Path, recording: Path | None = None
) -> tuple[Network, list[Deviation]]:
    """Write the checkpoint as an artifact after comparing its stream with the checkpoint's own convolution in float64.

    Parameters
    ----------
    checkpoint
        The checkpoint.
    source
        Its file, whose SHA-256 the artifact's provenance holds.
    output
        Path of the artifact.
    recording
        Recording to compare on, in addition to random input of at least 1,000 samples.

    Returns
    -------
    tuple
        The network, and the deviation of each engine on each input.

    Raises
    ------
    RunFailed
        If an engine is off by more than ``verification.BOUND``. Nothing is written then.
    """
    network = to_network(checkpoint)
    deviations = compare_with_checkpoint(network, checkpoint)
    if recording is not None:
        x = read_samples(network, recording)[: 10 * STEPS]
        deviations += compare_with_checkpoint(network, checkpoint, x)
    worst = max(deviations, key=lambda deviation: deviation.error)
    if not worst.error <= BOUND:
        raise RunFailed(
            f"{source}: the {worst.engine} engine's stream of {worst.steps} samples is off by {worst.error:.1e}, bound "
            f"{BOUND:g}; nothing was written"
        )
    provenance = {
        "tool": f"edge-ssm-build {edge_ssm.__version__}",
        "imported": {"form": checkpoint.format_name, "sha256": hashlib.sha256(source.read_bytes()).hexdigest()},
        "verified": [{"engine": a.engine, "samples": a.steps, "error": a.error} for a in deviations],
    }
    artifact.save(output, network, provenance)
    return network, deviations
