"""VB-LoRA: all factors of all layers from one bank of vectors. Li et al. 2024, arXiv:2405.15179."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ..sites import at, bare
from ._dealing import fitting
from ._shared import agree, keep


class VBLoRA(Adapter):
    """VB-LoRA: LoRA, whose factors are cut into pieces of length b, each a mixture of k vectors of one shared bank.

    h = W₀x + B·A·x, each piece of A (r, in) and B (out, r) being Σⱼ wⱼ·αⱼ over the k vectors α of the bank (h, b) with
    the largest of the piece's h logits σ, and w = softmax of these k. Bank and logits are trained. The bank starts
    uniform in ±0.02 and the logits normal with deviation 0.1, so training starts close to the base, not at it.

    With `save_only_topk_weights` the file holds k numbers of vectors and k − 1 weights a piece; read from there, the
    choice of vectors is final: all other logits are −∞. r: rank. num_vectors: h. vector_length: b, divides in and out
    of all targets; by default the greatest up to 256. topk: k. dropout: on the adapter's input. ValueError for sizes
    that do not divide, or k above h. Trained: h·r·(in + out)/b a layer, and h·b once.
    Source: Li et al. 2024, arXiv:2405.15179.
    """

    family = "shared and vector-based"
    hf_type = "VBLORA"
    hf_hyper = {"r": "r", "num_vectors": "num_vectors", "vector_length": "vector_length", "topk": "topk",
                "dropout": "vblora_dropout", "save_only_topk_weights": "save_only_topk_weights"}  # fmt: skip

    def __init__(self, layer: nn.Module, r: int = 4, num_vectors: int = 256, vector_length: int | None = None,
                 topk: int = 2, dropout: float = 0.0, save_only_topk_weights: bool = False):  # fmt: skip
        super().__init__(layer)
        out_features, in_features = shape_of(layer)
        h, b, common = num_vectors, vector_length or fitting(out_features, in_features), math.gcd(*shape_of(layer))
        if b < 1 or common % b:
            raise ValueError(f"vector_length={b} does not divide {out_features}×{in_features}; divisors of {common} do")
        if r < 1 or not 1 <= topk <= h:
            raise ValueError(f"r={r} must be at least 1, and topk={topk} in 1…{h}, num_vectors")
        self.vblora_logits_A = nn.Parameter(0.1 * torch.randn(r, in_features // b, h))
        self.vblora_logits_B = nn.Parameter(0.1 * torch.randn(out_features // b, r, h))
        self.vblora_vector_bank = nn.Parameter(torch.empty(h, b).uniform_(-0.02, 0.02))
        self.dropout, self.r, self.h, self.b, self.topk = nn.Dropout(dropout), r, h, b, topk

    @classmethod
    def plan(cls, model, paths, hyper):  # one vector length for all targets
        b = hyper.get("vector_length") or fitting(*(n for path in paths for n in shape_of(bare(at(model, path)))))
        return {path: (cls, {**hyper, "vector_length": b}) for path in paths}

    @classmethod
    def share(cls, made) -> None:
        agree(made, "r", "h", "b", "topk")
        keep(made, "vblora_vector_bank", made[min(made)].vblora_vector_bank)

    @staticmethod
    def size(out_features: int, in_features: int, r=4, num_vectors=256, vector_length=None, **_) -> int:
        """h·r·(in + out)/b, without the bank's h·b"""
        return num_vectors * r * (in_features + out_features) // (vector_length or fitting(out_features, in_features))

    def expected(self) -> int:
        return super().expected() + ("vblora_vector_bank" in self._parameters) * self.h * self.b

    def pieces(self, logits: Tensor) -> Tensor:  # (…, h) -> (…, b)
        largest, where = logits.topk(self.topk)
        return (largest.softmax(-1)[..., None] * self.vblora_vector_bank.to(logits)[where]).sum(-2)

    def matrices(self) -> tuple[Tensor, Tensor]:  # A (r, in) and B (out, r)
        return self.pieces(self.vblora_logits_A).flatten(1), self.pieces(self.vblora_logits_B).mT.flatten(0, 1)

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        A, B = self.matrices()
        return self.dropout(x) @ A.T @ B.T

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        return None if self.training and self.dropout.p > 0 else (*self.matrices(), 1.0)
