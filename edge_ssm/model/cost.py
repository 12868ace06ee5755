"""Count the parameters, states and multiply-adds of a network."""

from __future__ import annotations

from dataclasses import dataclass

from edge_ssm.model.network import Block, Network, TokenEncoder


@dataclass(frozen=True)
class BlockCost:
    """The size of one block and the cost of one step of it."""

    active: int
    """Number of active channels."""
    bypassed: int
    """Number of bypassed channels."""
    pairs: int
    """Number of conjugate pairs of all active channels together: S."""
    columns: int
    """Number of columns that are left of the mixing matrix."""
    rows: int
    """Number of rows that are left of the mixing matrix; with GLU, pairs of a value row and a gate row."""
    parameters: int
    """Number of real parameters that a step reads; a complex one counts as two."""
    weight_bytes: int
    """Size of these parameters in bytes: mixing weights in their own type, all others float32."""
    multiply_adds: int
    """Number of real multiply-adds of one step."""


@dataclass(frozen=True)
class Cost:
    """The size of a network and the cost of one step of it."""

    blocks: tuple[BlockCost, ...]
    parameters: int
    """Number of real parameters that a step reads; a complex one counts as two."""
    weight_bytes: int
    """Size of these parameters in bytes, as a step reads them."""
    state_values: int
    """Number of real values of recurrent state per lane."""
    multiply_adds: int
    """Number of real multiply-adds of one step, without activations and norms."""


def _block_cost(block: Block, h: int) -> BlockCost:
    ssm, mixing = block.ssm, block.mixing
    pairs = int(ssm.pairs.sum())
    rank_one = int(ssm.pairs[ssm.rank_one].sum())
    columns = len(mixing.columns)
    # One pair: a complex product (4) and the real part of another one (2). A rank-one term adds an inner product (2)
    # and its result times p (2).
    macs = 6 * pairs + 4 * rank_one + columns + mixing.weight.size
    # B is folded into C, so that a step reads delta and C: 4 numbers per pair; p and r are 4 more.
    others = 4 * pairs + 4 * rank_one + columns + mixing.bias.size + (2 * h if block.norm else 0)
    others += 0 if mixing.scale is None else mixing.scale.size
    parameters = others + mixing.weight.size
    weight_bytes = 4 * others + mixing.weight.nbytes
    k = len(ssm.active)
    return BlockCost(k, h - k, pairs, columns, len(mixing.rows), parameters, weight_bytes, macs)


def cost(network: Network) -> Cost:
    """Return the size of a network and the cost of one step of it."""
    h = network.d_model
    blocks = tuple(_block_cost(block, h) for block in network.blocks)
    encoder = network.encoder
    token = isinstance(encoder, TokenEncoder)
    ends = encoder.embedding.size if isinstance(encoder, TokenEncoder) else encoder.weight.size + h
    ends += network.decoder.weight.size + network.d_output
    return Cost(
        blocks=blocks,
        parameters=ends + sum(b.parameters for b in blocks),
        weight_bytes=4 * ends + sum(b.weight_bytes for b in blocks),
        state_values=sum(2 * b.pairs for b in blocks),
        multiply_adds=(0 if token else h * network.d_input)
        + network.decoder.weight.size
        + sum(b.multiply_adds for b in blocks),
    )
