"""LoRA-XS: a small trained matrix between frozen singular vectors. Bałazy et al. 2024, arXiv:2405.17604."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ._singular import singular


class LoRAXS(Adapter):
    """LoRA-XS: the frozen weight's own first singular vectors are LoRA's factors; a small matrix between is trained.

    h = W₀x + A·R·B·x, with W₀ ≈ U_r·Σ_r·V_rᵀ its best approximation of rank r, A = U_r·Σ_r (out, r) and B = V_rᵀ
    (r, in) frozen, and R (r, r) trained. R starts at zero, so training starts at the base; the paper draws it with
    deviation 10⁻⁵, which it does not need: A and B are not zero, so R has a gradient.

    What is trained does not grow with the layer's width. A and B take r·(in + out) numbers of memory a layer, and none
    in the file: they are computed again from the base, which must be the very same, packed in four bits or not.
    The decomposition is a full one, once a layer when it is attached: some seconds for a width of 4096.
    r: rank, 1 to min(in, out). Trained: r². Raises ValueError for a rank out of range.
    Source: Bałazy et al. 2024, arXiv:2405.17604.
    """

    family = "shared and vector-based"

    def __init__(self, layer: nn.Module, r: int = 16):
        super().__init__(layer)
        U, S, Vt = singular(layer, r)
        self.register_buffer("A", U * S, persistent=False)
        self.register_buffer("B", Vt, persistent=False)
        self.R = nn.Parameter(torch.zeros(r, r))

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 16, **_) -> int:
        """r²"""
        return r**2

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return x @ self.B.T @ self.R.T @ self.A.T

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """LoRA's letters are the other way round: R·B is its A."""
        return self.R @ self.B, self.A, 1.0
