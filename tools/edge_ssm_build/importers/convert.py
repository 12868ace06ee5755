"""From a foreign checkpoint to a network, and to an artifact that is written only if its stream agrees."""

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
    InputSpec,
    LinearEncoder,
    Mixing,
    Network,
    Norm,
    TokenEncoder,
)
from edge_ssm.model.validation import check
from edge_ssm_build.export.convert import untruncated_C
from edge_ssm_build.importers import diagonalization, verification
from edge_ssm_build.importers.checkpoints import Checkpoint, Layer

EPS = 1e-5
"""Of LayerNorm and BatchNorm in all three projects: torch's default."""


def _f32(values: Array) -> Array:
    return values.astype(np.float32)


def _ssm(layer: Layer, h: int) -> SSM:
    k, m = layer.A.shape
    A, B, dt = layer.A, layer.B, layer.dt
    if dt.shape[1] > 1:
        # Each state has its own step: the differences go to A and B, of which only dt A and dt B count.
        middle = np.exp(np.log(dt).mean(axis=1, keepdims=True))
        A, B, dt = A * dt / middle, B * dt / middle, middle
    pairs = np.full(k, m, dtype=np.int64)
    flat = [values.reshape(-1) for values in (A, B, layer.C)]
    P = None if layer.P is None else layer.P.reshape(-1)
    C = flat[2]
    if P is not None and layer.l_kernel:
        C = untruncated_C(flat[0], P, C, dt[:, 0], pairs, layer.l_kernel)
    D = np.ones(h)
    D[layer.active] = layer.D
    return SSM(layer.active, pairs, flat[0], flat[1], C, _f32(D), dt[:, 0], P)


def _norm(layer: Layer) -> Norm:
    if layer.running is None:
        return Norm("layer", _f32(layer.norm_weight), _f32(layer.norm_bias), EPS)
    mean, variance = layer.running
    scale = layer.norm_weight / np.sqrt(variance + EPS)
    return Norm("affine", _f32(scale), _f32(layer.norm_bias - mean * scale))


def to_network(checkpoint: Checkpoint) -> Network:
    """Raises UsageError where ARCH's names and statistics do not fit, NetworkError for values that can't run."""
    arch, h = checkpoint.arch, checkpoint.d_model
    d_input = 1 if checkpoint.encoder is None else checkpoint.encoder[0].shape[1]
    d_output = checkpoint.decoder[0].shape[0]
    for name, expected in (("channels", d_input), ("mean", d_input), ("std", d_input), ("labels", d_output)):
        given = len(getattr(arch, name))
        if given not in (0, expected):
            raise UsageError(f"ARCH {name}: {given} given, expected {expected} or none")
    every = np.arange(h)
    blocks = []
    for layer in checkpoint.layers:
        kind: Any = "glu" if layer.weight.shape[0] == 2 * h else "plain"
        mixing = Mixing(kind, _f32(layer.weight), _f32(layer.bias), every, every)
        ssm = diagonalization.choose(_ssm(layer, h), checkpoint.discretization)
        blocks.append(Block(ssm, mixing, _norm(layer)))
    encoder: LinearEncoder | TokenEncoder
    if checkpoint.encoder is not None:
        encoder = LinearEncoder(_f32(checkpoint.encoder[0]), _f32(checkpoint.encoder[1]))
    else:
        assert checkpoint.embedding is not None
        encoder = TokenEncoder(_f32(checkpoint.embedding))
    network = Network(
        input=InputSpec(
            channels=tuple(arch.channels or ([f"x{i}" for i in range(d_input)] if d_input > 1 else ["x"])),
            mean=np.array(arch.mean or [0.0] * d_input),
            std=np.array(arch.std or [1.0] * d_input),
            sample_rate_hz=arch.sample_rate_hz,
        ),
        encoder=encoder,
        blocks=tuple(blocks),
        decoder=Decoder(_f32(checkpoint.decoder[0]), _f32(checkpoint.decoder[1])),
        prenorm=checkpoint.prenorm,
        discretization=checkpoint.discretization,
        pooling=checkpoint.pooling,
        window=checkpoint.window,
        labels=tuple(arch.labels),
    )
    check(network)
    return network


def write(
    checkpoint: Checkpoint, source: Path, output: Path, recording: Path | None = None
) -> tuple[Network, list[verification.Agreement]]:
    """The artifact, after its stream was compared with the checkpoint's own convolution in float64.

    Both see random input of at least 1,000 samples, and the recording where one is given. Raises RunFailed, and writes
    nothing, if an engine is off by more than ``verification.BOUND``.
    """
    network = to_network(checkpoint)
    agreements = verification.against_checkpoint(network, checkpoint)
    if recording is not None:
        x = verification.recorded(network, recording)[: 10 * verification.STEPS]
        agreements += verification.against_checkpoint(network, checkpoint, x)
    worst = max(agreements, key=lambda a: a.error)
    if not worst.error <= verification.BOUND:
        raise RunFailed(
            f"{source}: the {worst.engine} engine's stream of {worst.steps} samples is off by {worst.error:.1e}, bound "
            f"{verification.BOUND:g}; nothing was written"
        )
    made_by = {
        "tool": f"edge-ssm-build {edge_ssm.__version__}",
        "imported": {"form": checkpoint.form, "sha256": hashlib.sha256(source.read_bytes()).hexdigest()},
        "verified": [{"engine": a.engine, "samples": a.steps, "error": a.error} for a in agreements],
    }
    artifact.save(output, network, made_by)
    return network, agreements
