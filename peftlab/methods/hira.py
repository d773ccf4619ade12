"""HiRA: the frozen weight, multiplied entry by entry by a low-rank matrix. Huang et al. 2025, ICLR."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of, weight_of


class HiRA(Adapter):
    """HiRA: a change of high rank from low-rank factors, because the frozen weight lends it its own.

    h = W₀x + (W₀ ⊙ BA)·x, with A (r, in) drawn at random and B (out, r) zero. The rank of W₀ ⊙ BA is at most
    rank(W₀)·r, and so can be full. A weight that is zero stays zero.

    Each pass reads W₀, dense: on a base in four bits that is one unpacked copy of a layer at a time, kept for the
    backward pass, which takes away much of what the packing saved. dropout: probability, on the adapter's input only.
    Trained: r·(in + out). Raises ValueError for r below 1 or a dropout out of range.
    Source: Huang et al. 2025, "HiRA: Parameter-efficient Hadamard high-rank adaptation for large language models",
    ICLR 2025, OpenReview TwJrTz9cRS, section 3.2.
    """

    family = "Hadamard and Kronecker"
    hf_type = "HIRA"
    hf_hyper = {"r": "r", "dropout": "hira_dropout"}

    def __init__(self, layer: nn.Module, r: int = 32, dropout: float = 0.0):
        super().__init__(layer)
        out_features, in_features = shape_of(layer)
        if r < 1:
            raise ValueError(f"rank r={r} is below 1")
        self.hira_A = nn.Parameter(torch.empty(r, in_features))
        self.hira_B = nn.Parameter(torch.zeros(out_features, r))
        nn.init.kaiming_uniform_(self.hira_A, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 32, **_) -> int:
        """r·(in + out)"""
        return r * (in_features + out_features)

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        W = weight_of(self.layer).to(x.dtype)
        return self.dropout(x) @ (W * (self.hira_B @ self.hira_A)).T
