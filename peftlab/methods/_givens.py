"""A product of d − 1 Givens matrices, in log₂ d steps. Ma et al. 2024, arXiv:2404.04316, section 4.1."""

from __future__ import annotations

import torch
from torch import Tensor


def givens(x: Tensor, G: Tensor) -> Tensor:
    """x·P₁P₂…: x (..., d), G (d − 1, 2, 2) -> (..., d).

    P₁ takes the pairs (0, 1), (2, 3) …, each to its product with a 2 × 2 matrix; P₂ the pairs (0, 2), (4, 6) … of the
    first ones, and so on (equation 3), until every feature can reach feature 0. One that is left over waits a step.
    """
    n = x.shape[-1] // 2
    if n == 0:
        return x
    first, second = torch.einsum("...nk,nkc->...nc", x[..., : 2 * n].unflatten(-1, (n, 2)), G[:n]).unbind(-1)
    first = givens(torch.cat([first, x[..., 2 * n :]], -1), G[n:])
    return torch.cat([torch.stack([first[..., :n], second], -1).flatten(-2), first[..., n:]], -1)
