"""DEFT: take a subspace out of a weight and put something else there. Kumar et al. 2025, arXiv:2509.22793."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of, weight_of
from ._projection import directions, drawn


class DEFT(Adapter):
    """DEFT (decompositional efficient fine-tuning): what a frozen weight says in r trained directions is rewritten.

    h = ((I − Q·Nᵀ)·W₀ + s·Q·R)·x, so ΔW = Q·(s·R − Nᵀ·W₀), with Q, N (out, r) made from P (out, r), and R (r, in).
    kind "qr": Q = N an orthonormal basis of P's columns, so Q·Nᵀ projects onto them. kind "relu", HF PEFT's default:
    Q = P, N = max(P, 0); no decomposition, and no projection. R starts at Nᵀ·W₀/s, as there, so training starts at the
    base, but for rounding where s is not 1.

    Each pass reads W₀, dense (in four bits: an unpacked copy of one layer), and takes r·in·out steps for Nᵀ·W₀: as many
    as r more tokens would. Several adapters take away from W₀ each, not from what the one before left.
    r: directions, 1 to out. alpha: s = α/r, by default s = 1. dropout: probability, on the input of Q·R alone.
    Trained: r·(in + out). Raises ValueError for a rank out of range or another kind.
    Source: Kumar et al. 2025, "DEFT: Decompositional efficient fine-tuning for text-to-image models", arXiv:2509.22793.
    """

    family = "low-rank"
    hf_type, hf_flags = "DEFT", {"para": False}
    hf_hyper = {"r": "r", "kind": "decomposition_method", "alpha": "alpha", "dropout": "deft_dropout"}

    def __init__(
        self, layer: nn.Module, r: int = 8, kind: str = "relu", alpha: float | None = None, dropout: float = 0.0
    ):  # fmt: skip
        super().__init__(layer)
        self.deft_P, self.kind = drawn(layer, r, kind), kind
        self.deft_R = nn.Parameter(torch.empty(r, shape_of(layer)[1]))
        self.dropout, self.scaling = nn.Dropout(dropout), alpha / r if alpha else 1.0
        with torch.no_grad():
            self.deft_R.copy_(self.taken()[1] / self.scaling)

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 8, **_) -> int:
        """r·(in + out)"""
        return r * (in_features + out_features)

    def taken(self) -> tuple[Tensor, Tensor]:
        """Q (out, r) and Nᵀ·W₀ (r, in)"""
        Q, N = directions(self.deft_P, self.kind)
        return Q, N.T @ weight_of(self.layer).to(N.dtype)

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        Q, out = self.taken()
        if self.training and self.dropout.p:
            return (self.scaling * self.dropout(x) @ self.deft_R.T - x @ out.T) @ Q.T
        return x @ (self.scaling * self.deft_R - out).T @ Q.T  # one product: at the start a difference of equals

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """The same Δ as matrices, unless dropout gives R another input than the layer."""
        Q, out = self.taken()
        return None if self.training and self.dropout.p else (self.scaling * self.deft_R - out, Q, 1.0)
