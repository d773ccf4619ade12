"""qGOFT: Givens rotations, relaxed to any 2 × 2 matrices. Ma et al. 2024, arXiv:2404.04316."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._givens import givens


class QGOFT(Adapter):
    """qGOFT (quasi-Givens OFT): GOFT with a free 2 × 2 matrix for each rotation, which may stretch and bend a little.

    h = W₀Rᵀx + b with R = P₁P₂… as in GOFT, of d − 1 matrices G̃ = (α, β), d = in, which start at I, so that training
    starts at the base. The term λ·Σ⟨α, β⟩² of the loss, over all layers, keeps their columns at nearly right angles.

    penalty_weight: λ. Trained: 4·(in − 1). Raises ValueError for a layer with one input, or a negative λ.
    Source: Ma et al. 2024, arXiv:2404.04316, section 4.2; λ is tuned there, 0.01 is our default.
    """

    family = "orthogonal"

    def __init__(self, layer: nn.Module, penalty_weight: float = 0.01):
        super().__init__(layer)
        d = shape_of(layer)[1]
        if d < 2 or penalty_weight < 0:
            raise ValueError(f"needs two inputs or more, not {d}, and penalty_weight={penalty_weight} not below 0")
        self.G = nn.Parameter(torch.eye(2).repeat(d - 1, 1, 1))
        self.penalty_weight = penalty_weight

    @staticmethod
    def size(out_features: int, in_features: int, **_) -> int:
        """4·(in − 1)"""
        return 4 * (in_features - 1)

    def penalty(self) -> Tensor:
        alpha, beta = self.G.unbind(-1)  # the columns, (d − 1, 2) each
        return self.penalty_weight * (alpha * beta).sum(-1).square().sum()

    def forward(self, f, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return f(givens(x.to(self.G.dtype), self.G).to(x.dtype))
