"""Daubechies' wavelets, computed, and the inverse transform in two dimensions, for WaveFT. arXiv:2505.12532."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


@cache
def daubechies(N: int) -> tuple[float, ...]:
    """The 2N numbers of the low-pass filter dbN; db1 is Haar's (1, 1)/√2.

    The polynomial with these coefficients, highest power first, is √2·((1 + z)/2)ᴺ·Q(z), where on the unit circle
    |Q|² = P(y) = Σₖ C(N−1+k, k)·yᵏ, k < N, at y = sin²(ω/2) = (2 − z − 1/z)/4. Each zero of P gives two zeros z and 1/z
    of Q(z)·Q(1/z); Q takes the one inside of the unit circle, so that the energy comes early.
    Source: Daubechies 1988, doi:10.1002/cpa.3160410705, section 4.
    """
    P = [math.comb(N - 1 + k, k) for k in range(N)]
    companion = torch.zeros(N - 1, N - 1, dtype=torch.double, device="cpu")  # its eigenvalues are the zeros of P
    if N > 1:
        companion.diagonal(-1).fill_(1.0)
        companion[:, -1] = -torch.tensor(P[:-1], dtype=torch.double, device="cpu") / P[-1]
    filter_ = torch.tensor([1.0 + 0j], dtype=torch.cdouble, device="cpu")
    for y in torch.linalg.eigvals(companion).tolist() if N > 1 else []:
        half = 1 - 2 * y
        z = half + (half * half - 1) ** 0.5
        filter_ = _times(filter_, z if abs(z) < 1 else 1 / z)
    for _ in range(N):
        filter_ = _times(filter_, -1.0)
    return tuple((filter_.real * math.sqrt(2) / filter_.real.sum()).tolist())


def _times(polynomial: Tensor, zero: complex) -> Tensor:
    """The polynomial times (z − zero), highest power first."""
    nought = polynomial.new_zeros(1)
    return torch.cat([polynomial, nought]) - zero * torch.cat([nought, polynomial])


def upsampled(low: Tensor, high: Tensor, h: tuple[float, ...]) -> Tensor:
    """One step of the inverse transform along the last dimension: (a, n) twice -> (a, 2·n − len(h) + 2).

    y[t] = Σₖ low[k]·h[t − 2k] + high[k]·g[t − 2k], g[t] = (−1)ᵗ·h[−1 − t], without the ends, where terms are missing.
    Even t use the even numbers of both filters, odd t the odd ones: for t = 2i + p and k = i − m these are h[2m + p].
    """
    g, N = [-number if t % 2 else number for t, number in enumerate(reversed(h))], len(h) // 2
    ways: list[Tensor] = []
    for p in (0, 1):
        y = low.new_zeros(())
        for m in range(N):
            here = slice(N - 1 - m, low.shape[1] - m)
            y = y + h[2 * m + p] * low[:, here] + g[2 * m + p] * high[:, here]
        ways.append(y)
    return torch.stack(ways, -1).flatten(-2)


def inverse(S: Tensor, h: tuple[float, ...]) -> Tensor:
    """The matrix with the wavelet coefficients S (2a, 2b), whose quarters A, H, V, D are low and high of both ways."""
    (A, H), (V, D) = (half.chunk(2, 1) for half in S.chunk(2, 0))
    rows = upsampled(A, V, h), upsampled(H, D, h)  # HF PEFT has V, high along the columns, below A and not beside it
    return upsampled(rows[0].T, rows[1].T, h).T
