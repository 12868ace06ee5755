"""Between the torch network and edge_ssm.network: the first is trained, the second is shipped."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edge_ssm.errors import UsageError
from edge_ssm.network import SSM, Block, Decoder, InputSpec, LinearEncoder, Mixing, Network, Norm
from edge_ssm_build.model import Config, S4DNetwork


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy().astype(np.float32)


def _wide(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy().astype(np.float64)


def _norm(norm: nn.LayerNorm | nn.BatchNorm1d) -> Norm:
    if isinstance(norm, nn.BatchNorm1d):
        # In evaluation BatchNorm is an affine map of its running statistics.
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        return Norm("affine", _array(scale), _array(norm.bias - norm.running_mean * scale))
    return Norm("layer", _array(norm.weight), _array(norm.bias), norm.eps)


def to_network(model: S4DNetwork, spec: InputSpec, window: int, labels: tuple[str, ...]) -> Network:
    """The trained network as plain arrays. ``window`` counts samples."""
    blocks = []
    for block in model.layers():
        ssm = block.ssm
        A = -np.exp(_wide(ssm.log_A_real)) + 1j * _wide(ssm.A_imag)
        C = _wide(ssm.C)
        blocks.append(
            Block(
                ssm=SSM(
                    active=ssm.active.numpy().astype(np.int64),
                    A=A,
                    B=np.ones_like(A),
                    C=C[..., 0] + 1j * C[..., 1],
                    D=_array(ssm.full_D()),
                    dt=np.exp(_wide(ssm.log_dt)),
                ),
                mixing=Mixing(model.config.mixing, _array(block.mixing.weight), _array(block.mixing.bias)),
                norm=_norm(block.norm),
            )
        )
    return Network(
        input=spec,
        encoder=LinearEncoder(_array(model.encoder.weight), _array(model.encoder.bias)),
        blocks=tuple(blocks),
        decoder=Decoder(_array(model.decoder.weight), _array(model.decoder.bias)),
        prenorm=model.config.prenorm,
        discretization=model.config.discretization,
        pooling=model.config.pooling,
        window=1 if model.config.pooling == "none" else window,
        labels=labels,
    )


def to_model(network: Network) -> S4DNetwork:
    """A shipped network in torch convolution mode, in evaluation mode.

    Raises UsageError for what this network class has no form for: tokens, mixed block forms, blocks without a norm.
    """
    forms = {(b.mixing.kind, b.norm and b.norm.kind, b.ssm.A.shape[1]) for b in network.blocks}
    if not isinstance(network.encoder, LinearEncoder) or len(forms) != 1:
        raise UsageError("torch: only networks with a linear encoder and blocks of one form can be rebuilt")
    mixing, norm, pairs = forms.pop()
    if norm is None:
        raise UsageError("torch: a network without norms can't be rebuilt")
    model = S4DNetwork(
        Config(
            d_input=network.d_input,
            d_output=network.d_output,
            d_model=network.d_model,
            d_state=2 * pairs,
            n_layers=len(network.blocks),
            dropout=0.0,
            prenorm=network.prenorm,
            norm="layer" if norm == "layer" else "batch",
            mixing=mixing,
            pooling=network.pooling,
            discretization=network.discretization,
            active=tuple(tuple(b.ssm.active.tolist()) for b in network.blocks),
        )
    )
    with torch.no_grad():
        _fill(model, network)
    return model.eval()


def _fill(model: S4DNetwork, network: Network) -> None:
    def put(target: Tensor, values: Any) -> None:
        target.copy_(torch.from_numpy(np.ascontiguousarray(values)))

    assert isinstance(network.encoder, LinearEncoder)
    put(model.encoder.weight, network.encoder.weight)
    put(model.encoder.bias, network.encoder.bias)
    put(model.decoder.weight, network.decoder.weight)
    put(model.decoder.bias, network.decoder.bias)
    for target, block in zip(model.layers(), network.blocks, strict=True):
        ssm, BC = block.ssm, block.ssm.B * block.ssm.C
        put(target.ssm.log_dt, np.log(ssm.dt))
        put(target.ssm.log_A_real, np.log(-ssm.A.real))
        put(target.ssm.A_imag, ssm.A.imag)
        put(target.ssm.C, np.stack([BC.real, BC.imag], axis=-1))
        put(target.ssm.D, ssm.D[ssm.active])
        put(target.ssm.gain, ssm.D)
        put(target.mixing.weight, block.mixing.weight)
        put(target.mixing.bias, block.mixing.bias)
        assert block.norm is not None
        put(target.norm.weight, block.norm.weight)
        put(target.norm.bias, block.norm.bias)
        if isinstance(target.norm, nn.BatchNorm1d):
            # An affine map is a BatchNorm of mean 0 and variance 1 - eps.
            assert target.norm.running_var is not None
            target.norm.running_var.fill_(1 - target.norm.eps)
        else:
            target.norm.eps = block.norm.eps
