"""The inverse wavelet transform in two dimensions, for WaveFT. arXiv:2505.12532."""

from __future__ import annotations

import torch
from torch import Tensor


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
