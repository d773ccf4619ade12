"""NOLA: LoRA's factors as mixtures of random matrices. Koohpayegani et al. 2023, arXiv:2310.02556."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._shared import Frozen, Held, agree, keep, seeded, uniform


class NOLA(Adapter):
    """NOLA: LoRA, whose factors are linear combinations of frozen random matrices, with trained coefficients.

    h = W₀x + (α/r)·B·A·x, with A = Σᵢ aᵢ·Aᵢ and B = Σⱼ bⱼ·Bⱼ, i, j = 1…k, with random Aᵢ (r, in) and Bⱼ (out, r) that
    come from one seed. a (k,) starts uniform in ±1/√k and b (k,) at zero, so training starts at the base.

    How much is trained depends neither on the rank nor on the layer's size: it can be below LoRA's of rank 1. Layers of
    the same shape share the random matrices, k·r·(in + out) numbers of memory for a shape, and none in the file.
    r: rank. k: number of random matrices of each factor. alpha: α. seed: of the random matrices. Trained: 2·k.
    Raises ValueError for r or k below 1. Source: Koohpayegani et al. 2023, arXiv:2310.02556; the paper has two numbers,
    k and l.
    """

    family = "shared and vector-based"

    def __init__(self, layer: nn.Module, r: int = 8, k: int = 64, alpha: float = 8, seed: int = 0):
        super().__init__(layer)
        if r < 1 or k < 1:
            raise ValueError(f"r={r} and k={k} must be at least 1")
        self.a = nn.Parameter(torch.empty(k).uniform_(-1, 1) / math.sqrt(k))
        self.b = nn.Parameter(torch.zeros(k))
        self.scaling, self.r, self.k, self.seed = alpha / r, r, k, seed
        self.shared: Held = None  # Frozen: the random matrices

    @classmethod
    def share(cls, made) -> None:
        agree(made, "r", "k", "seed")
        for shape in {shape_of(adapter.layer) for adapter in made.values()}:
            alike = {path: adapter for path, adapter in made.items() if shape_of(adapter.layer) == shape}
            one, draw, (out_features, in_features) = alike[min(alike)], seeded(made[min(made)].seed), shape
            A = uniform(draw, one, one.k * one.r, in_features).view(one.k, one.r, in_features)
            B = uniform(draw, one, one.k * out_features, one.r).view(one.k, out_features, one.r)
            keep(alike, "shared", Frozen(False, A=A, B=B))

    @staticmethod
    def size(out_features: int, in_features: int, k: int = 64, **_) -> int:
        """2·k"""
        return 2 * k

    def factors(self) -> tuple[Tensor, Tensor, float]:
        if self.shared is None:  # attached to nothing: random matrices of its own
            self.share({"": self})
        A, B = self.shared.A.to(self.a), self.shared.B.to(self.b)
        return torch.einsum("k,kri->ri", self.a, A), torch.einsum("k,kor->or", self.b, B), self.scaling

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        A, B, s = self.factors()
        return s * (x @ A.T @ B.T)
