"""Random networks of every kind that an artifact can hold."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from edge_ssm.model.network import SSM, Block, Decoder, InputSpec, LinearEncoder, Mixing, Network, Norm, TokenEncoder
from edge_ssm.model.transforms import quantised

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
    ragged: bool = False,
    rank_one: float = 0.0,
    columns: int | None = None,
    rows: int | None = None,
    mixing_dtype: str = "float32",
) -> Network:
    """Return a random network.

    ``active`` is the number of active channels of each layer; by default all of them are active. ``ragged`` draws the
    number of pairs of each channel from 1 to ``pairs``. ``rank_one`` is the share of channels with a rank-one term.
    ``columns`` and ``rows`` are the numbers of columns and rows that mixing keeps; columns of active channels are
    always kept.
    """
    rng = np.random.default_rng(seed)

    def f32(*shape: int, scale: float = 1.0) -> Any:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    blocks = []
    for k in active if active is not None else [h] * layers:
        chosen = np.sort(rng.choice(h, k, replace=False)).astype(np.int64)
        count = rng.integers(1, pairs + 1, k) if ragged else np.full(k, pairs)
        n = np.concatenate([np.arange(c) for c in count]) if k else np.zeros(0)
        states = len(n)

        def complex_(states: int = states) -> Any:
            return (rng.standard_normal(states) + 1j * rng.standard_normal(states)).astype(np.complex64)

        real = -np.exp(rng.uniform(np.log(0.1), np.log(2), states))
        stretch = np.repeat(rng.uniform(0.5, 1.5, k), count)
        A = (real + 1j * np.pi * n * stretch).astype(np.complex64).astype(np.complex128)
        dt = np.exp(rng.uniform(np.log(dt_min), np.log(dt_max), k)).astype(np.float32).astype(np.float64)
        P = None
        if rank_one:
            P = (complex_() * np.repeat(rng.random(k) < rank_one, count)).astype(np.complex128)
        B, C = complex_().astype(np.complex128), complex_().astype(np.complex128)
        D = f32(h)
        bypassed = np.setdiff1d(np.arange(h), chosen)
        extra = min(len(bypassed), max(0, h - k if columns is None else columns - k))
        kept = np.sort(np.concatenate([chosen, rng.choice(bypassed, extra, replace=False)])).astype(np.int64)
        D[np.setdiff1d(np.arange(h), kept)] = 0
        outs = np.sort(rng.choice(h, h if rows is None else min(rows, h), replace=False)).astype(np.int64)
        doubled = 2 if mixing == "glu" else 1
        ssm = SSM(chosen, count.astype(np.int64), A, B, C, D, dt, P)
        scale = None if norm is None else Norm(norm, 1 + f32(h, scale=0.1), f32(h, scale=0.1), 1e-5)  # type: ignore[arg-type]
        weight, bias = f32(doubled * len(outs), len(kept), scale=h**-0.5), f32(doubled * h, scale=0.1)
        whole = Mixing(mixing, weight, bias, kept, outs)  # type: ignore[arg-type]
        blocks.append(Block(ssm, quantised(whole, mixing_dtype), scale))  # type: ignore[arg-type]
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
    discretization = draw(st.sampled_from(["zoh", "bilinear"]))
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
        discretization=discretization,
        ragged=draw(st.booleans()),
        rank_one=draw(st.sampled_from([0.0, 0.5, 1.0])) if discretization == "bilinear" else 0.0,
        columns=draw(st.one_of(st.none(), st.integers(0, h))),
        rows=draw(st.one_of(st.none(), st.integers(0, h))),
        mixing_dtype=draw(st.sampled_from(["float32", "float16", "int8"])),
        pooling=draw(st.sampled_from(["mean", "last", "none"])),
        window=draw(st.integers(1, 40)),
        vocabulary=draw(st.sampled_from([0, 0, 7])),
        dt_min=1e-4,
    )


def samples_for(network: Network, seed: int, *shape: int) -> Any:
    """Return samples of shape (\\*shape, d_input) in the units of the sensor: tokens, or values around the mean."""
    rng = np.random.default_rng(seed)
    if isinstance(network.encoder, TokenEncoder):
        return rng.integers(0, len(network.encoder.embedding), (*shape, 1)).astype(np.float64)
    return network.input.mean + network.input.std * rng.standard_normal((*shape, network.d_input))
