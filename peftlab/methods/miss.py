"""MiSS: one small matrix, tiled over the whole weight. Kang and Yin 2024, arXiv:2409.15371."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of, weight_of
from ..sites import at, bare

VARIANTS = "plain", "bat", "mini"


class MiSS(Adapter):
    """MiSS (matrix shard sharing, once Bone): every shard of a frozen weight gets the same trained matrix.

    h = W₀x + Σₖ Dᵀ·xₖ, with D (r, out) from zero and x cut into pieces xₖ of r numbers, the last one filled up with
    zeros. So ΔW is Dᵀ, in/r times side by side: LoRA with a fixed A of ones and noughts, of rank r.

    variant "mini": D (r, mini_r) is repeated along out too. "bat": D (out/r, r, r), and the block of r × r at row j and
    column k is changed by Wⱼₖ·Dⱼ + Dⱼ, no two alike; each pass then reads W₀, dense (in four bits: an unpacked copy),
    and builds ΔW. It always starts from W₀; HF PEFT lets a second "bat" work on what the first one made.
    r: by default 64, or the greatest number below that fits all targets. "bat" needs one that divides in and out,
    "mini" a mini_r that divides out. dropout: probability, on the adapter's input only; not in "bat".
    Trained: r·out, in "mini" r·mini_r. Raises ValueError for sizes that do not fit, and for another variant.
    Source: Kang and Yin 2024, arXiv:2409.15371; "bat" is in its versions of 2024.
    """

    family = "low-rank"
    hf_type = "MISS"
    hf_hyper = {"r": "r", "mini_r": "mini_r", "dropout": "miss_dropout"}  # and variant: see formats/structured.py
    hf_params = {"miss_block": "miss_block"}

    def __init__(
        self, layer: nn.Module, r: int | None = None, variant: str = "plain", mini_r: int = 1, dropout: float = 0.0
    ):  # fmt: skip
        super().__init__(layer)
        out_features, in_features = shape_of(layer)
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} is none of {', '.join(VARIANTS)}")
        r = fitting(variant, (out_features, in_features)) if r is None else r
        if not 1 <= r <= in_features or (variant == "bat" and (out_features % r or in_features % r)):
            raise ValueError(f"r={r} must be 1…{in_features}, the layer's inputs, and for 'bat' divide its "
                             f"{out_features}×{in_features}: the divisors of {math.gcd(out_features, in_features)} do")
        if variant == "mini" and (mini_r < 1 or out_features % mini_r):
            raise ValueError(f"mini_r={mini_r} does not divide the layer's {out_features} outputs")
        shape = {"plain": (r, out_features), "mini": (r, mini_r), "bat": (out_features // r, r, r)}[variant]
        self.miss_block = nn.Parameter(torch.zeros(shape))
        self.dropout, self.variant = nn.Dropout(dropout), variant

    @classmethod
    def plan(cls, model, paths, hyper):
        """One r for all targets, as files have it."""
        shapes = [shape_of(bare(at(model, path))) for path in paths]
        r = fitting(hyper.get("variant", "plain"), *shapes)
        return {path: (cls, {"r": r} | {k: v for k, v in hyper.items() if v is not None}) for path in paths}

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 64, variant: str = "plain", mini_r: int = 1, **_) -> int:
        """r·out, or r·mini_r"""
        return r * (mini_r if variant == "mini" else out_features)

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        D = self.miss_block
        if self.variant == "bat":
            W = weight_of(self.layer).to(x.dtype)
            blocks = torch.einsum("jakb,jbc->jakc", W.reshape(len(D), D.shape[1], -1, D.shape[1]), D)
            return x @ (blocks + D[:, :, None]).reshape(W.shape).T
        y = F.pad(self.dropout(x), (0, -x.shape[-1] % len(D))).unflatten(-1, (-1, len(D))).sum(-2) @ D
        return y if self.variant == "plain" else torch.cat([y] * (shape_of(self.layer)[0] // D.shape[1]), -1)


def fitting(variant: str, *shapes: tuple[int, int]) -> int:
    """The greatest r up to 64, HF PEFT's default, that fits all of these layers, (out, in) each."""
    common, least = math.gcd(*(n for shape in shapes for n in shape)), min(i for _, i in shapes)
    return max(r for r in range(1, 65) if (common % r == 0 if variant == "bat" else r <= least))
