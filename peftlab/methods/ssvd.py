"""SSVD: turn and stretch a weight's input directions. Wang et al. 2025, arXiv:2509.02830."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ._principal import principal
from ._rotations import cayley, eye_of, skew


class SSVD(Adapter):
    """SSVD (structured SVD): a weight's k first input directions are rotated and stretched; its output's are kept.

    h = W′x + b with W₀ = UΣVᵀ and W′ = U(Σ + ΔΣ)GVᵀ, where ΔΣ = diag(σ) and G act on the first k singular directions:
    W′ = W₀ + Uₖ((Σₖ + ΔΣ)G − Σₖ)Vₖᵀ. G ≈ I − 2K with Kᵀ = −K, the first order of Cayley's rotation,
    or with `strict` the rotation, (I − K)(I + K)⁻¹. K and σ start at 0, so training starts at the base.

    Attaching reads W₀ and computes its SVD, O(out·in·min(out, in)) a layer; Uₖ, Σₖ, Vₖ are k·(in + out + 1) more frozen
    numbers, computed again from W₀ when a file is read: another LAPACK may give them other signs.
    k: 1 to min(in, out). Trained: k(k+1)/2. Raises ValueError for k out of range.
    Source: Wang et al. 2025, arXiv:2509.02830, section III.
    """

    family = "orthogonal"

    def __init__(self, layer: nn.Module, k: int = 16, strict: bool = False):
        super().__init__(layer)
        U, S, Vt = principal(layer, k)
        for name, tensor in (("U", U), ("S", S), ("Vt", Vt)):
            self.register_buffer(name, tensor, persistent=False)
        self.K = nn.Parameter(torch.zeros(k * (k - 1) // 2))
        self.sigma = nn.Parameter(torch.zeros(k))
        self.strict = strict

    @staticmethod
    def size(out_features: int, in_features: int, k: int = 16, **_) -> int:
        """k(k+1)/2"""
        return k * (k + 1) // 2

    def rotation(self) -> Tensor:  # G (k, k)
        K = skew(self.K, len(self.S))
        return cayley(-K) if self.strict else eye_of(K) - 2 * K

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Δ = Uₖ·((Σₖ + ΔΣ)G − Σₖ)Vₖᵀ, of rank k."""
        change = (self.S + self.sigma)[:, None] * self.rotation() - torch.diag(self.S)
        return change @ self.Vt, self.U, 1.0

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        A, B, _ = self.factors()
        return x @ A.T @ B.T
