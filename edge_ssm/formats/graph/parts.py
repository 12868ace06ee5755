"""The arrays from which a graph is written: real, mostly float32, without what pruning removed.

A runtime without ragged arrays needs rectangular ones, so channels with about the same number of states are grouped
into a rectangle, padded to the largest of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_ssm.model.discretize import ComplexArray, StepParameters, step_parameters
from edge_ssm.model.network import Array, Block, LinearEncoder, MixingDtype, Network, Norm, TokenEncoder
from edge_ssm.model.transforms import quantised

GROUP_COST = 1024
"""Cost of the operators of one more rectangle, about ten calls, expressed as a number of padded pairs."""


@dataclass(frozen=True)
class Group:
    """k channels of a layer in a rectangle of n pairs each, in the notation of ``discretize.StepParameters``.

    Arrays of shape (2, k, n) are float32 and hold the real parts, then the imaginary parts.
    """

    channels: Array
    """Shape (k,), int64: positions among the layer's K active channels."""
    states: Array
    """Shape (s,), int64: positions of the channels' states among the layer's S states."""
    cells: Array
    """Shape (s,), int64: positions of the same states in the flattened rectangle; the other cells are padding."""
    delta: Array
    """Shape (2, k, n): Abar - 1. It is -1 for padding, which takes the input and forgets it."""
    C: Array
    """Shape (2, k, n): 2 C Bbar with negated imaginary part, so that y is a sum of products; 0 for padding."""
    p: Array | None
    """Shape (2, k, n): p of the rank-one term; None for diagonal channels."""
    r: Array | None
    """Shape (2, k, n): 2 r with negated imaginary part; None for diagonal channels."""
    beta: Array | None
    """Shape (k, 1), float32; None for diagonal channels."""

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the rectangle, (k, n)."""
        _, k, n = self.delta.shape
        return k, n


@dataclass(frozen=True)
class Linear:
    """A linear map, y = (weight x) * scale + bias."""

    weight: Array
    """Shape (out, in): float32, float16 or int8."""
    bias: Array
    """Shape (out,), float32."""
    scale: Array | None = None
    """Shape (out,), float32; None for float32 weights."""


@dataclass(frozen=True)
class Layer:
    """One block. The G channels that enter its mixing are in the order of its groups, then the bypassed ones."""

    columns: Array
    """Shape (G,), int64: the channels that enter the mixing."""
    groups: tuple[Group, ...]
    D: Array
    """Shape (G,), float32."""
    is_gated: bool
    """Whether a gated linear unit follows the mixing."""
    mixing: Linear
    """From G values to 2R if gated, else to R."""
    order: Array | None
    """Shape (H,), int64: position of each channel among the R results followed by ``constants``; None if R = H."""
    constants: Array
    """Shape (H - R,), float32: what the removed rows add."""
    norm: Norm | None


@dataclass(frozen=True)
class Parts:
    """The arrays of a whole network."""

    h: int
    d_input: int
    encoder: Linear | Array
    """The map of normalised samples, or the embedding of tokens, shape (vocabulary, H)."""
    layers: tuple[Layer, ...]
    decoder: Linear
    prenorm: bool


def parts_of(network: Network, weights: MixingDtype = "float32") -> Parts:
    """Return the arrays of a network, with its mixing weights rounded to the type ``weights`` if they have another."""
    encoder = network.encoder
    decoder = Linear(network.decoder.weight, network.decoder.bias)
    if isinstance(encoder, TokenEncoder):
        entry: Linear | Array = encoder.embedding
    else:
        assert isinstance(encoder, LinearEncoder)
        entry = Linear(encoder.weight, encoder.bias)
    layers = tuple(_layer(network, block, weights) for block in network.blocks)
    return Parts(network.d_model, network.d_input, entry, layers, decoder, network.prenorm)


def groups_of(network: Network, block: Block) -> tuple[Group, ...]:
    """Return the groups of a block's active channels; channels with and without a rank-one term are separate."""
    step = step_parameters(block.ssm, network.discretization)
    groups = []
    for rank_one in (False, True):
        channels = np.flatnonzero(step.rank_one == rank_one)
        groups += [_group(step, members) for members in _rectangles(channels, step.pairs)]
    return tuple(groups)


def _rectangles(channels: Array, pairs: Array) -> list[Array]:
    """Split channels by their numbers of pairs so that the cost of padding and of the groups is smallest.

    An optimal split cuts the channels, sorted by their pairs, into consecutive pieces: dynamic programming over them.
    """
    order = channels[np.argsort(-pairs[channels], kind="stable")]
    heights = pairs[order]
    ends = [*(np.flatnonzero(np.diff(heights)) + 1).tolist(), len(order)] if len(order) else []
    starts = [0, *ends[:-1]]
    # best[i]: the cost of the first i runs of equal height, and the run with which the last rectangle begins.
    best: list[tuple[float, int]] = [(0.0, 0)]
    for last, end in enumerate(ends):
        costs = [(best[i][0] + GROUP_COST + int(heights[starts[i]]) * (end - starts[i]), i) for i in range(last + 1)]
        best.append(min(costs))
    rectangles = []
    run = len(ends)
    while run:
        begin = best[run][1]
        rectangles.append(np.sort(order[starts[begin] : ends[run - 1]]))
        run = begin
    return rectangles[::-1]


def cells_of(pairs: Array, channels: Array, n: int) -> tuple[Array, Array]:
    """Locate the states of ``channels``, of which the layer's channels have ``pairs`` each.

    Returns their positions among the layer's states, and in a flattened rectangle with n columns, both of shape (s,).
    """
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

    rank_one = bool(step.rank_one[channels].any())
    return Group(
        channels=channels,
        states=states,
        cells=cells,
        delta=rectangle(step.delta, -1.0),
        C=rectangle(2 * step.C.conj()),
        p=rectangle(step.p) if rank_one else None,
        r=rectangle(2 * step.r.conj()) if rank_one else None,
        beta=step.beta[channels].astype(np.float32)[:, None] if rank_one else None,
    )


def _layer(network: Network, block: Block, weights: MixingDtype) -> Layer:
    ssm, mixing = block.ssm, block.mixing
    groups = groups_of(network, block)
    active = [ssm.active[group.channels] for group in groups]
    bypassed = mixing.columns[~np.isin(mixing.columns, ssm.active)]
    columns = np.concatenate([*active, bypassed]).astype(np.int64)
    if mixing.dtype != weights:
        mixing = quantised(mixing, weights)
    positions = np.searchsorted(mixing.columns, columns)
    linear = Linear(
        np.ascontiguousarray(mixing.weight[:, positions]),
        mixing.bias[mixing.stacked_rows()].astype(np.float32),
        mixing.scale,
    )
    h, kept = network.d_model, len(mixing.rows)
    removed = np.setdiff1d(np.arange(h), mixing.rows)
    order = None
    if len(removed):
        order = np.empty(h, dtype=np.int64)
        order[mixing.rows], order[removed] = np.arange(kept), kept + np.arange(len(removed))
    return Layer(
        columns=columns,
        groups=groups,
        D=ssm.D[columns].astype(np.float32),
        is_gated=mixing.kind == "glu",
        mixing=linear,
        order=order,
        constants=mixing.constant()[removed].astype(np.float32),
        norm=block.norm,
    )
