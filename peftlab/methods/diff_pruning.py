"""Diff pruning: learn which weights to change. Guo et al. 2021, arXiv:2012.07463."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of

LOW, HIGH = -1.5, 1.5  # l and r: how far gates are stretched beyond 0 and 1, so that they can be exactly 0 and 1


class DiffPruning(Adapter):
    """Diff pruning: the change of each weight has a gate that training may shut; a penalty asks it to.

    h = W₀x + δ·x, δ = z·z_g ⊙ w, with w (out, in) from zeros, z (out, in) a gate an entry, and z_g one for the matrix:
        z = min(1, max(0, s·(r − l) + l)),  s = σ(log u − log(1 − u) + α),  u uniform in 0…1;  u = ½ when not training
    The expected number of entries that are not zero is a smooth function of the gates' α, P(z > 0) =
    σ(α − log(−l/r)), and the penalty is λ times that: p·p_g summed over the matrix.

    Unlike other methods it trains more than the weight itself has, two numbers an entry; what is small is the result:
    `inits.project` keeps the largest entries of δ as a FishMask, whose values the paper then trains on. The file of
    this adapter holds all of w and α.
    penalty_weight: λ. alpha: where all gates start; 5 is open. structured: with z_g.
    Trained: 2·out·in, and 1 if structured. Raises ValueError for a λ below 0.
    Source: Guo et al. 2021, arXiv:2012.07463; the gates: Louizos et al. 2018, arXiv:1712.01312.
    """

    family = "selective and sparse"

    def __init__(self, layer: nn.Module, penalty_weight: float = 1.25e-7, alpha: float = 5.0, structured: bool = True):
        super().__init__(layer)
        if penalty_weight < 0:
            raise ValueError(f"penalty_weight={penalty_weight} would reward changes; take 0 or more")
        shape = shape_of(layer)
        self.w, self.alpha = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.full(shape, float(alpha)))
        self.alpha_group = nn.Parameter(torch.full((1,), float(alpha))) if structured else None
        self.penalty_weight = penalty_weight

    @staticmethod
    def size(out_features: int, in_features: int, structured: bool = True, **_) -> int:
        """2·out·in + 1"""
        return 2 * out_features * in_features + structured

    def gate(self, alpha: Tensor) -> Tensor:
        """z for gates of this α: drawn anew in each pass of training."""
        u = torch.rand_like(alpha).clamp(1e-6, 1 - 1e-6) if self.training else torch.full_like(alpha, 0.5)
        return (torch.sigmoid(u.log() - (1 - u).log() + alpha) * (HIGH - LOW) + LOW).clamp(0, 1)

    def change_of_weight(self) -> Tensor:
        """δ (out, in)"""
        z = self.gate(self.alpha)
        return z * self.w if self.alpha_group is None else z * self.gate(self.alpha_group) * self.w

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return x @ self.change_of_weight().T

    def expected_changes(self) -> Tensor:
        """E‖δ‖₀: how many entries will not be zero."""
        shift = torch.tensor(-LOW / HIGH).log().item()
        open_ = torch.sigmoid(self.alpha - shift).sum()
        return open_ if self.alpha_group is None else open_ * torch.sigmoid(self.alpha_group - shift).sum()

    def penalty(self) -> Tensor | None:
        return self.penalty_weight * self.expected_changes() if self.penalty_weight else None
