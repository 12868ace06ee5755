"""Between the torch network and edge_ssm.model.network: the first is trained, the second is shipped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edge_ssm.errors import UsageError
from edge_ssm.model.network import SSM, Block, Decoder, InputSpec, LinearEncoder, Mixing, Network, Norm
from edge_ssm.model.transforms import quantised
from edge_ssm_build.training import network as torch_model
from edge_ssm_build.training.network import Config, LayerShape, SSMNetwork


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


def _both_halves(values: Any) -> Any:
    """(..., M) complex -> (..., 2M): the other half of the spectrum behind the one that is stored."""
    return np.concatenate([values, values.conj()], axis=-1)


def _powers(A: Any, P: Any, dt: float, length: int) -> Any:
    """(2M, 2M): Abar^length of one channel, bilinear, by dense matrices."""
    dense = np.diag(_both_halves(A)) - np.outer(_both_halves(P), _both_halves(P).conj())
    one = np.eye(len(dense))
    return np.linalg.matrix_power(np.linalg.solve(one - dt / 2 * dense, one + dt / 2 * dense), length)


def truncated_C(ssm: SSM, length: int) -> Any:
    """(S,) complex128: C (I - Abar^length), the C of S4's generating function (S4 paper, appendix C.3)."""
    assert ssm.P is not None
    C = np.empty_like(ssm.C)
    for k, at in enumerate(_slices(ssm.pairs)):
        full = _both_halves(ssm.C[at])
        C[at] = (full - full @ _powers(ssm.A[at], ssm.P[at], ssm.dt[k], length))[: ssm.pairs[k]]
    return C


def _slices(pairs: Any) -> list[slice]:
    """Where each channel's states lie in an axis of all."""
    ends = np.cumsum(pairs)
    return [slice(int(end - count), int(end)) for end, count in zip(ends, pairs, strict=True)]


def untruncated_C(A: Any, P: Any, C: Any, dt: Any, pairs: Any, length: int) -> Any:
    """The C of which ``truncated_C`` makes ``C``. Arguments as in SSM."""
    result = np.empty_like(C)
    for k, at in enumerate(_slices(pairs)):
        rest = np.eye(2 * int(pairs[k])) - _powers(A[at], P[at], dt[k], length)
        result[at] = np.linalg.solve(rest.T, _both_halves(C[at]))[: pairs[k]]
    return result


def ssm_of(ssm: torch_model.SSM) -> SSM:
    """One layer's operators in continuous time, float64 where the engines want it."""
    kept = ssm.kept.numpy()

    def states(tensor: Tensor) -> Any:
        """(K, M, 2) -> (S,) complex128."""
        wide = _wide(tensor)
        return (wide[..., 0] + 1j * wide[..., 1])[kept]

    A = (-np.exp(_wide(ssm.log_A_real)) + 1j * _wide(ssm.A_imag))[kept]
    C, dt, pairs = states(ssm.C), np.exp(_wide(ssm.log_dt)), ssm.pairs.numpy().astype(np.int64)
    B, P = np.ones_like(A), None
    if ssm.rank_one:
        B, P = states(ssm.B), states(ssm.P)
        C = untruncated_C(A, P, C, dt, pairs, ssm.l_kernel)
        P = P if P.any() else None
    return SSM(ssm.active.numpy().astype(np.int64), pairs, A, B, C, _array(ssm.full_D()), dt, P)


def mixing_of(mixing: torch_model.Mixing) -> Mixing:
    columns, rows = (t.numpy().astype(np.int64) for t in (mixing.columns, mixing.rows))
    return Mixing("glu" if mixing.glu else "plain", _array(mixing.weight), _array(mixing.bias), columns, rows)


def to_network(model: SSMNetwork, spec: InputSpec, window: int, labels: tuple[str, ...]) -> Network:
    """The trained network as plain arrays. ``window`` counts samples."""
    blocks = []
    for block in model.layers():
        ssm, mixing = ssm_of(block.ssm), quantised(mixing_of(block.mixing), model.mixing_dtype)
        ssm.D[np.setdiff1d(np.arange(len(ssm.D)), mixing.columns)] = 0
        blocks.append(Block(ssm, mixing, _norm(block.norm)))
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
        rounding_error=model.rounding_error,
    )


