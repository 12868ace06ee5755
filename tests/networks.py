"""Random networks of every form that an artifact can hold."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from edge_ssm.network import (
    SSM,
    Block,
    Decoder,
    InputSpec,
    LinearEncoder,
    Mixing,
    Network,
    Norm,
    TokenEncoder,
)

NORMS = ("layer", "affine", None)


def random_network(
    seed: int = 0,
    *,
    h: int = 6,
    pairs: int = 3,
    layers: int = 2,
    d_input: int = 2,
    d_output: int = 3,
    active: list[int] | None = None,
    norm: str | None = "layer",
    mixing: str = "glu",
    prenorm: bool = False,
    discretization: str = "zoh",
    pooling: str = "mean",
    window: int = 10,
    vocabulary: int = 0,
    task: str = "classification",
    dt_min: float = 1e-3,
    dt_max: float = 1e-1,
    rate: float | None = 50.0,
) -> Network:
    """``active`` counts the active channels of each layer; all of them by default."""
    rng = np.random.default_rng(seed)

    def f32(*shape: int, scale: float = 1.0) -> Any:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    blocks = []
    for k in active if active is not None else [h] * layers:
        chosen = np.sort(rng.choice(h, k, replace=False)).astype(np.int64)
        real = -np.exp(rng.uniform(np.log(0.1), np.log(2), (k, pairs)))
        A = (real + 1j * np.pi * np.arange(pairs) * rng.uniform(0.5, 1.5, (k, 1))).astype(np.complex64)
        B = (rng.standard_normal((k, pairs)) + 1j * rng.standard_normal((k, pairs))).astype(np.complex64)
        C = (rng.standard_normal((k, pairs)) + 1j * rng.standard_normal((k, pairs))).astype(np.complex64)
        dt = np.exp(rng.uniform(np.log(dt_min), np.log(dt_max), k)).astype(np.float32).astype(np.float64)
        rows = 2 * h if mixing == "glu" else h
        ssm = SSM(chosen, A.astype(np.complex128), B.astype(np.complex128), C.astype(np.complex128), f32(h), dt)
        scale = None if norm is None else Norm(norm, 1 + f32(h, scale=0.1), f32(h, scale=0.1), 1e-5)  # type: ignore[arg-type]
        blocks.append(Block(ssm, Mixing(mixing, f32(rows, h, scale=h**-0.5), f32(rows, scale=0.1)), scale))  # type: ignore[arg-type]
    if vocabulary:
        d_input = 1
    mean = np.zeros(d_input) if vocabulary else rng.standard_normal(d_input)
    std = np.ones(d_input) if vocabulary else np.exp(rng.standard_normal(d_input))
    return Network(
        input=InputSpec(tuple(f"c{i}" for i in range(d_input)), mean, std, ("u",) * d_input, rate),
        encoder=TokenEncoder(f32(vocabulary, h)) if vocabulary else LinearEncoder(f32(h, d_input), f32(h)),
        blocks=tuple(blocks),
        decoder=Decoder(f32(d_output, h, scale=h**-0.5), f32(d_output)),
        prenorm=prenorm,
        discretization=discretization,  # type: ignore[arg-type]
        pooling=pooling,  # type: ignore[arg-type]
        window=1 if pooling == "none" else window,
        task=task,  # type: ignore[arg-type]
        labels=tuple(f"class {i}" for i in range(d_output)),
    )


@st.composite
def networks(draw: st.DrawFn) -> Network:
    h = draw(st.sampled_from([1, 2, 5, 16, 19, 33]))
    layers = draw(st.integers(1, 3))
    return random_network(
        draw(st.integers(0, 10_000)),
        h=h,
        pairs=draw(st.integers(1, 5)),
        # A layer may lose every operator in an artifact, though pruning keeps one.
        active=[draw(st.integers(0, h)) for _ in range(layers)],
        d_input=draw(st.integers(1, 6)),
        d_output=draw(st.integers(1, 5)),
        norm=draw(st.sampled_from(NORMS)),
        mixing=draw(st.sampled_from(["glu", "plain"])),
        prenorm=draw(st.booleans()),
        discretization=draw(st.sampled_from(["zoh", "bilinear"])),
        pooling=draw(st.sampled_from(["mean", "last", "none"])),
        window=draw(st.integers(1, 40)),
        vocabulary=draw(st.sampled_from([0, 0, 7])),
        dt_min=1e-4,
    )


def samples_for(network: Network, seed: int, *shape: int) -> Any:
    """(\\*shape, d_input) samples in the network's own units: tokens, or values around the mean."""
    rng = np.random.default_rng(seed)
    if isinstance(network.encoder, TokenEncoder):
        return rng.integers(0, len(network.encoder.embedding), (*shape, 1)).astype(np.float64)
    return network.input.mean + network.input.std * rng.standard_normal((*shape, network.d_input))
