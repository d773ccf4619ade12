"""GOFT: rotate a layer's input by Givens rotations. Ma et al. 2024, arXiv:2404.04316."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._givens import givens


class GOFT(Adapter):
    """GOFT (Givens OFT): the input is rotated in d − 1 planes of two features each, d = in: one angle a plane.

    h = W₀Rᵀx + b with R = P₁P₂…, where P₁ turns the pairs of neighbours, P₂ pairs of their firsts, and so on: log₂ d
    steps. Each block of a pair is G = (cos θ, −sin θ; sin θ, cos θ). θ starts at 0, so training starts at the base.
    R can take any one vector to any other of its length (theorem 4.1 there); among all rotations, which have d(d−1)/2
    numbers, those of this form are few.

    Trained: in − 1. Raises ValueError for a layer with one input.
    Source: Ma et al. 2024, arXiv:2404.04316, section 4.1.
    """

    family = "orthogonal"

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        d = shape_of(layer)[1]
        if d < 2:
            raise ValueError("one input cannot be rotated; choose other targets")
        self.theta = nn.Parameter(torch.zeros(d - 1))

    @staticmethod
    def size(out_features: int, in_features: int, **_) -> int:
        """in − 1"""
        return in_features - 1

    def matrices(self) -> Tensor:  # (d − 1, 2, 2)
        c, s = self.theta.cos(), self.theta.sin()
        return torch.stack([c, -s, s, c], -1).unflatten(-1, (2, 2))

    def forward(self, f, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return f(givens(x.to(self.theta.dtype), self.matrices()).to(x.dtype))
