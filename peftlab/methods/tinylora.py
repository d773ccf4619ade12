"""TinyLoRA: a handful of trained numbers. Morris et al. 2026, arXiv:2602.04118."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ._dealing import groups
from ._shared import agree, keep, seeded, widened
from ._singular import singular


class TinyLoRA(Adapter):
    """TinyLoRA: LoRA-XS, whose small matrix is a sum of u fixed random ones; only their weights are trained.

    h = W₀x + B·(Σᵢ vᵢ·Pᵢ)·A·x, with W₀ ≈ U_r·Σ_r·V_rᵀ its best approximation of rank r, B = U_r·√Σ_r (out, r) and
    A = √Σ_r·V_rᵀ (r, in) frozen, Pᵢ (r, r) frozen and random with variance 1/r, and v (u,) trained, from zero, so that
    training starts at the base. Layers can share a v; each has its own P, A and B all the same.

    A and B are in the file, r·(in + out) numbers a layer: far more than is trained, but exact on any base.
    r: rank. u: length of v. weight_tying: 0: each layer its own v; 1: one for all; else groups of neighbours. dropout:
    on the adapter's input. seed: of P. save_projection: P in the file. Trained: u for each group. ValueError for a rank
    or a tying out of range, or u below 1.
    Source: Morris et al. 2026, arXiv:2602.04118; √Σ_r on both sides, P's variance and the groups are HF PEFT's.
    """

    family = "shared and vector-based"
    hf_type = "TINYLORA"
    hf_hyper = {"r": "r", "u": "u", "weight_tying": "weight_tying", "dropout": "tinylora_dropout",
                "seed": "projection_seed", "save_projection": "save_projection"}  # fmt: skip

    def __init__(self, layer: nn.Module, r: int = 2, u: int = 64, weight_tying: float = 0.0, dropout: float = 0.0,
                 seed: int = 42, save_projection: bool = False):  # fmt: skip
        super().__init__(layer)
        if u < 1 or not 0 <= weight_tying <= 1:
            raise ValueError(f"u={u} must be at least 1, and weight_tying={weight_tying} in 0…1")
        U, S, Vt = singular(layer, r)
        self.register_buffer("tinylora_A", S.sqrt()[:, None] * Vt)
        self.register_buffer("tinylora_B", U * S.sqrt())
        self.register_buffer("tinylora_P", torch.empty(u, r, r), persistent=save_projection)
        self.tinylora_v = nn.Parameter(torch.zeros(u))
        self.dropout, self.r, self.u, self.weight_tying, self.seed = nn.Dropout(dropout), r, u, weight_tying, seed
        self.draw(0)

    def draw(self, number: int) -> None:  # P, of the target of this number
        P = torch.randn(self.u, self.r, self.r, generator=seeded(self.seed + number), device="cpu") / self.r**0.5
        self.tinylora_P.copy_(P)  # on a meta device nothing

    @classmethod
    def share(cls, made) -> None:
        agree(made, "r", "u", "weight_tying", "seed")
        for number, adapter in enumerate(made.values()):
            adapter.draw(number)
            adapter.group = groups(len(made), adapter.weight_tying)[number]
        for group in {a.group for a in made.values()}:
            tied = {path: adapter for path, adapter in made.items() if adapter.group == group}
            keep(tied, "tinylora_v", tied[min(tied)].tinylora_v)

    @staticmethod
    def size(out_features: int, in_features: int, u: int = 64, **_) -> int:
        """u, once for each group of layers that share v"""
        return u

    def expected(self) -> int:
        return self.u if "tinylora_v" in self._parameters else 0

    def R(self, x: Tensor) -> Tensor:
        return torch.einsum("u,uij->ij", self.tinylora_v.to(x), self.tinylora_P.to(x))

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return self.dropout(x) @ self.tinylora_A.to(x).T @ self.R(x).T @ self.tinylora_B.to(x).T

    def change(self, x: Tensor) -> Tensor:
        return self.delta(widened(x, self.tinylora_v)).to(x.dtype)

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        A, B = self.tinylora_A, self.tinylora_B
        return None if self.training and self.dropout.p > 0 else (self.R(A) @ A, B, 1.0)
