"""LoKr: the change is a Kronecker product. Yeh et al. 2023, arXiv:2309.14859."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of


class LoKr(Adapter):
    """LoKr: the change of a frozen weight is a Kronecker product of two small matrices, the larger one of low rank.

    h = W₀x + (α/r)·(W₁ ⊗ W₂)·x, with W₁ (l, m), W₂ = W₂ₐ·W₂ᵦ (k, n), out = l·k and in = m·n. With x as a matrix X
    (m, n), (W₁ ⊗ W₂)·x is W₁·X·W₂ᵀ, so that the change is never built. Its rank is rank(W₁)·rank(W₂): LoRA's counts are
    for a sum of such products. W₁ starts at zero, so training starts at the base.

    r: rank of W₂; from r = max(k, n)/2 on, W₂ is one full matrix. alpha: α. factor: l and m, where it divides out and
    in; else, and by default (-1), the greatest divisor up to the square root (and up to factor). decompose_both: W₁ as
    a product of rank r too, unless that is no smaller (r ≥ max(l, m)/2).
    Trained: l·m + r·(k + n), or k·n for a full W₂. Raises ValueError for r below 1 or another factor below 1 than -1.
    Source: Yeh et al. 2023 (LyCORIS), arXiv:2309.14859, section 3; file names are theirs: lokr_w1 is W₁.
    """

    family = "Hadamard and Kronecker"
    hf_type = "LOKR"
    hf_hyper = {"r": "r", "alpha": "alpha", "factor": "decompose_factor", "decompose_both": "decompose_both"}
    hf_ignored = frozenset({"rank_dropout", "rank_dropout_scale", "module_dropout", "use_effective_conv2d"})

    def __init__(
        self, layer: nn.Module, r: int = 8, alpha: float = 8, factor: int = -1, decompose_both: bool = False
    ):  # fmt: skip
        super().__init__(layer)
        if r < 1 or (factor < 1 and factor != -1):
            raise ValueError(f"r={r} must be at least 1, and factor={factor} too, or -1 for sizes near the square root")
        for name, shape in parts(*shape_of(layer), r, factor, decompose_both).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        for name, value in self.named_parameters():
            nn.init.kaiming_uniform_(value, a=math.sqrt(5))
            if name in ("lokr_w1", "lokr_w1_a"):
                nn.init.zeros_(value)
        self.scaling = alpha / r

    @staticmethod
    def size(
        out_features: int, in_features: int, r: int = 8, factor: int = -1, decompose_both: bool = False, **_
    ) -> int:  # fmt: skip
        """l·m + r·(k + n), or k·n for the second if r ≥ max(k, n)/2; out = l·k, in = m·n"""
        return sum(a * b for a, b in parts(out_features, in_features, r, factor, decompose_both).values())

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        own = self._parameters
        second = [self.lokr_w2] if "lokr_w2" in own else [self.lokr_w2_b, self.lokr_w2_a]
        W1 = self.lokr_w1 if "lokr_w1" in own else self.lokr_w1_a @ self.lokr_w1_b
        X = x.unflatten(-1, (-1, second[0].shape[1]))  # (..., m, n)
        for factor in second:
            X = X @ factor.T  # at last (..., m, k)
        return self.scaling * (W1 @ X).flatten(-2)  # (..., l, k) -> (..., l·k)


def factored(size: int, factor: int) -> tuple[int, int]:
    """(m, n) with m·n = size: m = factor if that divides it, else the greatest divisor up to √size and up to factor."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    m = max(d for d in range(1, most + 1) if size % d == 0)
    return m, size // m


def parts(out_features: int, in_features: int, r: int, factor: int, both: bool) -> dict[str, tuple[int, int]]:
    """name -> shape of the trained matrices."""
    (l, k), (m, n) = factored(out_features, factor), factored(in_features, factor)  # noqa: E741  the paper's letters
    first = {"lokr_w1_a": (l, r), "lokr_w1_b": (r, m)} if both and 2 * r < max(l, m) else {"lokr_w1": (l, m)}
    second = {"lokr_w2_a": (k, r), "lokr_w2_b": (r, n)} if 2 * r < max(k, n) else {"lokr_w2": (k, n)}
    return first | second
