"""The state that two networks share: what another member of a family goes on with."""

from __future__ import annotations

import numpy as np

from edge_ssm.model.network import SSM, Array, Network

SAME_POLES = 0.2
"""Two channels' states mean the same while dt A differs by less than this share: fine-tuning moves poles a little,
another reduction gives a channel new ones."""


def transfer_state(old: Network, state: tuple[Array, ...], new: Network) -> tuple[Array, ...]:
    """``Snapshot.state`` of ``new``, (lanes, S) a block, from that of ``old``: a channel that is active in both and has
    the same poles keeps its state, all others begin at zero."""
    lanes = len(state[0]) if state else 1
    handed = [np.zeros((lanes, len(block.ssm.A)), dtype=np.complex128) for block in new.blocks]
    for to, old_block, old_x, new_block in zip(handed, old.blocks, state, new.blocks, strict=False):
        for source, target in _shared(old_block.ssm, new_block.ssm):
            to[:, target] = old_x[:, source]
    return tuple(handed)


def _shared(old: SSM, new: SSM) -> list[tuple[slice, slice]]:
    """Where the states lie of each channel that both have."""
    places = {int(channel): i for i, channel in enumerate(old.active)}
    found = []
    for j, channel in enumerate(new.active):
        i = places.get(int(channel))
        if i is None or old.pairs[i] != new.pairs[j] or old.rank_one[i] != new.rank_one[j]:
            continue
        source, target = _states(old, i), _states(new, j)
        was, becomes = old.dt[i] * old.A[source], new.dt[j] * new.A[target]
        if (np.abs(becomes - was) <= SAME_POLES * np.abs(was)).all():
            found.append((source, target))
    return found


def _states(ssm: SSM, k: int) -> slice:
    first = int(ssm.pairs[:k].sum())
    return slice(first, first + int(ssm.pairs[k]))
