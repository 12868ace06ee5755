"""The state that two networks share is handed over from one to the other."""

from dataclasses import replace

import numpy as np
from support.networks import random_network, samples_for
from support.service_runs import smaller
from support.streams import Stream

from edge_ssm.engines.registry import create
from edge_ssm.engines.state_transfer import transfer_state


def test_a_channel_that_both_have_keeps_its_state():
    network = random_network(ragged=True)
    member = smaller(network, [0, 2, 5])
    big, small = create("reference", network), create("reference", member)
    samples = samples_for(network, 0, 50)
    big.chunk(samples)
    state = big.snapshot().state
    handed = transfer_state(network, state, member)
    for x, y, block in zip(handed, state, network.blocks, strict=True):
        owner = block.ssm.owner
        assert (x == y[:, np.isin(owner, [0, 2, 5])]).all()
    small.restore(replace(small.snapshot(), state=handed))
    # And back: what only the larger one has begins at zero.
    back = transfer_state(member, handed, network)
    for x, y, block in zip(back, state, network.blocks, strict=True):
        shared = np.isin(block.ssm.owner, [0, 2, 5])
        assert (x[:, shared] == y[:, shared]).all()
        assert (x[:, ~shared] == 0).all()


def test_a_channel_with_other_poles_begins_at_zero():
    network = random_network()
    block = network.blocks[0]
    moved = replace(network, blocks=(replace(block, ssm=replace(block.ssm, A=2 * block.ssm.A)), network.blocks[1]))
    engine = create("reference", network)
    engine.chunk(samples_for(network, 0, 50))
    state = engine.snapshot().state
    first, second = transfer_state(network, state, moved)
    assert (first == 0).all()
    assert (second == state[1]).all()


def test_a_swap_between_two_samples_goes_on_with_the_shared_state():
    network = random_network(window=20)
    same = replace(network)
    samples = samples_for(network, 0, 40)
    stream = Stream(network).feed(samples[:13])
    engine = create("reference", same)
    engine.restore(stream.pipeline.engine.snapshot())
    stream.pipeline.replace_engine(engine)
    stream.feed(samples[13:])
    plain = Stream(network).feed(samples)
    assert [d["logits"] for d in stream.decisions] == [d["logits"] for d in plain.decisions]
