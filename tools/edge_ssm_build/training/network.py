"""S4D and S4 networks in torch, in convolution mode, as they are trained and pruned (arXiv 2206.11893, 2111.00396).

Equations and names are those of ``edge_ssm.model.network``. Unlike the engines, this module computes a whole window at
once, by FFT convolution. Pruned parameters, columns and rows are removed here too, except that the states of a layer's
channels share one rectangular array, in which removed states have C = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from edge_ssm.errors import UsageError
from edge_ssm.model.network import MixingDtype
from edge_ssm_build.training.kernels import convolve, diagonal_kernel, initial_A, initial_rank_one, rank_one_kernel

Kernel = Literal["s4d", "s4"]


@dataclass(frozen=True)
class LayerShape:
    """The channels, states, columns and rows of one layer that remain after pruning."""

    active: tuple[int, ...]
    """Channels with an operator, ascending."""
    pairs: tuple[int, ...]
    """Number of conjugate pairs of each active channel."""
    columns: tuple[int, ...]
    """Channels that enter the mixing, ascending. They include all active channels."""
    rows: tuple[int, ...]
    """Channels of the residual stream that the mixing adds to, ascending."""


@dataclass(frozen=True)
class Config:
    """Shape and form of a network. ``layers`` is None for an unpruned network."""

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
    kernel: Kernel = "s4d"
    """s4d: diagonal. s4: diagonal plus rank one (DPLR), bilinear."""
    l_kernel: int = 0
    """Samples for which the C of s4 is truncated (``kernels.rank_one_kernel``): the window. Not used by s4d."""
    layers: tuple[LayerShape, ...] | None = None

    def shapes(self) -> tuple[LayerShape, ...]:
        """Return the shape of every layer."""
        if self.layers is not None:
            return self.layers
        everything = tuple(range(self.d_model))
        pairs = (self.d_state // 2,) * self.d_model
        return (LayerShape(everything, pairs, everything, everything),) * self.n_layers


class SSM(nn.Module):
    """One layer of K single-channel SSMs; each of the other H - K channels is bypassed with a gain."""

    active: Tensor  # (K,) int64, ascending
    pairs: Tensor  # (K,) int64, number of conjugate pairs
    fixed: Tensor  # (H,) bool: bypassed with a gain that is not trained
    gain: Tensor  # (H,) that gain: 1 for the identity, 0 for a removed column
    kept: Tensor  # (K, M) bool: states that remain, the first ``pairs`` of each row

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__()
        h, k, m = config.d_model, len(shape.active), config.d_state // 2
        m = max(shape.pairs, default=m) if config.layers is not None else m
        self.rank_one = config.kernel == "s4"
        self.discretization = config.discretization
        self.l_kernel = config.l_kernel
        if self.rank_one and (config.discretization != "bilinear" or config.l_kernel < 1):
            raise UsageError("kernel s4: needs --discretization bilinear and the window as l_kernel")
        span = math.log(config.dt_max) - math.log(config.dt_min)
        if self.rank_one:
            A, P, B = initial_rank_one(config.init, 2 * m)
            self.P = nn.Parameter(torch.view_as_real(P).float().expand(k, m, 2).clone())
            self.B = nn.Parameter(torch.view_as_real(B).float().expand(k, m, 2).clone())
        else:
            A = initial_A(config.init, 2 * m)
            # B is fixed at 1: only the product B C matters (S4D paper, section 4.1).
        A = A.expand(k, m)
        self.register_buffer("active", torch.tensor(shape.active, dtype=torch.int64))
        self.register_buffer("pairs", torch.tensor(shape.pairs, dtype=torch.int64))
        self.register_buffer("fixed", torch.zeros(h, dtype=torch.bool))
        self.register_buffer("gain", torch.ones(h))
        self.register_buffer("kept", torch.arange(m) < self.pairs[:, None])
        self.log_dt = nn.Parameter(torch.rand(k) * span + math.log(config.dt_min))
        self.log_A_real = nn.Parameter(torch.log(-A.real).float())
        self.A_imag = nn.Parameter(A.imag.float())
        self.C = nn.Parameter(torch.randn(k, m, 2) * math.sqrt(0.5))
        self.D = nn.Parameter(torch.randn(h))

    def full_D(self) -> Tensor:
        """Return D of the active channels and the gain of the bypassed ones, shape (H,)."""
        return torch.where(self.fixed, self.gain, self.D)

    def kernel(self, length: int) -> Tensor:
        """Return the convolution kernel without D, shape (K, length), in the parameters' precision.

        It is always computed in float64: in float32 the powers of Abar and exp(dt A) - 1 of a slow state lose so many
        digits that the logits of a trained network are off by up to 3e-3.

        Raises
        ------
        UsageError
            If an s4 kernel is longer than the window that its C is truncated to.
        """
        double = torch.complex128
        A = torch.complex(-torch.exp(self.log_A_real.double()), self.A_imag.double())
        dt = torch.exp(self.log_dt.double())
        C = (torch.view_as_complex(self.C) * self.kept).to(double)
        if self.rank_one:
            if length > self.l_kernel:
                raise UsageError(f"kernel s4: made for windows of up to {self.l_kernel} samples, not {length}")
            P, B = torch.view_as_complex(self.P) * self.kept, torch.view_as_complex(self.B)
            kernel = rank_one_kernel(A, P.to(double), B.to(double), C, dt, self.l_kernel)[:, :length]
        else:
            dt_A = dt[:, None] * A
            if self.discretization == "zoh":
                kernel = diagonal_kernel(dt_A, C * (torch.exp(dt_A) - 1) / A, length)
            else:
                log_Abar = torch.log((1 + dt_A / 2) / (1 - dt_A / 2))
                kernel = diagonal_kernel(log_Abar, C * dt[:, None] / (1 - dt_A / 2), length)
        return kernel.to(self.D.dtype)

    def forward(self, u: Tensor) -> Tensor:
        """Map (batch, H, T) to (batch, H, T)."""
        y = u * self.full_D()[:, None]
        if len(self.active) == 0:
            return y
        convolved = convolve(u[:, self.active], self.kernel(u.shape[-1]))
        result: Tensor = y.index_add(1, self.active, convolved)
        return result

    def ssm_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are trained with the SSM's own learning rate and without weight decay."""
        return [p for name, p in self.named_parameters() if name != "D"]

    def bypass(self, channels: list[int], gain: Tensor | None = None) -> None:
        """Remove the operators of these channels.

        The channels then pass with a fixed gain of 1 (S4oP) or with ``gain``, one per channel, which stays trainable.
        """
        keep = torch.tensor(
            [i for i, c in enumerate(self.active.tolist()) if c not in set(channels)], dtype=torch.int64
        )
        for name, parameter in list(self.named_parameters()):
            if name != "D":
                setattr(self, name, nn.Parameter(parameter.detach()[keep].clone()))
        if gain is None:
            self.fix(channels, 1.0)
        else:
            with torch.no_grad():
                self.D[channels] = gain.to(self.D.dtype)
        self.active, self.pairs = self.active[keep], self.pairs[keep]
        self.shrink()

    def fix(self, channels: list[int], gain: float) -> None:
        """Give these bypassed channels a fixed gain."""
        self.fixed[channels] = True
        self.gain[channels] = gain

    def shrink(self) -> None:
        """Shrink the shared array of states to the widest remaining channel."""
        m = int(self.pairs.max()) if len(self.pairs) else self.kept.shape[1]
        for name in ("log_A_real", "A_imag", "C", "P", "B"):
            parameter = getattr(self, name, None)
            if parameter is not None:
                setattr(self, name, nn.Parameter(parameter.detach()[:, :m].clone()))
        self.kept = torch.arange(m) < self.pairs[:, None]


