"""RoAd: turn and stretch a layer's outputs in pairs. Liao and Monz 2024, arXiv:2409.00119."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ..sites import at, bare

VARIANTS = {"road_1": 1, "road_2": 2, "road_4": 4}  # θ for each pair of outputs, and as many α


class RoAd(Adapter):
    """RoAd: rotate pairs of a frozen layer's outputs by trained angles, and scale them.

    h = R·(W₀x + b), where R takes each pair (y₁, y₂) to α·(y₁·cos θ − y₂·sin θ, y₁·sin θ + y₂·cos θ). θ starts at 0 and
    α at 1, so training starts at the base. Only products entry by entry: as cheap as (IA)³, and it merges.

    Pairs are within groups: the i-th of the first half of a group with the i-th of the second half.
    variant: how many θ and α a pair has. "road_1": one of each; "road_2": one for each of its two rows; "road_4": one
    for each of the four entries of its matrix. group_size: even, divides out; by default the greatest up to 64 that
    divides the outputs of all targets.
    Trained: out, 2·out or 4·out. Raises ValueError for another variant or a group size that does not fit.
    Source: Liao and Monz 2024, "3-in-1: 2D rotary adaptation", arXiv:2409.00119, section 3.2, equation 4.
    """

    family, hf_type = "orthogonal", "ROAD"
    hf_hyper = {"variant": "variant", "group_size": "group_size"}

    def __init__(self, layer: nn.Module, variant: str = "road_1", group_size: int | None = None):
        super().__init__(layer)
        out_features, _ = shape_of(layer)
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} is none of {', '.join(VARIANTS)}")
        group_size = group_size or fitting(out_features)
        if group_size < 2 or group_size % 2 or out_features % group_size:
            raise ValueError(f"group_size={group_size} must be even and divide the layer's {out_features} outputs")
        n = VARIANTS[variant] * out_features // 2
        self.road_theta, self.road_alpha = nn.Parameter(torch.zeros(n)), nn.Parameter(torch.ones(n))
        self.variant, self.half = variant, group_size // 2

    @classmethod
    def plan(cls, model, paths, hyper):
        """One group size for all targets, as files have it."""
        group = hyper.get("group_size") or fitting(*(shape_of(bare(at(model, path)))[0] for path in paths))
        return {path: (cls, {**hyper, "group_size": group}) for path in paths}

    @staticmethod
    def size(out_features: int, in_features: int, variant: str = "road_1", **_) -> int:
        """out, 2·out or 4·out"""
        return VARIANTS[variant] * out_features

    def columns(self) -> tuple[Tensor, Tensor]:
        """(α·cos θ, α·sin θ) for each output, (out,) each: what it takes of itself, and of its partner."""
        theta, alpha = self.road_theta, self.road_alpha
        if self.variant == "road_4":  # in each group first the numbers of all cosines, then those of all sines
            shape = (-1, 2, 2 * self.half)
            (c, s), (a, b) = theta.view(shape).unbind(1), alpha.view(shape).unbind(1)
            return (a * c.cos()).flatten(), (b * s.sin()).flatten()
        if self.variant == "road_1":  # both halves of a group share
            theta, alpha = (t.view(-1, self.half).repeat_interleave(2, 0).flatten() for t in (theta, alpha))
        return alpha * theta.cos(), alpha * theta.sin()

    def forward(self, f, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        y, (own, partner) = f(x), self.columns()
        first, second = y.unflatten(-1, (-1, 2, self.half)).unbind(-2)
        turned = torch.stack([-second, first], dim=-2).flatten(-3)
        return (own * y + partner * turned).to(y.dtype)


def fitting(*outputs: int) -> int:
    """The greatest even number up to 64, HF PEFT's default, that divides all of these."""
    common = math.gcd(*outputs)
    if common % 2:
        raise ValueError(f"no even number divides all targets' outputs, {sorted(set(outputs))}: there are odd ones")
    return max(n for n in range(2, 65, 2) if common % n == 0)
