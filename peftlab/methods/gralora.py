"""GraLoRA: low-rank adaptation block by block. Jung et al. 2025, arXiv:2505.20355."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of


class GraLoRA(Adapter):
    """GraLoRA (granular low-rank adaptation): a k × k grid of blocks, each with a LoRA of rank r/k of its own.

    h = W₀x + s·ΔW·x, the block of ΔW in row i and column j being Bᵢⱼ·Aᵢⱼ, with Aᵢⱼ (r/k, in/k), Bᵢⱼ (out/k, r/k) and
    s = α/(r + r_h). As many numbers as LoRA's and up to k times the rank, k·r; and an outlier in x reaches only the
    blocks of its own column. B starts at zero, so training starts at the base.

    A is kept as (k, in/k, r), Aᵢⱼ being columns i·r/k … of A[j]; B as (k, r, out/k), Bᵢⱼ being rows j·r/k … of B[i].
    r: rank of the blocks of a row together. k: divides r, in and out. hybrid_r: r_h, the rank of a plain LoRA of the
    whole layer beside the blocks, 0 for none. alpha: α. dropout: probability, on the adapter's input only.
    Trained: (r + r_h)·(in + out). Raises ValueError for a rank below 1 or a k that does not divide.
    Source: Jung et al. 2025, "GraLoRA: Granular low-rank adaptation", arXiv:2505.20355.
    """

    family = "low-rank"
    hf_type = "GRALORA"
    hf_hyper = {"r": "r", "k": "gralora_k", "hybrid_r": "hybrid_r", "alpha": "alpha", "dropout": "gralora_dropout"}
    hf_params = {f"gralora_{M}_general": f"gralora_{M}_general.weight" for M in "AB"}

    def __init__(
        self, layer: nn.Module, r: int = 32, k: int = 2, hybrid_r: int = 0, alpha: float = 64, dropout: float = 0.0
    ):  # fmt: skip
        super().__init__(layer)
        out_features, in_features = shape_of(layer)
        if r < 1 or hybrid_r < 0:
            raise ValueError(f"r={r} must be at least 1, and hybrid_r={hybrid_r} at least 0")
        if k < 1 or any(n % k for n in (r, in_features, out_features)):
            raise ValueError(f"k={k} must divide r={r} and the layer's {out_features}×{in_features}; the divisors of "
                             f"{math.gcd(r, in_features, out_features)} do")  # fmt: skip
        self.gralora_A = nn.Parameter(torch.empty(k, in_features // k, r))
        self.gralora_B = nn.Parameter(torch.zeros(k, r, out_features // k))
        edge = math.sqrt(k / in_features)  # as LoRA's A, for in/k inputs
        nn.init.uniform_(self.gralora_A, -edge, edge)
        if hybrid_r:
            self.gralora_A_general = nn.Parameter(torch.empty(hybrid_r, in_features))
            self.gralora_B_general = nn.Parameter(torch.zeros(out_features, hybrid_r))
            nn.init.kaiming_uniform_(self.gralora_A_general, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)
        self.k, self.hybrid_r, self.scaling = k, hybrid_r, alpha / (r + hybrid_r)

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 32, hybrid_r: int = 0, **_) -> int:
        """(r + r_h)·(in + out)"""
        return (r + hybrid_r) * (in_features + out_features)

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        x = self.dropout(x)
        pieces = x.unflatten(-1, (self.k, -1))  # (..., j, in/k)
        z = torch.einsum("...jn,jnr->...jr", pieces, self.gralora_A).unflatten(-1, (self.k, -1))  # (..., j, i, r/k)
        z = z.transpose(-3, -2).flatten(-2)  # (..., i, r): for each row of blocks what all columns give it
        y = torch.einsum("...ir,irm->...im", z, self.gralora_B).flatten(-2)
        if self.hybrid_r:
            y = y + x @ self.gralora_A_general.T @ self.gralora_B_general.T
        return self.scaling * y