class Mixing(nn.Module):
    """Position-wise linear map from the remaining columns to the remaining rows.

    The channel of a removed column counts as zero; a removed row keeps its bias, a constant.
    """

    columns: Tensor  # (G,) int64
    rows: Tensor  # (R,) int64

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__()
        h = config.d_model
        self.glu = config.mixing == "glu"
        full = nn.Linear(h, 2 * h if self.glu else h)
        self.register_buffer("columns", torch.tensor(shape.columns, dtype=torch.int64))
        self.register_buffer("rows", torch.tensor(shape.rows, dtype=torch.int64))
        self.bias = full.bias
        self.weight = nn.Parameter(full.weight.detach()[self.stacked_rows()][:, self.columns].clone())

    def stacked_rows(self) -> Tensor:
        """Return the positions of the remaining rows in the full matrix: values, then gates."""
        return torch.cat([self.rows, self.rows + self._h()]) if self.glu else self.rows

    def _h(self) -> int:
        return len(self.bias) // 2 if self.glu else len(self.bias)

    def forward(self, g: Tensor) -> Tensor:
        """Map (batch, T, H), after GELU, to (batch, T, H)."""
        h = g.shape[-1]
        if len(self.columns) < h:
            g = g[..., self.columns]
        z = F.linear(g, self.weight, self.bias[self.stacked_rows()] if len(self.rows) < h else self.bias)
        z = F.glu(z, dim=-1) if self.glu else z
        if len(self.rows) == h:
            return z
        constant = F.glu(self.bias, dim=-1) if self.glu else self.bias
        removed = torch.ones(h, dtype=torch.bool).index_fill(0, self.rows, False)
        everywhere = (constant * removed).expand(*z.shape[:-1], h)
        result: Tensor = everywhere.index_add(-1, self.rows, z)
        return result

    @torch.no_grad()
    def drop_columns(self, channels: list[int], constant: Tensor | None = None) -> None:
        """Remove columns, and add their mean contribution to the bias.

        ``constant`` is the mean of each removed channel after GELU; None stands for zero.
        """
        removed = [self.columns.tolist().index(c) for c in channels]
        if constant is not None:
            self.bias[self.stacked_rows()] += self.weight[:, removed] @ constant.to(self.weight.dtype)
        keep = [i for i in range(len(self.columns)) if i not in set(removed)]
        self.weight = nn.Parameter(self.weight.detach()[:, keep].clone())
        self.columns = self.columns[keep]

    @torch.no_grad()
    def drop_rows(self, channels: list[int], constant: Tensor) -> None:
        """Remove rows; from then on each adds ``constant``, one per channel."""
        h = self._h()
        if self.glu:  # value * sigmoid(0) is the constant
            self.bias[channels] = 2 * constant.to(self.bias.dtype)
            self.bias[[c + h for c in channels]] = 0.0
        else:
            self.bias[channels] = constant.to(self.bias.dtype)
        keep = [i for i, c in enumerate(self.rows.tolist()) if c not in set(channels)]
        stacked = keep + [i + len(self.rows) for i in keep] if self.glu else keep
        self.weight = nn.Parameter(self.weight.detach()[stacked].clone())
        self.rows = self.rows[keep]


