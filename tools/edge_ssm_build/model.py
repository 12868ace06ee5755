"""The S4D network in torch, in convolution mode, as it is trained and pruned (arXiv 2206.11893).

Equations and names are those of ``edge_ssm.network``; this module differs from the engines only in how it computes:
the whole window at once, by FFT convolution with the kernel K[l] = 2 Re(sum_n C_n Bbar_n Abar_n^l).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from edge_ssm.errors import UsageError


@dataclass(frozen=True)
class Config:
    """Shape and form of a network. ``active`` lists, a layer, the channels that pruning has left."""

    d_input: int
    d_output: int
    d_model: int = 64
    d_state: int = 32
    n_layers: int = 2
    dropout: float = 0.1
    prenorm: bool = False
    norm: Literal["layer", "batch"] = "layer"
    mixing: Literal["glu", "plain"] = "glu"
    pooling: Literal["mean", "last", "none"] = "mean"
    discretization: Literal["zoh", "bilinear"] = "zoh"
    init: Literal["lin", "inv", "legs"] = "lin"
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    active: tuple[tuple[int, ...], ...] | None = None


def initial_A(init: str, d_state: int) -> Tensor:
    """(N/2,) complex128: the diagonal of S4D-Lin, -Inv or -LegS (S4D paper, section 4)."""
    n = torch.arange(d_state // 2, dtype=torch.float64)
    if init == "lin":  # eq. 9
        return torch.complex(torch.full_like(n, -0.5), math.pi * n)
    if init == "inv":  # eq. 8
        return torch.complex(torch.full_like(n, -0.5), d_state / math.pi * (d_state / (2 * n + 1) - 1))
    # S4D-LegS, eq. 6 and 7: eigenvalues of the normal part of HiPPO-LegS, those with positive imaginary part.
    p = torch.sqrt(2 * torch.arange(d_state, dtype=torch.float64) + 1)
    skew = -0.5 * (torch.outer(p, p).tril(-1) - torch.outer(p, p).triu(1)) - 0.5 * torch.eye(
        d_state, dtype=torch.float64
    )
    eigenvalues = torch.linalg.eigvals(skew)
    upper = eigenvalues[eigenvalues.imag > 0]
    ascending: Tensor = upper[torch.argsort(upper.imag)]
    return ascending


class S4D(nn.Module):
    """K diagonal SSMs side by side; the other H - K channels are bypassed with a fixed gain."""

    active: Tensor  # (K,) int64, ascending
    gain: Tensor  # (H,), counts where a channel is bypassed

    def __init__(self, config: Config, active: tuple[int, ...]) -> None:
        super().__init__()
        h, k, m = config.d_model, len(active), config.d_state // 2
        A = initial_A(config.init, config.d_state).expand(k, m)
        span = math.log(config.dt_max) - math.log(config.dt_min)
        self.discretization = config.discretization
        self.register_buffer("active", torch.tensor(active, dtype=torch.int64))
        self.register_buffer("gain", torch.ones(h))
        self.log_dt = nn.Parameter(torch.rand(k) * span + math.log(config.dt_min))
        self.log_A_real = nn.Parameter(torch.log(-A.real).float())
        self.A_imag = nn.Parameter(A.imag.float())
        self.C = nn.Parameter(torch.randn(k, m, 2) * math.sqrt(0.5))
        self.D = nn.Parameter(torch.randn(k))
        # B stays 1: only the product B C matters (S4D paper, section 4.1).

    def full_D(self) -> Tensor:
        """(H,): D of the active channels, the gain of the bypassed ones."""
        return self.gain.scatter(0, self.active, self.D)

    def kernel(self, length: int) -> Tensor:
        """(K, length): the convolution kernel, S4D paper eq. 4 and 5."""
        A = torch.complex(-torch.exp(self.log_A_real), self.A_imag)
        dt = torch.exp(self.log_dt)[:, None]
        if self.discretization == "zoh":
            log_Abar = dt * A
            Cbar = torch.view_as_complex(self.C) * (torch.exp(log_Abar) - 1) / A
        else:
            log_Abar = torch.log((1 + dt * A / 2) / (1 - dt * A / 2))
            Cbar = torch.view_as_complex(self.C) * dt / (1 - dt * A / 2)
        powers = torch.exp(log_Abar[..., None] * torch.arange(length, device=A.device))
        return 2 * torch.einsum("km,kml->kl", Cbar, powers).real

    def forward(self, u: Tensor) -> Tensor:
        """(batch, H, T) -> (batch, H, T)."""
        length = u.shape[-1]
        y = u * self.full_D()[:, None]
        if len(self.active) == 0:
            return y
        kernel = torch.fft.rfft(self.kernel(length), n=2 * length)
        spectrum = torch.fft.rfft(u[:, self.active], n=2 * length)
        convolved = torch.fft.irfft(spectrum * kernel, n=2 * length)[..., :length]
        result: Tensor = y.index_add(1, self.active, convolved)
        return result

    def ssm_parameters(self) -> list[nn.Parameter]:
        """Those that train with the SSM's own learning rate and without weight decay."""
        return [self.log_dt, self.log_A_real, self.A_imag, self.C]

    def bypass(self, channels: list[int]) -> None:
        """Remove operators for good: their parameters go, their channels pass with gain 1 (S4oP)."""
        keep = torch.tensor(
            [i for i, c in enumerate(self.active.tolist()) if c not in set(channels)], dtype=torch.int64
        )
        for name in ("log_dt", "log_A_real", "A_imag", "C", "D"):
            setattr(self, name, nn.Parameter(getattr(self, name).detach()[keep].clone()))
        self.active = self.active[keep]