def to_model(network: Network, dtype: torch.dtype = torch.float32) -> SSMNetwork:
    """A shipped network in torch convolution mode, in evaluation mode, with parameters of type ``dtype``.

    In float32 the poles and step sizes, which an artifact holds in float64, are rounded; a stream is compared with
    float64. Raises UsageError for what this network class has no form for: tokens, mixed block forms, blocks without a
    norm.
    """
    forms = {(b.mixing.kind, b.norm and b.norm.kind, b.mixing.dtype) for b in network.blocks}
    if not isinstance(network.encoder, LinearEncoder) or len(forms) != 1:
        raise UsageError("torch: only networks with a linear encoder and blocks of one form can be rebuilt")
    mixing, norm, mixing_dtype = forms.pop()
    if norm is None:
        raise UsageError("torch: a network without norms can't be rebuilt")
    shapes = []
    for b in network.blocks:
        lists = (b.ssm.active, b.ssm.pairs, b.mixing.columns, b.mixing.rows)
        shapes.append(LayerShape(*(tuple(indices.tolist()) for indices in lists)))
    rank_one = any(b.ssm.P is not None for b in network.blocks)
    config = Config(
        d_input=network.d_input,
        d_output=network.d_output,
        d_model=network.d_model,
        d_state=2 * max((max(shape.pairs, default=1) for shape in shapes), default=1),
        n_layers=len(network.blocks),
        dropout=0.0,
        prenorm=network.prenorm,
        norm="layer" if norm == "layer" else "batch",
        mixing=mixing,
        pooling=network.pooling,
        discretization=network.discretization,
        kernel="s4" if rank_one else "s4d",
        init="legs" if rank_one else "lin",
        l_kernel=network.window if rank_one else 0,
        layers=tuple(shapes),
    )
    model = SSMNetwork(config, mixing_dtype, network.rounding_error).to(dtype)
    with torch.no_grad():
        _fill(model, network)
    return model.eval()


def _put(target: Tensor, values: Any) -> None:
    target.copy_(torch.from_numpy(np.ascontiguousarray(values)))


def _fill_ssm(target: torch_model.SSM, ssm: SSM) -> None:
    kept = target.kept.numpy()

    def put_states(parameter: Tensor, values: Any) -> None:
        """(S,) complex into the places of (K, M, 2) that are kept; zero elsewhere."""
        whole = np.zeros((*kept.shape, 2))
        whole[kept] = np.stack([values.real, values.imag], axis=-1)
        _put(parameter, whole)

    A = np.full(kept.shape, -0.5 + 0j)
    A[kept] = ssm.A
    _put(target.log_dt, np.log(ssm.dt))
    _put(target.log_A_real, np.log(-A.real))
    _put(target.A_imag, A.imag)
    _put(target.D, ssm.D)
    if target.rank_one:
        whole = ssm if ssm.P is not None else replace(ssm, P=np.zeros_like(ssm.A))
        assert whole.P is not None
        put_states(target.B, ssm.B)
        put_states(target.P, whole.P)
        put_states(target.C, truncated_C(whole, target.l_kernel))
    else:
        put_states(target.C, ssm.B * ssm.C)


def _fill(model: SSMNetwork, network: Network) -> None:
    assert isinstance(network.encoder, LinearEncoder)
    _put(model.encoder.weight, network.encoder.weight)
    _put(model.encoder.bias, network.encoder.bias)
    _put(model.decoder.weight, network.decoder.weight)
    _put(model.decoder.bias, network.decoder.bias)
    for target, block in zip(model.layers(), network.blocks, strict=True):
        _fill_ssm(target.ssm, block.ssm)
        _put(target.mixing.weight, block.mixing.values())
        _put(target.mixing.bias, block.mixing.bias)
        assert block.norm is not None
        _put(target.norm.weight, block.norm.weight)
        _put(target.norm.bias, block.norm.bias)
        if isinstance(target.norm, nn.BatchNorm1d):
            # An affine map is a BatchNorm of mean 0 and variance 1 - eps.
            assert target.norm.running_var is not None
            target.norm.running_var.fill_(1 - target.norm.eps)
        else:
            target.norm.eps = block.norm.eps
