"""The filters of Daubechies' wavelets and of symlets, computed, for WaveFT. arXiv:2505.12532."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor


@cache
def low_pass(name: str) -> tuple[float, ...]:
    """The 2N numbers of the low-pass filter "db1" … "db10" or "sym2" … "sym10"; db1 is Haar's (1, 1)/√2.

    The polynomial with these coefficients, highest power first, is √2·((1 + z)/2)ᴺ·Q(z), where on the unit circle
    |Q|² = P(y) = Σₖ C(N−1+k, k)·yᵏ, k < N, at y = sin²(ω/2) = (2 − z − 1/z)/4. Each zero of P gives two zeros z and 1/z
    of Q(z)·Q(1/z). dbN takes the one inside of the unit circle, so that the energy comes early; symN those whose phase
    bends least from a straight line, so that the filter is nearly symmetric. Of symN and its mirror image: the usual.
    Source: Daubechies 1988, doi:10.1002/cpa.3160410705, section 4; symN: Daubechies 1992, "Ten lectures on wavelets".
    """
    if not re.fullmatch("db([1-9]|10)|sym([2-9]|10)", name):
        raise ValueError(f"wavelet={name!r} is none of db1, … db10, sym2, … sym10: others are not computed here")
    kind, N = name.rstrip("0123456789"), int(name.lstrip("dbsym"))
    inside, ways = zeros(N), [(False,) * N]
    if kind == "sym":
        turned = N % 2 == 0 and N > 2
        ways = [(turned, *rest) for rest in itertools.product((False, True), repeat=len(inside) - 1)]
    found = [polynomial(1 / z if out else z for z, out in zip(inside, way, strict=False)) for way in ways]
    filter_ = min(found, key=bend)
    for _ in range(N):
        filter_ = _times(filter_, -1.0)
    return tuple((filter_.real * math.sqrt(2) / filter_.real.sum()).tolist())


def zeros(N: int) -> list[complex]:
    """Those of Q inside of the unit circle, of conjugate pairs one, the nearest to it first."""
    if N == 1:
        return []
    P = [math.comb(N - 1 + k, k) for k in range(N)]
    companion = torch.zeros(N - 1, N - 1, dtype=torch.double, device="cpu")  # its eigenvalues are the zeros of P
    companion.diagonal(-1).fill_(1.0)
    companion[:, -1] = -torch.tensor(P[:-1], dtype=torch.double, device="cpu") / P[-1]
    half = [1 - 2 * y for y in torch.linalg.eigvals(companion).tolist()]
    found = [min((h + s * (h * h - 1) ** 0.5 for s in (1, -1)), key=abs) for h in half]
    return sorted((z for z in found if z.imag > -1e-9), key=abs, reverse=True)


def polynomial(zeros: Iterable[complex]) -> Tensor:
    """Q with these zeros, and the conjugates of those that are not real."""
    Q = torch.tensor([1.0 + 0j], dtype=torch.cdouble, device="cpu")
    for z in zeros:
        Q = _times(Q, z)
        Q = Q if abs(z.imag) < 1e-9 else _times(Q, z.conjugate())
    return Q


def bend(Q: Tensor) -> float:
    """How far the phase of Q on the unit circle is from the straight line between its ends, at most."""
    values = torch.fft.fft(Q, 1024)[:513]
    phase = (values[1:] / values[:-1]).angle().cumsum(0)
    line = phase[-1] * torch.arange(1, 513, device="cpu") / 512
    return (phase - line).abs().max().item()


def _times(polynomial: Tensor, zero: complex) -> Tensor:
    """The polynomial times (z − zero), highest power first."""
    nought = polynomial.new_zeros(1)
    return torch.cat([polynomial, nought]) - zero * torch.cat([nought, polynomial])
