"""AdaMSS: a small low-rank change for each group of similar rows. Zheng et al. 2025, OpenReview 8ZdWmpYxT0."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._subspaces import allocate, decomposed, learning


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
    asa: in training, freeze the groups that matter least, by how Aₖ and Bₖ changed the loss lately: `target` of all
    layers' groups go on learning from step tfinal on; see `_subspaces`. A loop of your own calls `stepped`, as
    `pl.train` does. interval, beta1, beta2, exponent: of the choice. HF PEFT's use_dynamic_rank is not here.
    Trained: rₖ·(K·R + out), less where a group has under rₖ outputs. Raises ValueError for numbers out of range.
    Source: Zheng et al. 2025, "AdaMSS: Adaptive multi-subspace approach …", NeurIPS, OpenReview 8ZdWmpYxT0.
    """

    family, hf_type = "low-rank", "ADAMSS"
    hf_hyper = {"r": "r", "subspaces": "num_subspaces", "subspace_rank": "subspace_rank", "seed": "random_seed",
                "asa": "use_asa", "target": "asa_target_subspaces", "tinit": "init_warmup", "tfinal": "final_warmup",
                "interval": "mask_interval", "beta1": "asa_importance_beta", "beta2": "asa_uncertainty_beta",
                "exponent": "asa_schedule_exponent"}  # fmt: skip
    hf_ignored = frozenset({"svd_threshold"})

    def __init__(self, layer: nn.Module, r: int = 100, subspaces: int = 5, subspace_rank: int = 1, seed: int = 0,
                 asa: bool = False, target: int = 50, tinit: int = 50, tfinal: int = 1000, interval: int = 100,
                 beta1: float = 0.85, beta2: float = 0.85, exponent: float = 3.0):  # fmt: skip
        super().__init__(layer)
        if min(r, subspaces, subspace_rank) < 1:
            raise ValueError(f"r={r}, subspaces={subspaces} and subspace_rank={subspace_rank} must be at least 1")
        sound = min(target, interval) >= 1 and 0 <= tinit < tfinal and exponent > 0 <= min(beta1, beta2)
        if asa and not (sound and max(beta1, beta2) < 1):
            raise ValueError(f"asa needs target={target}, interval={interval} ≥ 1, tinit={tinit} < tfinal={tfinal}, "
                             f"exponent={exponent} > 0, and 0 ≤ beta1={beta1}, beta2={beta2} < 1")  # fmt: skip
        shape_of(layer)  # names any other kind of layer
        V, rows, starts = decomposed(layer, r, subspaces, subspace_rank, seed)
        self.register_buffer("adamss_newB", V)
        self.register_buffer("order", torch.cat(rows).argsort(), persistent=False)
        self.groups = [len(own) for own in rows]
        self.adamss_A = nn.ParameterList(A.clone() for A in starts)
        self.adamss_B = nn.ParameterList(torch.zeros(n, len(A)) for n, A in zip(self.groups, starts, strict=True))
        self.asa, self.memory = asa, ("active", "mean", "spread") if asa else ()
        for name in self.memory:  # which groups go on learning, and how important each number was
            numbers = len(rows) if name == "active" else sum(p.numel() for p in self.parameters())
            self.register_buffer(name, torch.full((numbers,), float(name == "active")), persistent=False)

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 100, subspaces: int = 5, subspace_rank: int = 1,
             bias: bool = False, **_) -> int:  # fmt: skip
        """rₖ·(K·R + out)"""
        R = min(r, out_features, in_features + bias)
        return min(subspace_rank, R) * (min(subspaces, out_features) * R + out_features)

    def expected(self) -> int:
        R = len(self.adamss_newB)
        return sum(min(n, R, self.hyper["subspace_rank"]) * (R + n) for n in self.groups)

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        V = self.adamss_newB
        z = x @ V[:, : x.shape[-1]].T + V[:, x.shape[-1] :].sum(1)  # (..., R); the last column is the bias's, if any
        parts = [z @ A.T @ B.T for A, B in learning(self)]
        return torch.cat(parts, -1)[..., self.order]

    @classmethod
    def stepped(cls, made, step: int, steps: int) -> None:
        allocate(made, step)
