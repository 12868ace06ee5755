"""PyTorch: eager, as the state-spaces repository steps S4D, and TorchScript in complex and in real arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from edge_ssm.model.network import Array
from peers.parts import Layer, Parts


def _buffers(module: nn.Module, **arrays: Any) -> None:
    for name, array in arrays.items():
        module.register_buffer(name, torch.as_tensor(array))


class Step(nn.Module):
    """(sample, states) -> (outputs, states); batch of one."""

    def __init__(self, parts: Parts, real: bool) -> None:
        super().__init__()
        _buffers(self, mean=parts.mean, scale=parts.scale, encoder=parts.encoder, encoder_bias=parts.encoder_bias)
        _buffers(self, decoder=parts.decoder, decoder_bias=parts.decoder_bias)
        self.layers = nn.ModuleList([(RealLayer if real else ComplexLayer)(layer, parts.h) for layer in parts.layers])

    def forward(self, sample: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        u = F.linear((sample - self.mean) * self.scale, self.encoder, self.encoder_bias)
        new = []
        for layer, x in zip(self.layers, states, strict=True):
            u, x = layer(u, x)
            new.append(x)
        return F.linear(u, self.decoder, self.decoder_bias), new


class _Layer(nn.Module):
    def __init__(self, layer: Layer, h: int) -> None:
        super().__init__()
        self.h, self.eps, self.whole = h, layer.eps, len(layer.active) == h
        _buffers(self, active=layer.active, D=layer.D, weight=layer.weight, bias=layer.bias)
        _buffers(self, norm_weight=layer.norm[0], norm_bias=layer.norm[1])

    def chosen(self, u: Tensor) -> Tensor:
        return u if self.whole else u[:, self.active]

    def mixed(self, u: Tensor, y: Tensor) -> Tensor:
        u = u + F.glu(F.linear(F.gelu(y), self.weight, self.bias), dim=-1)
        return F.layer_norm(u, (self.h,), self.norm_weight, self.norm_bias, self.eps)


class ComplexLayer(_Layer):
    """state = dA state + dB u; y = 2 Re(C state) + D u, by einsum over complex tensors; dB is folded into C."""

    def __init__(self, layer: Layer, h: int) -> None:
        super().__init__(layer, h)
        dA = (1 + layer.delta[0] + 1j * layer.delta[1]).astype(np.complex64)
        _buffers(self, dA=dA, C=(layer.C[0] - 1j * layer.C[1]).astype(np.complex64), dB=np.ones_like(dA))

    def forward(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        v = self.chosen(u)
        x = torch.einsum("hn,bhn->bhn", self.dA, x) + torch.einsum("hn,bh->bhn", self.dB, v.to(self.dB.dtype))
        y = torch.einsum("hn,bhn->bh", self.C, x).real + self.D * v
        return self.mixed(u, y), x


class RealLayer(_Layer):
    """The same in delta form and real arithmetic; x is (2, K, N/2)."""

    def __init__(self, layer: Layer, h: int) -> None:
        super().__init__(layer, h)
        _buffers(self, dr=layer.delta[0], di=layer.delta[1], C=layer.C)

    def forward(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        v = self.chosen(u)
        re, im = x[0], x[1]
        x = torch.stack([re + self.dr * re - self.di * im + v.t(), im + self.dr * im + self.di * re])
        y = (self.C * x).sum(dim=(0, 2)) + self.D * v
        return self.mixed(u, y), x


def _stepper(module: Any, states: list[Tensor]) -> Callable[[Array], Array]:
    def step(sample: Array) -> Array:
        nonlocal states
        with torch.inference_mode():
            outputs, states = module(torch.from_numpy(sample.astype(np.float32))[None], states)
        result: Array = outputs[0].numpy()
        return result

    return step


def _states(parts: Parts, real: bool) -> list[Tensor]:
    shapes = [layer.delta[0].shape for layer in parts.layers]
    return [torch.zeros(2, *s) if real else torch.zeros(1, *s, dtype=torch.complex64) for s in shapes]


def eager(parts: Parts) -> Callable[[Array], Array]:
    return _stepper(Step(parts, real=False).eval(), _states(parts, real=False))


def script(parts: Parts, real: bool, frozen: bool) -> Callable[[Array], Array]:
    module, states = Step(parts, real).eval(), _states(parts, real)
    with torch.inference_mode():
        traced = torch.jit.trace(module, (torch.zeros(1, len(parts.mean)), states), check_trace=False)
        if frozen:
            traced = torch.jit.optimize_for_inference(torch.jit.freeze(traced))
    return _stepper(traced, states)
