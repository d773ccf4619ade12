"""AdaMSS: a small low-rank change for each group of similar rows. NeurIPS 2025, OpenReview 8ZdWmpYxT0."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of, weight_of
from ._kmeans import kmeans


class AdaMSS(Adapter):
    """AdaMSS (adaptive multi-subspace): the rows of a frozen weight in groups, with a tiny low-rank change for each.

    h = W₀x + b₀ + Pᵀ·(B₁A₁; …; B_K·A_K)·V·(x; 1). From U·Σ·V, the first R terms of the singular value decomposition of
    W₀ with b₀ as a last column (if there is one), V (R, in + 1) is kept frozen, and the outputs are put into K groups
    of similar rows of U. Aₖ (rₖ, R) starts at the main directions of the group's rows of U, Bₖ (outputs of the group,
    rₖ) at zero, so that training starts at the base; P puts the outputs back in order.

    When it is made, it decomposes W₀. Files have V, but not the groups (HF PEFT's format): they are found again from
    W₀, so an adapter belongs to the very weights it was made on. On a copy of them in bfloat16 or in four bits a few
    rows are in other groups; where that changes a group's size, it is refused.
    r: R, cut to the layer's size. subspaces: K. subspace_rank: rₖ. seed: of the decomposition, which is approximate.
    HF PEFT's use_asa, which in training freezes the groups that matter least, and its use_dynamic_rank are not here.
    Trained: rₖ·(K·R + out), less where a group has under rₖ outputs. Raises ValueError for numbers below 1.
    Source: "AdaMSS: Adaptive multi-subspace approach for parameter-efficient fine-tuning", NeurIPS 2025, OpenReview
    8ZdWmpYxT0.
    """

    family = "low-rank"
    hf_type = "ADAMSS"
    hf_hyper = {"r": "r", "subspaces": "num_subspaces", "subspace_rank": "subspace_rank", "seed": "random_seed"}
    hf_ignored = frozenset({"use_asa", "asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval",
                            "asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent",
                            "svd_threshold"})  # fmt: skip

    def __init__(self, layer: nn.Module, r: int = 100, subspaces: int = 5, subspace_rank: int = 1, seed: int = 0):
        super().__init__(layer)
        if min(r, subspaces, subspace_rank) < 1:
            raise ValueError(f"r={r}, subspaces={subspaces} and subspace_rank={subspace_rank} must be at least 1")
        shape_of(layer)  # names any other kind of layer
        W, b = weight_of(layer).detach().float(), getattr(layer, "bias", None)
        W = W if b is None else torch.cat([W, b.detach().float()[:, None]], 1)
        R, K = min(r, *W.shape), min(subspaces, len(W))
        with torch.random.fork_rng(devices=[W.device] if W.is_cuda else []):
            torch.manual_seed(seed)
            U, _, V = (W[:, :R], None, W[:R].T) if W.is_meta else torch.svd_lowrank(W, q=R, niter=2)
        found = torch.arange(len(W), device="cpu") % K if W.is_meta else kmeans(U, K)
        rows = [torch.where(found == k)[0].to(W.device) for k in range(K)]
        self.register_buffer("adamss_newB", V.T.contiguous())
        self.register_buffer("order", torch.cat(rows).argsort(), persistent=False)
        self.groups = [len(own) for own in rows]
        starts = [torch.linalg.svd(U[own], full_matrices=False)[2][:subspace_rank] for own in rows]
        self.adamss_A = nn.ParameterList(A.clone() for A in starts)
        self.adamss_B = nn.ParameterList(torch.zeros(n, len(A)) for n, A in zip(self.groups, starts, strict=True))

    @staticmethod
    def size(
        out_features: int, in_features: int, r: int = 100, subspaces: int = 5, subspace_rank: int = 1,
        bias: bool = False, **_
    ) -> int:  # fmt: skip
        """rₖ·(K·R + out)"""
        R = min(r, out_features, in_features + bias)
        return min(subspace_rank, R) * (min(subspaces, out_features) * R + out_features)

    def expected(self) -> int:
        R = len(self.adamss_newB)
        return sum(min(n, R, self.hyper["subspace_rank"]) * (R + n) for n in self.groups)

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        V = self.adamss_newB
        z = x @ V[:, : x.shape[-1]].T + V[:, x.shape[-1] :].sum(1)  # (..., R); the last column is the bias's, if any
        parts = [z @ A.T @ B.T for A, B in zip(self.adamss_A, self.adamss_B, strict=True)]
        return torch.cat(parts, -1)[..., self.order]
