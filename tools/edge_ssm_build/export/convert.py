"""Conversion between the torch network, which is trained, and ``edge_ssm.model.network``, which is shipped."""

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


def _float32(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy().astype(np.float32)


def _float64(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy().astype(np.float64)


def _norm(norm: nn.LayerNorm | nn.BatchNorm1d) -> Norm:
    if isinstance(norm, nn.BatchNorm1d):
        # In evaluation mode BatchNorm is an affine map by its running statistics.
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        return Norm("affine", _float32(scale), _float32(norm.bias - norm.running_mean * scale))
    return Norm("layer", _float32(norm.weight), _float32(norm.bias), norm.eps)


def _both_halves(values: Any) -> Any:
    """Append the conjugate half of the spectrum: (..., M) complex -> (..., 2M)."""
    return np.concatenate([values, values.conj()], axis=-1)


def _powers(A: Any, P: Any, dt: float, length: int) -> Any:
    """Return Abar^length of one channel, bilinear, as a dense (2M, 2M) matrix."""
    dense = np.diag(_both_halves(A)) - np.outer(_both_halves(P), _both_halves(P).conj())
    identity = np.eye(len(dense))
    return np.linalg.matrix_power(np.linalg.solve(identity - dt / 2 * dense, identity + dt / 2 * dense), length)


def truncated_C(ssm: SSM, length: int) -> Any:
    """Return C (I - Abar^length), shape (S,), complex128: the C of S4's generating function.

    See the S4 paper (arXiv 2111.00396), appendix C.3. The layer must have rank-one channels (``ssm.P``).
    """
    assert ssm.P is not None
    C = np.empty_like(ssm.C)
    for k, at in enumerate(state_slices(ssm.pairs)):
        full = _both_halves(ssm.C[at])
        C[at] = (full - full @ _powers(ssm.A[at], ssm.P[at], ssm.dt[k], length))[: ssm.pairs[k]]
    return C


def state_slices(pairs: Any) -> list[slice]:
    """Return the slice of each channel's states on the axis of all states, from the pairs of each channel (K,)."""
    ends = np.cumsum(pairs)
    return [slice(int(end - count), int(end)) for end, count in zip(ends, pairs, strict=True)]


def untruncated_C(A: Any, P: Any, C: Any, dt: Any, pairs: Any, length: int) -> Any:
    """Invert ``truncated_C``: return the untruncated C, shape (S,). The arguments are laid out as in ``SSM``."""
    result = np.empty_like(C)
    for k, at in enumerate(state_slices(pairs)):
        factor = np.eye(2 * int(pairs[k])) - _powers(A[at], P[at], dt[k], length)
        result[at] = np.linalg.solve(factor.T, _both_halves(C[at]))[: pairs[k]]
    return result


def ssm_of(ssm: torch_model.SSM) -> SSM:
    """Return one layer's operators in continuous time; float64 for everything but D, which is float32."""
    kept = ssm.kept.numpy()

    def states(tensor: Tensor) -> Any:
        """Gather the states that are kept: (K, M, 2) -> (S,) complex128."""
        parts = _float64(tensor)
        return (parts[..., 0] + 1j * parts[..., 1])[kept]

    A = (-np.exp(_float64(ssm.log_A_real)) + 1j * _float64(ssm.A_imag))[kept]
    C, dt, pairs = states(ssm.C), np.exp(_float64(ssm.log_dt)), ssm.pairs.numpy().astype(np.int64)
    B, P = np.ones_like(A), None
    if ssm.rank_one:
        B, P = states(ssm.B), states(ssm.P)
        C = untruncated_C(A, P, C, dt, pairs, ssm.l_kernel)
        P = P if P.any() else None
    return SSM(ssm.active.numpy().astype(np.int64), pairs, A, B, C, _float32(ssm.full_D()), dt, P)


def mixing_of(mixing: torch_model.Mixing) -> Mixing:
    """Return one layer's mixing with float32 weights."""
    columns, rows = (t.numpy().astype(np.int64) for t in (mixing.columns, mixing.rows))
    return Mixing("glu" if mixing.glu else "plain", _float32(mixing.weight), _float32(mixing.bias), columns, rows)


def to_network(model: SSMNetwork, spec: InputSpec, window: int, labels: tuple[str, ...]) -> Network:
    """Return the trained network as plain arrays. ``window`` is in samples."""
    blocks = []
    for block in model.layers():
        ssm, mixing = ssm_of(block.ssm), quantised(mixing_of(block.mixing), model.mixing_dtype)
        ssm.D[np.setdiff1d(np.arange(len(ssm.D)), mixing.columns)] = 0
        blocks.append(Block(ssm, mixing, _norm(block.norm)))
    return Network(
        input=spec,
        encoder=LinearEncoder(_float32(model.encoder.weight), _float32(model.encoder.bias)),
        blocks=tuple(blocks),
        decoder=Decoder(_float32(model.decoder.weight), _float32(model.decoder.bias)),
        prenorm=model.config.prenorm,
        discretization=model.config.discretization,
        pooling=model.config.pooling,
        window=1 if model.config.pooling == "none" else window,
        labels=labels,
        rounding_error=model.rounding_error,
    )


def to_model(network: Network, dtype: torch.dtype = torch.float32) -> SSMNetwork:
    """Return a shipped network as a torch network in evaluation mode, with parameters of type ``dtype``.

    float32 rounds the poles and step sizes, which an artifact holds in float64; use float64 for comparisons with a
    stream.

    Raises
    ------
    UsageError
        If the network has a token encoder, blocks of different forms, or a block without a norm.
    """
    forms = {(b.mixing.kind, b.norm and b.norm.kind, b.mixing.dtype) for b in network.blocks}
    if not isinstance(network.encoder, LinearEncoder) or len(forms) != 1:
        raise UsageError("torch: only networks with a linear encoder and blocks of one form can be rebuilt")
    mixing, norm, mixing_dtype = forms.pop()
    if norm is None:
        raise UsageError("torch: a network without norms cannot be rebuilt")
    shapes = []
    for b in network.blocks:
        lists = (b.ssm.active, b.ssm.pairs, b.mixing.columns, b.mixing.rows)
        shapes.append(LayerShape(*(tuple(values.tolist()) for values in lists)))
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
        """Write (S,) complex values to the kept states of a (K, M, 2) parameter; zero elsewhere."""
        parts = np.zeros((*kept.shape, 2))
        parts[kept] = np.stack([values.real, values.imag], axis=-1)
        _put(parameter, parts)

    A = np.full(kept.shape, -0.5 + 0j)
    A[kept] = ssm.A
    _put(target.log_dt, np.log(ssm.dt))
    _put(target.log_A_real, np.log(-A.real))
    _put(target.A_imag, A.imag)
    _put(target.D, ssm.D)
    if target.rank_one:
        P = np.zeros_like(ssm.A) if ssm.P is None else ssm.P
        put_states(target.B, ssm.B)
        put_states(target.P, P)
        put_states(target.C, truncated_C(replace(ssm, P=P), target.l_kernel))
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
            # An affine map is a BatchNorm with mean 0 and variance 1 - eps.
            assert target.norm.running_var is not None
            target.norm.running_var.fill_(1 - target.norm.eps)
        else:
            target.norm.eps = block.norm.eps
