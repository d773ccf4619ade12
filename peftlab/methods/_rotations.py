"""What OFT (arXiv:2306.07280) and its kin share: rotations from skew-symmetric matrices, and blocks of features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers import wide


def skew(entries: Tensor, b: int) -> Tensor:
    """(..., b(b−1)/2), the entries above the diagonal row by row -> Q (..., b, b) with Qᵀ = −Q."""
    rows, columns = torch.triu_indices(b, b, 1, device=entries.device)
    Q = entries.new_zeros(*entries.shape[:-1], b, b)
    Q[..., rows, columns] = entries
    return Q - Q.mT


def eye_of(Q: Tensor) -> Tensor:
    """I of a square matrix's size, dtype and device."""
    return torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)


def cayley(Q: Tensor) -> Tensor:
    """(I + Q)(I − Q)⁻¹: exactly orthogonal, with determinant 1. Any rotation that turns no plane by 180° is one."""
    eye = eye_of(wide(Q))
    return torch.linalg.solve(eye - Q, eye + Q, left=False).to(Q.dtype)


def neumann(Q: Tensor, terms: int) -> Tensor:
    """I + 2Q + … + 2Qᵗ⁻² + Qᵗ⁻¹ = (I + Q)(I + Q + … + Qᵗ⁻²): Cayley's rotation with the inverse cut off after t terms.

    As HF PEFT counts them: 2 terms are I + 2Q, and 3 are the same as 4 (Q² would be the last, it adds Q³).
    """
    eye = eye_of(Q)
    if terms == 2:
        return eye + 2 * Q
    series = eye + Q
    for _ in range(max(terms, 4) - 3):  # Horner's rule
        series = eye + Q @ series
    return series + Q @ series


def checked_terms(terms: int) -> int:
    """The number of terms of `neumann`; ValueError if it leaves nothing to train."""
    if terms < 2:
        raise ValueError(f"num_cayley_neumann_terms={terms} leaves I alone and nothing to train; take 2 or more")
    return terms


def blockwise(x: Tensor, R: Tensor) -> Tensor:
    """x·R with R block-diagonal: x (..., n·b), blocks (n, b, b), or (1, b, b) for n equal ones."""
    pieces = x.unflatten(-1, (-1, R.shape[-1]))
    return torch.einsum("...nk,nkc->...nc", pieces, R.expand(pieces.shape[-2], -1, -1)).flatten(-2)


def along(x: Tensor, u: Tensor) -> Tensor:
    """The part of x along u, block by block: (x·û)û with û = u / ‖u‖; x (..., n·b), u (n, b)."""
    unit = nn.functional.normalize(u, dim=-1)
    pieces = x.unflatten(-1, u.shape)
    return ((pieces * unit).sum(-1, keepdim=True) * unit).flatten(-2)
