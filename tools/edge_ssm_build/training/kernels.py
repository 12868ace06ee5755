"""The convolution kernels of S4D and S4 in torch, and the convolution itself. All sums run over conjugate pairs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from edge_ssm.errors import UsageError


def _legs(d_state: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (A, P, B) of HiPPO-LegS in the basis that diagonalises A + P P^T, each (N/2,) complex128.

    S4 paper (arXiv 2111.00396), theorem 1 and appendix C.1: A + P P^T = -1/2 I + skew is normal.
    """
    n = torch.arange(d_state, dtype=torch.float64)
    B = torch.sqrt(2 * n + 1)
    P = B / math.sqrt(2)
    hippo = -(torch.outer(B, B).tril(-1) + torch.diag(n + 1))
    skew = hippo + torch.outer(P, P) + 0.5 * torch.eye(d_state, dtype=torch.float64)
    imaginary, V = torch.linalg.eigh(-1j * skew.to(torch.complex128))
    upper = imaginary > 0
    V = V[:, upper].conj().T
    A = torch.complex(torch.full_like(imaginary[upper], -0.5), imaginary[upper])
    return A, V @ P.to(torch.complex128), V @ B.to(torch.complex128)


def initial_A(init: str, d_state: int) -> Tensor:
    """Return the diagonal of S4D-Lin, -Inv or -LegS, shape (N/2,), complex128 (S4D paper, section 4)."""
    n = torch.arange(d_state // 2, dtype=torch.float64)
    if init == "lin":  # eq. 9
        return torch.complex(torch.full_like(n, -0.5), math.pi * n)
    if init == "inv":  # eq. 8
        return torch.complex(torch.full_like(n, -0.5), d_state / math.pi * (d_state / (2 * n + 1) - 1))
    return _legs(d_state)[0]  # eq. 6 and 7


def initial_rank_one(init: str, d_state: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the initial (A, P, B) of a diagonal-plus-rank-one layer, each (N/2,) complex128.

    Raises
    ------
    UsageError
        If ``init`` is not "legs": only HiPPO-LegS is implemented.
    """
    if init != "legs":
        raise UsageError(f"init {init!r}: the s4 kernel starts from legs only (HiPPO-LegS)")
    return _legs(d_state)


def diagonal_kernel(log_Abar: Tensor, Cbar: Tensor, length: int) -> Tensor:
    """Return the kernel of a diagonal layer, K[l] = 2 Re(sum_m Cbar_m Abar_m^l) (S4D paper, eq. 4).

    With l = a s + b, the sum is a product of two small matrices, (s, M) and (M, s), which avoids an array of shape
    (K, M, length).

    Parameters
    ----------
    log_Abar, Cbar
        Shape (K, M), complex.
    length
        Number of samples.

    Returns
    -------
    Tensor
        Shape (K, length).
    """
    s = math.isqrt(length - 1) + 1
    fine = torch.exp(log_Abar[..., None] * torch.arange(s, device=log_Abar.device))
    coarse = torch.exp(log_Abar[:, None] * (s * torch.arange(-(-length // s), device=log_Abar.device))[:, None])
    blocks = (coarse * Cbar[:, None]) @ fine
    return 2 * blocks.real.reshape(len(log_Abar), -1)[:, :length]


def rank_one_kernel(A: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    """Return the bilinear kernel of x' = (diag(A) - P P*) x + B u over exactly ``length`` samples.

    ``C`` is S4's truncated one, C (I - Abar^length). The generating function is evaluated at the roots of unity z
    (S4 paper, appendix C.3), with 2 / (1 + z) multiplied through, so that z = -1 needs no special case:

        e_n = 1 / (1 - z - (1 + z) dt A_n / 2),  <x, y> = sum_n x_n y_n e_n over both halves of the spectrum
        K(z) = dt (<C, B> - w <C, P> <P*, B> / (1 + w <P*, P>)),  w = (1 + z) dt / 2

    Parameters
    ----------
    A, P, B, C
        Shape (K, M), complex128: near a resonance single precision would lose four digits.
    dt
        Shape (K,), float64.
    length
        Number of samples.

    Returns
    -------
    Tensor
        Shape (K, length), float64.
    """
    z = torch.exp(-2j * math.pi / length * torch.arange(length // 2 + 1, dtype=torch.float64, device=A.device))
    half = dt[:, None, None] / 2
    both = torch.cat([A, A.conj()], dim=1)
    e = 1 / (1 - z - (1 + z) * half * both[..., None])
    terms = torch.stack([C * B, C * P, P.conj() * B, P.conj() * P], dim=1)
    CB, CP, PB, PP = (torch.cat([terms, terms.conj()], dim=2) @ e).unbind(dim=1)
    w = (1 + z) * half[..., 0]
    spectrum = dt[:, None] * (CB - w * CP * PB / (1 + w * PP))
    kernel: Tensor = torch.fft.irfft(spectrum, n=length)
    return kernel


class _Convolution(torch.autograd.Function):
    """Causal convolution by FFT. The backward pass uses real transforms, which autograd would not."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, kernel: Tensor) -> Tensor:
        length = u.shape[-1]
        U, K = torch.fft.rfft(u, n=2 * length), torch.fft.rfft(kernel, n=2 * length)
        ctx.save_for_backward(U, K)
        ctx.length = length
        convolved: Tensor = torch.fft.irfft(U * K, n=2 * length)[..., :length]
        return convolved

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (U, K), length = ctx.saved_tensors, ctx.length
        G = torch.fft.rfft(gradient, n=2 * length)
        u = torch.fft.irfft(G * K.conj(), n=2 * length)[..., :length]
        kernel = torch.fft.irfft((G * U.conj()).sum(dim=0), n=2 * length)[..., :length]
        return u, kernel


def convolve(u: Tensor, kernel: Tensor) -> Tensor:
    """Convolve each channel with its own causal kernel: (batch, K, T), (K, T) -> (batch, K, T)."""
    result: Tensor = _Convolution.apply(u, kernel)
    return result
