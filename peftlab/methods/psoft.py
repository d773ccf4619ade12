"""PSOFT: a rotation within a weight's principal subspace. Wu et al. 2025, arXiv:2505.11235."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ._principal import principal
from ._rotations import cayley, checked_terms, eye_of, neumann, skew


class PSOFT(Adapter):
    """PSOFT: orthogonal fine-tuning of the r greatest singular directions of a weight alone, from r(r+3)/2 numbers.

    h = W₀x + B(C − I)Ax with W₀ ≈ BA: A = Vᵀ (r, in) and B = UΣ (out, r) of W₀'s first r singular triples, frozen, and
    C = diag(β)·R·diag(α), R = (I + Q)(I − Q)⁻¹ by Cayley. Qᵀ = −Q starts at 0, α and β at 1: C at I, training at the
    base. C turns the input within the subspace and leaves all else: W₀ = BA + rest becomes BCA + rest.

    Attaching reads W₀ and computes its SVD, O(out·in·min(out, in)); A and B are r·(in + out) frozen numbers a layer.
    ab_svd_init: "psoft_init", or "pissa_init": A = √Σ·Vᵀ, B = U√Σ. psoft_svd: "full", or "lowrank" (approximate, with
    psoft_svd_lowrank_niter and random_seed). psoft_orth: False trains R itself, r². psoft_mag_a, psoft_mag_b: whether α
    and β are trained. use_cayley_neumann, num_cayley_neumann_terms: OFT's series; cayley_neumann_eps: the most that ‖Q‖
    may be. dropout: on A's input. HF PEFT's scale α/r stands in B and before it, and cancels: it is not here.
    Trained: r(r−1)/2 + 2r. Raises ValueError for r above min(in, out), or a word that is not known.
    Source: Wu et al. 2025, arXiv:2505.11235, section 4. A file has C, not A and B, which are computed again from W₀: it
    means something else where the SVD gives singular vectors other signs (another LAPACK, a GPU).
    """

    hf_type = "PSOFT"
    hf_hyper = {"dropout": "psoft_dropout"} | {n: n for n in (
        "r", "ab_svd_init", "psoft_svd", "psoft_svd_lowrank_niter", "random_seed", "psoft_orth", "psoft_mag_a",
        "psoft_mag_b", "use_cayley_neumann", "num_cayley_neumann_terms", "cayley_neumann_eps")}  # fmt: skip
    hf_params = {n: f"psoft_R.{n}" for n in ("weight", "vector_a", "vector_b")}
    hf_ignored, family = frozenset({"psoft_alpha"}), "orthogonal"

    def __init__(
        self, layer: nn.Module, r: int = 16, ab_svd_init: str = "psoft_init", psoft_svd: str = "full",
        psoft_svd_lowrank_niter: int = 10, random_seed: int = 0, psoft_orth: bool = True, psoft_mag_a: bool = True,
        psoft_mag_b: bool = True, use_cayley_neumann: bool = False, num_cayley_neumann_terms: int = 5,
        cayley_neumann_eps: float | None = None, dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__(layer)
        if ab_svd_init not in ("psoft_init", "pissa_init"):
            raise ValueError(f"ab_svd_init={ab_svd_init!r} is neither 'psoft_init' nor 'pissa_init'")
        U, S, Vt = principal(layer, r, psoft_svd, psoft_svd_lowrank_niter, random_seed)
        even = ab_svd_init == "pissa_init"
        self.register_buffer("A", S.sqrt()[:, None] * Vt if even else Vt, persistent=False)
        self.register_buffer("B", U * (S.sqrt() if even else S), persistent=False)
        self.weight = nn.Parameter(torch.zeros(r * (r - 1) // 2) if psoft_orth else torch.eye(r))
        self.vector_a = nn.Parameter(torch.ones(r)) if psoft_mag_a else None
        self.vector_b = nn.Parameter(torch.ones(r)) if psoft_mag_b else None
        self.orth, self.eps, self.dropout = psoft_orth, cayley_neumann_eps, nn.Dropout(dropout)
        self.terms = checked_terms(num_cayley_neumann_terms) if use_cayley_neumann else 0

    @staticmethod
    def size(out_features, in_features, r=16, psoft_orth=True, psoft_mag_a=True, psoft_mag_b=True, **_) -> int:
        """r(r−1)/2 + 2r"""
        return (r * (r - 1) // 2 if psoft_orth else r * r) + r * (psoft_mag_a + psoft_mag_b)

    def transform(self) -> Tensor:  # C (r, r)
        C = self.weight
        if self.orth:
            Q = skew(C, len(self.A))
            if self.terms and self.eps:
                Q = Q * (self.eps / Q.norm()).clamp(max=1)
            C = neumann(Q, self.terms) if self.terms else cayley(Q)
        C = C if self.vector_b is None else self.vector_b[:, None] * C
        return C if self.vector_a is None else C * self.vector_a

    def change_of_A(self) -> Tensor:  # (C − I)A: (r, in)
        C = self.transform()
        return (C - eye_of(C)) @ self.A

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return self.dropout(x) @ self.change_of_A().T @ self.B.T

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        dropping = self.training and self.dropout.p > 0
        return None if dropping else (self.change_of_A(), self.B, 1.0)
