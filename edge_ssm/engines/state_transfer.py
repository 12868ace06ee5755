"""Transfer the recurrent state between two members of a pruned family, so that a running stream continues."""

from __future__ import annotations

import numpy as np

from edge_ssm.model.network import SSM, Array, Network

SAME_POLES = 0.2
"""Largest relative difference of dt A up to which two channels' states mean the same. Fine-tuning moves poles a little;
another reduction of the states gives a channel new ones."""


def transfer_state(old: Network, state: tuple[Array, ...], new: Network) -> tuple[Array, ...]:
    """Return the state of ``new``, shaped as ``Snapshot.state``, that continues the state of ``old``.

    A channel that is active in both networks and has the same poles keeps its state; all other states are zero.
    """
    lanes = len(state[0]) if state else 1
    new_state = [np.zeros((lanes, len(block.ssm.A)), dtype=np.complex128) for block in new.blocks]
    for new_x, old_block, old_x, new_block in zip(new_state, old.blocks, state, new.blocks, strict=False):
        for source, target in _shared_states(old_block.ssm, new_block.ssm):
            new_x[:, target] = old_x[:, source]
    return tuple(new_state)


def _shared_states(old: SSM, new: SSM) -> list[tuple[slice, slice]]:
    """Return where the states of each shared channel lie in the old and in the new axis of states."""
    old_index = {int(channel): i for i, channel in enumerate(old.active)}
    shared = []
    for j, channel in enumerate(new.active):
        i = old_index.get(int(channel))
        if i is None or old.pairs[i] != new.pairs[j] or old.rank_one[i] != new.rank_one[j]:
            continue
        source, target = _states(old, i), _states(new, j)
        old_poles, new_poles = old.dt[i] * old.A[source], new.dt[j] * new.A[target]
        if (np.abs(new_poles - old_poles) <= SAME_POLES * np.abs(old_poles)).all():
            shared.append((source, target))
    return shared


def _states(ssm: SSM, k: int) -> slice:
    first = int(ssm.pairs[:k].sum())
    return slice(first, first + int(ssm.pairs[k]))
