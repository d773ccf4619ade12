"""LoHa: the change is an entrywise product of two low-rank ones. Hyeon-Woo et al. 2021, arXiv:2108.06098."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of


class LoHa(Adapter):
    """LoHa: two low-rank products, multiplied entry by entry: a rank of up to r² from twice the numbers of one.

    h = W₀x + (α/r)·(B₁A₁ ⊙ B₂A₂)·x, with A₁, A₂ (r, in) and B₁, B₂ (out, r). A₂ starts at zero, so training starts at
    the base. The product of two matrices of rank r has at most rank r²: LoRA needs r²/2 times the numbers for that.

    Each pass builds the dense change, out·in numbers a layer, and keeps it for the backward pass.
    r: rank of each product. alpha: α, the numerator of the scale. Trained: 2·r·(in + out). ValueError for r below 1.
    Source: Hyeon-Woo et al. 2021 (FedPara), arXiv:2108.06098, section 2.2; as LoHa: Yeh et al. 2023, arXiv:2309.14859,
    section 3. File names are those of LyCORIS: hada_w1_a is B₁, hada_w1_b is A₁.
    """

    family = "Hadamard and Kronecker"
    hf_type = "LOHA"
    hf_hyper = {"r": "r", "alpha": "alpha"}

    def __init__(self, layer: nn.Module, r: int = 8, alpha: float = 8):
        super().__init__(layer)
        out_features, in_features = shape_of(layer)
        if r < 1:
            raise ValueError(f"rank r={r} is below 1")
        self.hada_w1_a, self.hada_w1_b = (nn.Parameter(torch.empty(s)) for s in ((out_features, r), (r, in_features)))
        self.hada_w2_a, self.hada_w2_b = (nn.Parameter(torch.zeros(s)) for s in ((out_features, r), (r, in_features)))
        for factor in (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        self.scaling = alpha / r

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 8, **_) -> int:
        """2·r·(in + out)"""
        return 2 * r * (in_features + out_features)

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        change = (self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b)
        return self.scaling * (x @ change.T)
