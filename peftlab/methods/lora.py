"""LoRA: low-rank adaptation. Hu et al. 2021, arXiv:2106.09685."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of


class LoRA(Adapter):
    """LoRA: the change of a frozen weight is a product of two thin matrices.

    h = W₀x + (α/r)·B·A·x, with A (r, in) drawn at random and B (out, r) zero, so that training starts at the base.
    With `rslora` the scale is α/√r, which keeps the size of the update the same at every rank.

    r: rank, 1 to min(in, out). alpha: α, the numerator of the scale. dropout: probability, on the adapter's input only.
    Trained: r·(in + out) parameters a layer. Raises ValueError for a rank or a dropout out of range.
    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; rslora: Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2.
    """

    hf_type = "LORA"
    hf_hyper = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora"}
    hf_params = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    def __init__(self, layer: nn.Module, r: int = 8, alpha: float = 16, dropout: float = 0.0, rslora: bool = False):
        super().__init__(layer)
        out_features, in_features = shape_of(layer)
        if not 1 <= r <= min(in_features, out_features):
            raise ValueError(f"rank r={r} is not in 1…{min(in_features, out_features)}, the layer is "
                             f"{out_features}×{in_features}: a larger product is no longer low-rank; take a smaller r "
                             "(rank_pattern: for this layer alone) or other targets")  # fmt: skip
        self.lora_A = nn.Parameter(torch.empty(r, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear: uniform in ±1/√in
        self.dropout = nn.Dropout(dropout)
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 8, **_) -> int:
        """r·(in + out)"""
        return r * (in_features + out_features)

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return self.scaling * (self.dropout(x) @ self.lora_A.T @ self.lora_B.T)

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """The same Δ as matrices, unless dropout gives the adapter another input than the layer."""
        dropping = self.training and self.dropout.p > 0
        return None if dropping else (self.lora_A, self.lora_B, self.scaling)
