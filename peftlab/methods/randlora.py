"""RandLoRA: a full-rank change from scaled random matrices. Albert et al. 2025, arXiv:2502.00987."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._bases import bases
from ._shared import Frozen, Held, agree, keep, largest


class RandLoRA(Adapter):
    """RandLoRA: a sum of so many random low-rank products that it has full rank; only their scales are trained.

    h = W₀x + (α/r)·Σₙ Bₙ·Λₙ·A·Γₙ·x, n = 1…N, N = ⌈m/r⌉ with m = min(in, out): Bₙ (max, r) and A (r, m) are frozen,
    random and shared by all layers; Λₙ (r) and Γₙ (m) are trained diagonals. Where in > out, the transposed sum.
    Λ starts at zero, so training starts at the base.

    A smaller r trains more numbers, not fewer: it takes more terms to reach full rank. Each pass builds the scaled A's,
    (N·r, m), and multiplies by the two as a chain: about the cost of one or two more dense layers of that size.
    r: rank of a term, one for all layers. alpha: α. dropout: on the adapter's input. seed: of A and B.
    save_projection: A and B in the file. sparse: A and B of −1, 0, 1, two thirds of them zeros; very_sparse: all but a
    share of 1/√m, m of the largest layer; both are held dense. Trained: N·(r + m). Raises ValueError for r below 1.
    Source: Albert et al. 2025, arXiv:2502.00987, section 4.2. The pairing of B's columns with A's rows is HF PEFT's: it
    counts the first basis by basis and the others rank by rank, which only draws the random columns in another order.
    """

    family = "shared and vector-based"
    hf_type, hf_patterns = "RANDLORA", {}
    hf_hyper = {"r": "r", "alpha": "randlora_alpha", "dropout": "randlora_dropout", "seed": "projection_prng_key",
                "save_projection": "save_projection", "sparse": "sparse", "very_sparse": "very_sparse"}  # fmt: skip

    def __init__(self, layer: nn.Module, r: int = 32, alpha: float = 640, dropout: float = 0.0, seed: int = 0,
                 save_projection: bool = False, sparse: bool = False, very_sparse: bool = False):  # fmt: skip
        super().__init__(layer)
        if r < 1:
            raise ValueError(f"rank r={r} is below 1")
        N = -(-(m := min(shape_of(layer))) // r)
        self.randlora_lambda = nn.Parameter(torch.zeros(r, N))
        self.randlora_gamma = nn.Parameter(torch.full((N, m), 1 / max(N, m)))
        self.dropout, self.scaling = nn.Dropout(dropout), alpha / r
        self.r, self.seed, self.save_projection = r, seed, save_projection
        self.sparse, self.very_sparse = sparse, very_sparse
        self.shared: Held = None  # Frozen: A and B

    @classmethod
    def share(cls, made) -> None:
        agree(made, "r", "seed", "save_projection", "sparse", "very_sparse")
        one = made[min(made)]
        A, B = bases(one, *sorted(largest(made)))
        keep(made, "shared", Frozen(one.save_projection, randlora_A=A, randlora_B=B))

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 32, **_) -> int:
        """N·(r + m), m = min(in, out), N = ⌈m/r⌉"""
        m = min(out_features, in_features)
        return -(-m // r) * (r + m)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """(A, B) of ΔW = s·B·A, of the inner size N·r."""
        if self.shared is None:  # attached to nothing: bases of its own
            self.share({"": self})
        out_features, in_features = shape_of(self.layer)
        N, m = self.randlora_gamma.shape
        B = self.shared.randlora_B[: max(out_features, in_features), :N].flatten(1).to(self.randlora_gamma)
        A = self.randlora_lambda[:, :, None] * self.shared.randlora_A[..., :m].to(B) * self.randlora_gamma  # (r, N, m)
        return (A.flatten(0, 1), B) if in_features == m else (B.T, A.flatten(0, 1).T)

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        A, B = self.matrices()
        return self.scaling * (self.dropout(x) @ A.T @ B.T)

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        return None if self.training and self.dropout.p > 0 else (*self.matrices(), self.scaling)