class Signals(NamedTuple):
    """The signals of one block, each (batch, T, H)."""

    v: Tensor
    """Input of the SSM."""
    y: Tensor
    """Output of the SSM."""
    g: Tensor
    """Input of the mixing, after GELU."""
    z: Tensor
    """Output of the mixing, added to the residual stream."""
    out: Tensor
    """Output of the block."""


class Block(nn.Module):
    """Norm, SSM, GELU, mixing and residual connection."""

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__()
        h = config.d_model
        self.prenorm = config.prenorm
        self.ssm = SSM(config, shape)
        self.norm: nn.LayerNorm | nn.BatchNorm1d = nn.LayerNorm(h) if config.norm == "layer" else nn.BatchNorm1d(h)
        self.mixing = Mixing(config, shape)
        self.dropout = nn.Dropout(config.dropout)

    def _normalise(self, u: Tensor) -> Tensor:
        """Normalise (batch, T, H); BatchNorm1d expects the channels in the middle."""
        normalised: Tensor
        if isinstance(self.norm, nn.BatchNorm1d):
            normalised = self.norm(u.transpose(1, 2)).transpose(1, 2)
        else:
            normalised = self.norm(u)
        return normalised

    def signals(self, u: Tensor) -> Signals:
        """Return every signal of the block for its input (batch, T, H)."""
        v = self._normalise(u) if self.prenorm else u
        y = self.ssm(v.transpose(1, 2)).transpose(1, 2)
        g = F.gelu(y)
        z = self.mixing(self.dropout(g))
        out = u + self.dropout(z)
        return Signals(v, y, g, z, out if self.prenorm else self._normalise(out))

    def forward(self, u: Tensor) -> Tensor:
        """Map (batch, T, H) to (batch, T, H)."""
        return self.signals(u).out

    def shape(self) -> LayerShape:
        """Return what remains of the layer."""
        as_tuple = [tuple(t.tolist()) for t in (self.ssm.active, self.ssm.pairs, self.mixing.columns, self.mixing.rows)]
        return LayerShape(*as_tuple)


class SSMNetwork(nn.Module):
    """A network that maps normalised input (batch, T, d_input) to logits (batch, d_output).

    Without pooling the logits have the shape (batch, T, d_output).
    """

    def __init__(self, config: Config, mixing_dtype: MixingDtype = "float32", rounding_error: float = 0.0) -> None:
        super().__init__()
        if config.d_state % 2 or config.d_state < 2:
            raise UsageError(f"d_state: {config.d_state}, expected an even number of 2 or more (conjugate pairs)")
        self.config = config
        self.mixing_dtype: MixingDtype = mixing_dtype
        self.rounding_error = rounding_error
        """Largest change of a logit by storing the mixing weights as ``mixing_dtype``. The weights of this network have
        already been rounded to that type."""
        self.encoder = nn.Linear(config.d_input, config.d_model)
        self.blocks = nn.ModuleList(Block(config, shape) for shape in config.shapes())
        self.decoder = nn.Linear(config.d_model, config.d_output)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised input (batch, T, d_input) to logits."""
        u = self.encoder(x)
        for block in self.layers():
            u = block(u)
        return self.decide(u)

    def decide(self, u: Tensor) -> Tensor:
        """Map the output of the last block (batch, T, H) to logits."""
        if self.config.pooling == "mean":
            u = u.mean(dim=1)
        elif self.config.pooling == "last":
            u = u[:, -1]
        logits: Tensor = self.decoder(u)
        return logits

    def layers(self) -> list[Block]:
        """Return the blocks, first to last."""
        return cast("list[Block]", list(self.blocks))

    def ssms(self) -> list[SSM]:
        """Return the SSM of every block, first to last."""
        return [block.ssm for block in self.layers()]

    def active(self) -> tuple[tuple[int, ...], ...]:
        """Return the active channels of every layer, ascending."""
        return tuple(block.shape().active for block in self.layers())

    def present_config(self) -> Config:
        """Return the configuration after pruning; with the parameters, it is enough to rebuild the network."""
        return replace(self.config, layers=tuple(block.shape() for block in self.layers()))
