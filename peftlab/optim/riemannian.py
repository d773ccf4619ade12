"""Riemannian preconditioned LoRA: the gradient of each factor, scaled by the other. arXiv:2402.02347."""

from __future__ import annotations

import torch
from torch import nn

from ..hyper import checks
from ._pairs import Maker, Pair, among, inverse, pairs, refuse


class ScaledAdamW(torch.optim.AdamW):
    """AdamW on (BᵀB + δI)⁻¹·g_A and g_B·(AAᵀ + δI)⁻¹. See `riemannian`."""

    def __init__(self, parameters: list[nn.Parameter], there: list[Pair], lr: float, reg: float, weight_decay: float):
        super().__init__(parameters, lr=lr, weight_decay=weight_decay)
        self.there, self.reg = there, reg

    @torch.no_grad()
    def step(self, closure=None):
        refuse(closure)
        for A, B, _ in self.there:
            by_B, by_A = inverse(B.T @ B, self.reg), inverse(A @ A.T, self.reg)
            if A.grad is not None:
                A.grad = (by_B @ A.grad.to(by_B.dtype)).to(A.dtype)
            if B.grad is not None:
                B.grad = (B.grad.to(by_A.dtype) @ by_A).to(B.dtype)
        super().step()


@checks
def riemannian(model: nn.Module, lr: float, reg: float = 1e-2, weight_decay: float = 0.0) -> Maker:
    """AdamW after a preconditioner of r×r for each factor of LoRA.

        g_A ← (BᵀB + δI)⁻¹·g_A,    g_B ← g_B·(AAᵀ + δI)⁻¹

    B·A and (B·M⁻¹)·(M·A) are the same change for any invertible M, yet plain gradients move it differently. In the
    metric of this preconditioner they move it alike (for δ = 0 and without Adam's moments, exactly), so that a badly
    balanced pair learns as fast as a balanced one. Two inverses (r, r) a layer and step.

    reg: δ, which keeps the inverses finite, for B begins at zero. ValueError if it is not positive, or without LoRA.
    Source: Zhang and Pilanci 2024, arXiv:2402.02347, "Riemannian preconditioned LoRA for fine-tuning foundation
    models".
    """
    if reg <= 0:
        raise ValueError(f"reg={reg!r} must be positive: B begins at zero, and BᵀB could not be inverted")
    there = pairs(model)
    return lambda parameters: ScaledAdamW(parameters, among(parameters, there), lr, reg, weight_decay)
