"""PaRa: take a subspace out of a weight. Chen et al. 2024, arXiv:2406.05641."""

from __future__ import annotations

from torch import Tensor, nn

from ..core import Adapter
from ..layers import weight_of
from ._projection import directions, drawn


class PaRa(Adapter):
    """PaRa (parameter rank reduction): a frozen weight loses r trained directions of its outputs, and gains nothing.

    h = (I − Q·Qᵀ)·W₀·x, with Q (out, r) an orthonormal basis of the columns of P (out, r). The weight's rank falls
    by r; made for image generators that shall draw one subject: a smaller space of outputs. There is no P that takes
    nothing out, so training does not start at the base. The bias stays.

    Each pass reads W₀, dense (in four bits: an unpacked copy of one layer), and takes r·in·out steps for Qᵀ·W₀: as many
    as r more tokens would. Several adapters take away from W₀ each, not from what the one before left.
    r: directions, 1 to out. kind: "qr"; "relu" is HF PEFT's own, which takes P·max(P, 0)ᵀ·W₀ out instead.
    Trained: r·out. Raises ValueError for a rank out of range or another kind.
    Source: Chen et al. 2024, "PaRa: Personalizing text-to-image diffusion via parameter rank reduction",
    arXiv:2406.05641, ICLR 2025.
    """

    family = "low-rank"
    hf_type, hf_flags = "DEFT", {"para": True}
    hf_hyper = {"r": "r", "kind": "decomposition_method"}
    hf_ignored = frozenset({"init_scale", "alpha", "deft_dropout"})  # they are of R, which is not there

    def __init__(self, layer: nn.Module, r: int = 8, kind: str = "qr"):
        super().__init__(layer)
        self.deft_P, self.kind = drawn(layer, r, kind), kind

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 8, **_) -> int:
        """r·out"""
        return r * out_features

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        A, B, _ = self.factors()
        return x @ A.T @ B.T

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """−Q and Nᵀ·W₀, with N = Q for "qr": Δ as matrices."""
        Q, N = directions(self.deft_P, self.kind)
        return N.T @ weight_of(self.layer).to(N.dtype), -Q, 1.0
