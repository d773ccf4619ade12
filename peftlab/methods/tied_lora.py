"""Tied-LoRA: one pair of factors for all layers. Renduchintala et al. 2023, arXiv:2311.09578."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._shared import agree, keep


class TiedLoRA(Adapter):
    """Tied-LoRA: LoRA, whose two factors are the same in all layers, with two vectors of scales for each layer.

    h = W₀x + Λ_v·B·Λ_u·A·x, with A (r, in) drawn at random and B (out, r) zero, so that training starts at the base;
    Λ_u = diag(u) and Λ_v = diag(v), u (r,) and v (out,) from ones. A and B are trained, and tied among all layers of
    the same shape; u and v are trained in each. This is the paper's configuration with all four trained; with A and B
    random and frozen it is VeRA.

    r: rank, 1 to min(in, out), one for all layers. Trained: out + r a layer, and r·(in + out) once for each shape.
    Raises ValueError for a rank out of range. Source: Renduchintala et al. 2023, arXiv:2311.09578.
    """

    family = "shared and vector-based"

    def __init__(self, layer: nn.Module, r: int = 8):
        super().__init__(layer)
        out_features, in_features = shape_of(layer)
        if not 1 <= r <= min(out_features, in_features):
            raise ValueError(f"rank r={r} is not in 1…{min(out_features, in_features)}")
        self.r = r
        self.A = nn.Parameter(torch.empty(r, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.u, self.v = nn.Parameter(torch.ones(r)), nn.Parameter(torch.ones(out_features))

    @classmethod
    def share(cls, made) -> None:
        agree(made, "r")
        for shape in {shape_of(adapter.layer) for adapter in made.values()}:
            alike = {path: adapter for path, adapter in made.items() if shape_of(adapter.layer) == shape}
            keeper = alike[min(alike)]
            for name, factor in (("A", keeper.A), ("B", keeper.B)):
                keep(alike, name, factor)

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 8, **_) -> int:
        """out + r, without the r·(in + out) shared ones"""
        return out_features + r

    def expected(self) -> int:
        return super().expected() + ("A" in self._parameters) * self.r * sum(shape_of(self.layer))

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return self.v * (self.u * (x @ self.A.to(x).T) @ self.B.to(x).T)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.u[:, None] * self.A, self.v[:, None] * self.B, 1.0
