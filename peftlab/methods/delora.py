"""DeLoRA: LoRA with a bound on how far it goes. Bini et al. 2025, arXiv:2503.18225."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of, weight_of


class DeLoRA(Adapter):
    """DeLoRA (decoupled low-rank adaptation): LoRA whose direction and strength are trained apart.

    h = W₀x + ΔW·x, ΔW = (λ/r)·Σⱼ bⱼ·(aⱼ ⊙ w)ᵀ / (‖bⱼ‖·‖aⱼ‖), with aⱼ the rows of A (r, in), bⱼ the columns of
    B (out, r), w (in,) the norms of W₀'s columns, and one strength λ a layer. Each of the r terms has the norm λ/r
    before w scales it, however long training makes aⱼ and bⱼ, so that ‖ΔW·diag(w)⁻¹‖ ≤ λ.

    B starts at zero, and so training starts at the base; but the first step that moves bⱼ further than the floor of
    10⁻⁴ brings its term to full strength, whatever the learning rate. Both are HF PEFT's. It reads W₀ once, when it is
    made; w stays with the adapter, and in its file.
    r: number of terms. strength: λ at the start. dropout: probability, on the adapter's input only.
    Trained: r·(in + out) + 1. Raises ValueError for r below 1 or a dropout out of range.
    Source: Bini et al. 2025, "Decoupling angles and strength in low-rank adaptation", arXiv:2503.18225.
    """

    family = "low-rank"
    hf_type = "DELORA"
    hf_hyper = {"r": "r", "strength": "delora_lambda", "dropout": "module_dropout"}
    hf_patterns = {"r": "rank_pattern", "strength": "lambda_pattern"}

    def __init__(self, layer: nn.Module, r: int = 8, strength: float = 15, dropout: float = 0.0):
        super().__init__(layer)
        out_features, in_features = shape_of(layer)
        if r < 1:
            raise ValueError(f"rank r={r} is below 1")
        self.delora_A = nn.Parameter(torch.empty(r, in_features))
        self.delora_B = nn.Parameter(torch.zeros(out_features, r))
        self.delora_lambda = nn.Parameter(torch.full((1,), float(strength)))
        nn.init.kaiming_uniform_(self.delora_A, a=math.sqrt(5))
        self.register_buffer("delora_w_norm", weight_of(layer).detach().float().norm(dim=0))
        self.dropout = nn.Dropout(dropout)

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 8, **_) -> int:
        """r·(in + out) + 1"""
        return r * (in_features + out_features) + 1

    def scales(self) -> Tensor:
        """(λ/r) / (‖bⱼ‖·‖aⱼ‖), (r,); shorter vectors than 10⁻⁴ count as that long."""
        a, b = (t.norm(dim=dim).clamp(min=1e-4) for t, dim in ((self.delora_A, 1), (self.delora_B, 0)))
        return self.delora_lambda / len(self.delora_A) / (a * b)

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return (self.dropout(x) * self.delora_w_norm) @ self.delora_A.T * self.scales() @ self.delora_B.T

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """The same Δ as matrices, unless dropout gives the adapter another input than the layer."""
        dropping = self.training and self.dropout.p > 0
        return None if dropping else (self.delora_A * self.delora_w_norm, self.delora_B * self.scales(), 1.0)
