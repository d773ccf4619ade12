"""MiCA: a LoRA that writes only where the frozen weight writes least. Rüdiger and Raschka 2026."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ._lora import HYPER, PARAMS, checked_rank, minor, scaled


class MiCA(Adapter):
    """MiCA (minor component adaptation): LoRA with B frozen at the weight's r weakest output directions.

    h = W₀x + (α/r)·B·A·x, with B (out, r) the left singular vectors of W₀'s r smallest singular values, frozen, and
    A (r, in) trained from zero, so that training starts at the base. The change stays in the span of B, where W₀ has
    the least to lose.

    B is in the file, as in HF PEFT, and read from it; attaching costs a singular value decomposition of each weight.
    r, alpha: α, dropout and rslora as in LoRA. Trained: r·in. Raises ValueError for a rank or a dropout out of range.
    Source: Rüdiger and Raschka 2026, arXiv:2604.01694.
    """

    family = "low-rank"
    hf_type, hf_flags = "LORA", {"init_lora_weights": "mica"}
    hf_hyper, hf_params = HYPER, PARAMS

    def __init__(self, layer: nn.Module, r: int = 8, alpha: float = 16, dropout: float = 0.0, rslora: bool = False):
        super().__init__(layer)
        _, in_features = checked_rank(layer, r)
        self.lora_A = nn.Parameter(torch.zeros(r, in_features))
        self.register_buffer("lora_B", minor(layer, r)[0])
        self.dropout, self.scaling = nn.Dropout(dropout), scaled(alpha, r, rslora)

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 8, **_) -> int:
        """r·in"""
        return r * in_features

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return self.scaling * (self.dropout(x) @ self.lora_A.T @ self.lora_B.T)

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """The same Δ as matrices, unless dropout gives the adapter another input than the layer."""
        dropping = self.training and self.dropout.p > 0
        return None if dropping else (self.lora_A, self.lora_B, self.scaling)
