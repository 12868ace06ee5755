"""Count the parameters, states and multiply-adds of a network."""

from __future__ import annotations

from dataclasses import dataclass

from edge_ssm.model.network import Block, Network, TokenEncoder


@dataclass(frozen=True)
class BlockCost:
    """What one block keeps and does. Multiply-adds are real, for one sample."""

    active: int
    bypassed: int
    pairs: int
    """Conjugate pairs of all active channels together: S."""
    columns: int
    rows: int
    parameters: int
    weight_bytes: int
    """Of the parameters as a step reads them: mixing weights in their own type, all others float32."""
    multiply_adds: int


@dataclass(frozen=True)
class Cost:
    blocks: tuple[BlockCost, ...]
    parameters: int
    """Real numbers that a step reads, counting a complex one as two."""
    weight_bytes: int
    state_values: int
    """Real numbers of recurrent state a lane."""
    multiply_adds: int
    """Real multiply-adds of one sample through the whole network, without activations and norms."""


def _block_cost(block: Block, h: int) -> BlockCost:
    ssm, mixing = block.ssm, block.mixing
    pairs = int(ssm.pairs.sum())
    rank_one = int(ssm.pairs[ssm.rank_one].sum())
    columns = len(mixing.columns)
    # A step of one pair: complex times complex (4), and the real part of another such product (2). A rank-one term
    # adds an inner product (2) and its outcome times P (2).
    macs = 6 * pairs + 4 * rank_one + columns + mixing.weight.size
    # B is folded into C, so that the step reads (Abar, C): 4 numbers a pair; 4 more for a rank-one term.
    others = 4 * pairs + 4 * rank_one + columns + mixing.bias.size + (2 * h if block.norm else 0)
    others += 0 if mixing.scale is None else mixing.scale.size
    parameters = others + mixing.weight.size
    weight_bytes = 4 * others + mixing.weight.nbytes
    k = len(ssm.active)
    return BlockCost(k, h - k, pairs, columns, len(mixing.rows), parameters, weight_bytes, macs)


def cost(network: Network) -> Cost:
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
