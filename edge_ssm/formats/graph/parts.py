"""A step's parts: real float32 arrays, smaller for what was pruned, from which a graph is written.

Channels of about as many states lie in one rectangle, so that a runtime without ragged arrays steps few of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_ssm.model.discretize import ComplexArray, StepParameters, step_parameters
from edge_ssm.model.network import Array, Block, LinearEncoder, MixingDtype, Network, Norm, TokenEncoder
from edge_ssm.model.transforms import quantised

GROUP_COST = 1024
"""What the operators of one more rectangle cost, in padded pairs: some ten calls against elements."""


@dataclass(frozen=True)
class Group:
    """k channels of a layer in a rectangle of n pairs each, padded where one has fewer. Real parts first: (2, k, n)."""

    channels: Array
    """(k,) int64: places among the layer's K active channels."""
    states: Array
    """(s,) int64: places of their states in the layer's axis of S."""
    cells: Array
    """(s,) int64: places of the same states in the rectangle, flat. What is left of it is padding."""
    delta: Array
    """(2, k, n): Abar - 1. A padded state has -1: it takes the input and forgets it."""
    C: Array
    """(2, k, n): of 2 C Bbar, the imaginary part negated, so that y is one sum of products; 0 for padding."""
    p: Array | None
    """(2, k, n) of the rank-one term; None for diagonal channels."""
    r: Array | None
    """(2, k, n): of 2 r, the imaginary part negated."""
    beta: Array | None  # (k, 1)

    @property
    def shape(self) -> tuple[int, int]:
        _, k, n = self.delta.shape
        return k, n


@dataclass(frozen=True)
class Linear:
    """y = weight x * scale + bias."""

    weight: Array  # (out, in): float32, float16 or int8
    bias: Array  # (out,) float32
    scale: Array | None = None  # (out,) float32; None for float32 weights


@dataclass(frozen=True)
class Layer:
    """One block; the channels that enter its mixing are in the order of its groups, then the bypassed ones."""

    columns: Array  # (G,) int64, channels
    groups: tuple[Group, ...]
    D: Array  # (G,) float32
    gated: bool
    mixing: Linear  # in = G; out = 2R if gated, else R
    order: Array | None
    """(H,) int64: where each channel's summand lies in the R of mixing with ``constants`` behind; None if as it is."""
    constants: Array  # (H - R,) float32
    norm: Norm | None


@dataclass(frozen=True)
class Parts:
    h: int
    d_input: int
    encoder: Linear | Array
    """Of normalised samples, or the embedding (vocabulary, H) of tokens."""
    layers: tuple[Layer, ...]
    decoder: Linear
    prenorm: bool


def parts_of(network: Network, weights: MixingDtype = "float32") -> Parts:
    """The parts of ``network``'s step with mixing weights of a type: those it has, or theirs rounded once more."""
    encoder = network.encoder
    decoder = Linear(network.decoder.weight, network.decoder.bias)
    if isinstance(encoder, TokenEncoder):
        enters: Linear | Array = encoder.embedding
    else:
        assert isinstance(encoder, LinearEncoder)
        enters = Linear(encoder.weight, encoder.bias)
    layers = tuple(_layer(network, block, weights) for block in network.blocks)
    return Parts(network.d_model, network.d_input, enters, layers, decoder, network.prenorm)


def groups_of(network: Network, block: Block) -> tuple[Group, ...]:
    step = step_parameters(block.ssm, network.discretization)
    groups = []
    for ranked in (False, True):
        channels = np.flatnonzero(step.rank_one == ranked)
        groups += [_group(step, members) for members in _rectangles(channels, step.pairs)]
    return tuple(groups)


def _rectangles(channels: Array, pairs: Array) -> list[Array]:
    """``channels`` split by their numbers of pairs so that padding and GROUP_COST together are least."""
    order = channels[np.argsort(-pairs[channels], kind="stable")]
    heights = pairs[order]
    ends = [*(np.flatnonzero(np.diff(heights)) + 1).tolist(), len(order)] if len(order) else []
    starts = [0, *ends[:-1]]
    # best[i]: the cost of the first i runs of equal height, and where the last rectangle begins.
    best: list[tuple[float, int]] = [(0.0, 0)]
    for last, end in enumerate(ends):
        costs = [(best[i][0] + GROUP_COST + int(heights[starts[i]]) * (end - starts[i]), i) for i in range(last + 1)]
        best.append(min(costs))
    found = []
    run = len(ends)
    while run:
        begin = best[run][1]
        found.append(np.sort(order[starts[begin] : ends[run - 1]]))
        run = begin
    return found[::-1]


def cells_of(pairs: Array, channels: Array, n: int) -> tuple[Array, Array]:
    """Where the states of ``channels`` lie: in the layer's axis of states, and in a rectangle of n a channel, flat."""
    first = np.cumsum(pairs) - pairs
    states = np.concatenate([np.arange(first[c], first[c] + pairs[c]) for c in channels])
    cells = np.concatenate([i * n + np.arange(pairs[c]) for i, c in enumerate(channels)])
    return states, cells


def _group(step: StepParameters, channels: Array) -> Group:
    k, n = len(channels), int(step.pairs[channels].max())
    states, cells = cells_of(step.pairs, channels, n)

    def rectangle(values: ComplexArray, padding: float = 0.0) -> Array:
        flat = np.full(k * n, padding, dtype=np.complex128)
        flat[cells] = values[states]
        return np.stack([flat.real, flat.imag]).reshape(2, k, n).astype(np.float32)

    ranked = bool(step.rank_one[channels].any())
    return Group(
        channels=channels,
        states=states,
        cells=cells,
        delta=rectangle(step.delta, -1.0),
        C=rectangle(2 * step.C.conj()),
        p=rectangle(step.p) if ranked else None,
        r=rectangle(2 * step.r.conj()) if ranked else None,
        beta=step.beta[channels].astype(np.float32)[:, None] if ranked else None,
    )


def _layer(network: Network, block: Block, weights: MixingDtype) -> Layer:
    ssm, mixing = block.ssm, block.mixing
    groups = groups_of(network, block)
    active = [ssm.active[group.channels] for group in groups]
    bypassed = mixing.columns[~np.isin(mixing.columns, ssm.active)]
    columns = np.concatenate([*active, bypassed]).astype(np.int64)
    if mixing.dtype != weights:
        mixing = quantised(mixing, weights)
    places = np.searchsorted(mixing.columns, columns)
    linear = Linear(
        np.ascontiguousarray(mixing.weight[:, places]),
        mixing.bias[mixing.stacked_rows()].astype(np.float32),
        mixing.scale,
    )
    h, left = network.d_model, len(mixing.rows)
    removed = np.setdiff1d(np.arange(h), mixing.rows)
    order = None
    if len(removed):
        order = np.empty(h, dtype=np.int64)
        order[mixing.rows], order[removed] = np.arange(left), left + np.arange(len(removed))
    return Layer(
        columns=columns,
        groups=groups,
        D=ssm.D[columns].astype(np.float32),
        gated=mixing.kind == "glu",
        mixing=linear,
        order=order,
        constants=mixing.constant()[removed].astype(np.float32),
        norm=block.norm,
    )
