"""OSF: orthogonal subspace fine-tuning. Nayak et al. 2025, arXiv:2504.07097."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of, weight_of


class Orthogonal(torch.autograd.Function):
    """The identity, whose gradient loses its part in the span of Q's orthonormal columns: g ← g − Q·Qᵀ·g."""

    @staticmethod
    def forward(ctx, U: Tensor, Q: Tensor) -> Tensor:
        ctx.save_for_backward(Q)
        return U.view_as(U)

    @staticmethod
    def backward(ctx, g: Tensor):
        (Q,) = ctx.saved_tensors
        return g - Q @ (Q.T @ g), None


class OSF(Adapter):
    """OSF: of the frozen weight's singular values, the small ones learn; the large ones and their directions stay.

    h = W₀x + (U·diag(S)·V − U₀·diag(S₀)·V₀)·x, where W₀ = U_high·S_high·V_high + U₀·S₀·V₀ is the singular value
    decomposition, split after the n largest values, and U (out, k), S (k,), V (k, in) start at U₀, S₀, V₀: training
    starts at the base. Gradients of U and V lose their part along U_high and V_high, where the base keeps what it
    knows. A step of Adam, which scales each number by itself, brings some of it back; `pl.train` takes it out after
    each step (`stepped`), so that U stays orthogonal to U_high and V to V_high. HF PEFT does not.

    One decomposition a layer, also when a file is read, and (in + out)·min(in, out) frozen numbers a layer: those of a
    square W₀ twice. A file holds U, S, V. effective_rank: n; below 1, a fraction of min(in, out); None: half of it.
    Trained: k·(in + out + 1), k = min(in, out) − n. Raises ValueError if n or k would be below 1.
    Source: Nayak et al. 2025, arXiv:2504.07097, "Sculpting subspaces", without its choice of n layer by layer.
    """

    family = "orthogonal"
    hf_type, hf_patterns = "OSF", {"effective_rank": "rank_pattern"}
    hf_hyper = {"effective_rank": "effective_rank"}
    hf_params = {name: f"osf_svd_params.{name}" for name in ("U_low", "S_low", "V_low")}

    def __init__(self, layer: nn.Module, effective_rank: int | float | None = None):
        super().__init__(layer)
        n, W = preserved(*shape_of(layer), effective_rank), weight_of(layer).detach().float()
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        for name, high, low in (("U", U[:, :n], U[:, n:]), ("S", S[:n], S[n:]), ("V", V[:n], V[n:])):
            self.register_parameter(f"{name}_low", nn.Parameter(low.clone()))
            self.register_buffer(f"{name}_start", low.clone(), persistent=False)
            self.register_buffer(f"{name}_high", high.clone(), persistent=False)

    @staticmethod
    def size(out_features: int, in_features: int, effective_rank: int | float | None = None, **_) -> int:
        """k·(in + out + 1), k = min(in, out) − n"""
        k = min(in_features, out_features) - preserved(out_features, in_features, effective_rank)
        return k * (in_features + out_features + 1)

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        U, V = Orthogonal.apply(self.U_low, self.U_high), Orthogonal.apply(self.V_low.T, self.V_high.T).T
        return (x @ V.T * self.S_low) @ U.T - (x @ self.V_start.T * self.S_start) @ self.U_start.T

    @classmethod
    @torch.no_grad()
    def stepped(cls, made, step: int, steps: int) -> None:
        for a in made.values():
            a.U_low -= a.U_high @ (a.U_high.T @ a.U_low)
            a.V_low -= (a.V_low @ a.V_high.T) @ a.V_high


def preserved(out_features: int, in_features: int, effective_rank: int | float | None) -> int:
    """n: how many singular values stay."""
    m = min(out_features, in_features)
    fraction = isinstance(effective_rank, float) and effective_rank <= 1
    n = m // 2 if effective_rank is None else int(m * effective_rank) if fraction else int(effective_rank)
    if not 1 <= n < m:
        raise ValueError(f"effective_rank={effective_rank} keeps {n} of {m} singular values, not one of 1…{m - 1}")
    return n
