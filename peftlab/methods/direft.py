"""DiReFT: edit hidden states by a low-rank map. Wu et al. 2024, arXiv:2404.03592."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ._reft import begin, edit_block, plan


class DiReFT(Adapter):
    """DiReFT: LoReFT without its two constraints, orthonormal rows and the difference; cheaper, and a little worse.

    Φ(h) = h + W₂ᵀ(W₁·h + b), with W₁ (r, D) drawn at random, W₂ (r, D) zero, so that training starts at the base, and
    b (r,). It is a LoRA on hidden states instead of weights, at chosen positions. Positions, r: as in `LoReFT`.

    Trained: 2·r·D + r a block. Cannot be merged. Raises ValueError for an r or positions out of range.
    Source: Wu et al. 2024, arXiv:2404.03592, section 3.
    """

    family = "representation"
    targets, mixes = "all-blocks", False
    plan, forward = classmethod(plan), edit_block

    def __init__(self, layer: nn.Module, r: int = 8, first: int | None = 4, last: int = 0):
        super().__init__(layer)
        D = begin(self, r, first, last)
        self.W1, self.W2 = nn.Parameter(torch.empty(r, D)), nn.Parameter(torch.zeros(r, D))
        self.b = nn.Parameter(torch.zeros(r))
        nn.init.kaiming_uniform_(self.W1, a=math.sqrt(5))

    def expected(self) -> int:
        """2·r·D + r a block, with D the width of the hidden states"""
        r, D = self.W1.shape
        return 2 * r * D + r

    def edit(self, h: Tensor) -> Tensor:  # (..., D) -> (..., D)
        return (h @ self.W1.T + self.b) @ self.W2
