"""MoRA: one square matrix instead of two thin ones. Jiang et al. 2024, arXiv:2405.12130."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of

KINDS = "rotate", "share"


class MoRA(Adapter):
    """MoRA: the numbers of a LoRA as one square matrix, for a change of the highest rank that they can have.

    h = W₀x + decompress(M·compress(x)), with M (r̂, r̂) from zero, r̂ = ⌊√(r·(in + out))⌋, so never more numbers than the
    LoRA of rank r has. Nothing else is trained; both operators are linear, so the change can be merged.

    kind "share" (equation 6): compress adds up x's pieces of r̂ numbers, decompress repeats what comes out until it is
    `out` long. All pieces are treated alike, and ΔW has rank r̂ at most. kind "rotate" (equation 9, for small r): each
    piece is turned by its place j, as rotary embeddings turn a token: its i-th pair by the angle j·10000^(−2i/r̂); M is
    applied to each, and the results are put side by side, and repeated if they are shorter than `out`. So ΔW is block
    diagonal, M·Rⱼ; r̂ is rounded down to an even number. The last piece is filled up with x's own first numbers.
    r: rank of the LoRA with as many numbers. Trained: r̂². Raises ValueError for r below 1, an r̂ above in, another kind.
    Source: Jiang et al. 2024, "MoRA: High-rank updating for parameter-efficient fine-tuning", arXiv:2405.12130,
    equations 6 and 9.
    """

    family = "spectral and structured"

    def __init__(self, layer: nn.Module, r: int = 8, kind: str = "rotate"):
        super().__init__(layer)
        out_features, in_features = shape_of(layer)
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} is none of {', '.join(KINDS)}")
        size = side(out_features, in_features, r, kind)
        if r < 1 or size > in_features:
            raise ValueError(f"r={r} gives a square matrix of side {size}, which must be 1…{in_features}, the layer's "
                             "inputs; a full matrix would have fewer numbers: take a smaller r")  # fmt: skip
        self.M = nn.Parameter(torch.zeros(size, size))
        self.kind = kind
        if kind == "rotate":
            i, j = torch.arange(size // 2), torch.arange(math.ceil(in_features / size))
            angle = j[:, None] * 10000.0 ** (-2 * i / size)  # (pieces, r̂/2)
            self.register_buffer("cos", angle.cos().repeat(1, 2), persistent=False)
            self.register_buffer("sin", angle.sin().repeat(1, 2), persistent=False)

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 8, kind: str = "rotate", **_) -> int:
        """⌊√(r·(in + out))⌋², rounded down to an even side for kind "rotate" """
        return side(out_features, in_features, r, kind) ** 2

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        size, out_features = len(self.M), shape_of(self.layer)[0]
        missing = -x.shape[-1] % size
        pieces = torch.cat([x, x[..., :missing]], -1).unflatten(-1, (-1, size))  # (..., pieces, r̂)
        if self.kind == "share":
            y = pieces.sum(-2) @ self.M.T
        else:
            a, b = pieces.chunk(2, -1)
            y = ((pieces * self.cos + torch.cat([-b, a], -1) * self.sin) @ self.M.T).flatten(-2)
        return torch.cat([y] * math.ceil(out_features / y.shape[-1]), -1)[..., :out_features]


def side(out_features: int, in_features: int, r: int, kind: str) -> int:
    """r̂"""
    full = math.isqrt(max(r, 0) * (in_features + out_features))
    return full - full % 2 if kind == "rotate" else full
