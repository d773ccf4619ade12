"""LoReFT: edit hidden states in a low-rank subspace. Wu et al. 2024, arXiv:2404.03592."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import wide
from ._reft import begin, edit_block, plan


class LoReFT(Adapter):
    """LoReFT: no weight is changed; what a block gives is moved inside of a subspace of few dimensions.

    Φ(h) = h + Rᵀ(W·h + b − R·h), with R (r, D) of orthonormal rows, W (r, D) and b (r,): the part of h in R's
    subspace, R·h, is replaced by W·h + b, and what is orthogonal to it stays. W starts as R and b at zero, so that
    training starts at the base (the paper's code draws W at random). R is kept free, and its rows are made orthonormal
    in each pass: R ← L⁻¹·R with L·Lᵀ = R·Rᵀ (Gram and Schmidt, by Cholesky), which leaves orthonormal ones as they are.

    Edited are the first positions of the text, in use as in training, and for models that write nothing the last;
    padding does not count. In an encoder–decoder, the encoder's blocks. Cannot be merged.
    r: 1…D. first, last: how many positions; first=None: all. Trained: 2·r·D + r a block.
    Raises ValueError for an r or positions out of range, and for last positions in a model that writes.
    Source: Wu et al. 2024, arXiv:2404.03592, section 3.
    """

    family = "representation"
    targets, mixes = "all-blocks", False
    plan, forward = classmethod(plan), edit_block

    def __init__(self, layer: nn.Module, r: int = 8, first: int | None = 4, last: int = 0):
        super().__init__(layer)
        D = begin(self, r, first, last)
        self.R = nn.Parameter(torch.empty(r, D))
        if not self.R.is_meta:
            nn.init.orthogonal_(self.R)
        self.W, self.b = nn.Parameter(self.rotation().detach().clone()), nn.Parameter(torch.zeros(r))

    def expected(self) -> int:
        """2·r·D + r a block, with D the width of the hidden states"""
        r, D = self.R.shape
        return 2 * r * D + r

    def rotation(self) -> Tensor:
        """R with orthonormal rows (r, D)."""
        if self.R.is_meta:
            return self.R
        R = wide(self.R)
        return torch.linalg.solve_triangular(torch.linalg.cholesky(R @ R.T), R, upper=False).to(self.R.dtype)

    def edit(self, h: Tensor) -> Tensor:  # (..., D) -> (..., D)
        R = self.rotation()
        return (h @ (self.W - R).T + self.b) @ R  # (W − R)·h: exactly nothing at the start
