"""NoReFT: LoReFT whose rows need not be orthonormal. Wu et al. 2024, arXiv:2404.03592."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ._reft import begin, edit_block, plan


class NoReFT(Adapter):
    """NoReFT: LoReFT without the constraint on its rows, but with the difference; DiReFT drops that as well.

    Φ(h) = h + W₂ᵀ(W₁·h + b − W₂·h), with W₁ and W₂ (r, D) drawn alike and b (r,) zero, so that training starts at the
    base (the paper's code draws W₁ apart). With orthonormal rows in W₂ it is LoReFT, which sets W₂·h to W₁·h + b; else
    W₂·h goes a way G = W₂·W₂ᵀ towards it, too far or too short. It saves LoReFT's factorisation in each pass.

    r, first, last: as in `LoReFT`. Trained: 2·r·D + r a block. Cannot be merged.
    Raises ValueError for an r or positions out of range, and for last positions in a model that writes.
    Source: Wu et al. 2024, arXiv:2404.03592; the equation: its code, pyreft.
    """

    family = "representation"
    targets, mixes = "all-blocks", False
    plan, forward = classmethod(plan), edit_block

    def __init__(self, layer: nn.Module, r: int = 8, first: int | None = 4, last: int = 0):
        super().__init__(layer)
        D = begin(self, r, first, last)
        self.W2 = nn.Parameter(torch.empty(r, D))
        nn.init.kaiming_uniform_(self.W2, a=math.sqrt(5))
        self.W1, self.b = nn.Parameter(self.W2.detach().clone()), nn.Parameter(torch.zeros(r))

    def expected(self) -> int:
        """2·r·D + r a block, with D the width of the hidden states"""
        r, D = self.W1.shape
        return 2 * r * D + r

    def edit(self, h: Tensor) -> Tensor:  # (..., D) -> (..., D)
        return (h @ (self.W1 - self.W2).T + self.b) @ self.W2