class Block(nn.Module):
    def __init__(self, config: Config, active: tuple[int, ...]) -> None:
        super().__init__()
        h = config.d_model
        self.prenorm = config.prenorm
        self.glu = config.mixing == "glu"
        self.ssm = S4D(config, active)
        self.norm: nn.LayerNorm | nn.BatchNorm1d = nn.LayerNorm(h) if config.norm == "layer" else nn.BatchNorm1d(h)
        self.mixing = nn.Linear(h, 2 * h if self.glu else h)
        self.dropout = nn.Dropout(config.dropout)

    def _normalise(self, u: Tensor) -> Tensor:
        """(batch, T, H); BatchNorm1d wants the channels in the middle."""
        normalised: Tensor
        if isinstance(self.norm, nn.BatchNorm1d):
            normalised = self.norm(u.transpose(1, 2)).transpose(1, 2)
        else:
            normalised = self.norm(u)
        return normalised

    def forward(self, u: Tensor) -> Tensor:
        """(batch, T, H) -> (batch, T, H)."""
        v = self._normalise(u) if self.prenorm else u
        y = self.ssm(v.transpose(1, 2)).transpose(1, 2)
        z = self.mixing(self.dropout(F.gelu(y)))
        if self.glu:
            z = F.glu(z, dim=-1)
        u = u + self.dropout(z)
        return u if self.prenorm else self._normalise(u)


class S4DNetwork(nn.Module):
    """Of normalised input: (batch, T, d_input) -> (batch, d_output), or (batch, T, d_output) without pooling."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.d_state % 2 or config.d_state < 2:
            raise UsageError(f"d_state: {config.d_state}, expected an even number of 2 or more (conjugate pairs)")
        self.config = config
        everything = tuple(tuple(range(config.d_model)) for _ in range(config.n_layers))
        self.encoder = nn.Linear(config.d_input, config.d_model)
        self.blocks = nn.ModuleList(Block(config, active) for active in (config.active or everything))
        self.decoder = nn.Linear(config.d_model, config.d_output)

    def forward(self, x: Tensor) -> Tensor:
        u = self.encoder(x)
        for block in self.layers():
            u = block(u)
        if self.config.pooling == "mean":
            u = u.mean(dim=1)
        elif self.config.pooling == "last":
            u = u[:, -1]
        logits: Tensor = self.decoder(u)
        return logits

    def layers(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def ssms(self) -> list[S4D]:
        return [block.ssm for block in self.layers()]

    def active(self) -> tuple[tuple[int, ...], ...]:
        """The active channels of every layer, ascending."""
        return tuple(tuple(ssm.active.tolist()) for ssm in self.ssms())
