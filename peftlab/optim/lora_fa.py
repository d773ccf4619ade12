"""LoRA-FA: A stays as it was drawn, B follows the best gradient that leaves. Zhang et al. 2023, arXiv:2308.03303."""

from __future__ import annotations

import torch
from torch import nn

from ..hyper import checks
from ._pairs import Maker, Pair, among, inverse, pairs, refuse


class LoRAFA(torch.optim.AdamW):
    """AdamW on g_B·(A·Aᵀ)⁻¹/s² instead of g_B. See `lora_fa`."""

    def __init__(self, parameters: list[nn.Parameter], there: list[Pair], lr: float, weight_decay: float):
        super().__init__(parameters, lr=lr, weight_decay=weight_decay)
        self.there = there

    @torch.no_grad()
    def step(self, closure=None):
        refuse(closure)
        for A, B, s in self.there:
            if B.grad is not None:
                by_A = inverse(A @ A.T, 1e-8)
                B.grad = (B.grad.to(by_A.dtype) @ by_A / s**2).to(B.dtype)
        super().step()


@checks
def lora_fa(model: nn.Module, lr: float, weight_decay: float = 0.0) -> Maker:
    """Freeze every A; train B by AdamW on its corrected gradient.

    With A frozen, a step of B by −η·g̃ changes W by −η·s·g̃·A. Nearest to full fine-tuning's −η·G is

        g̃ = (1/s²)·g_B·(A·Aᵀ)⁻¹,    with g_B = s·G·Aᵀ from the backward pass: s·g̃·A is G projected on A's rows

    Half of the trained parameters and of the optimizer's states, and for the backward pass a layer keeps A·x alone, not
    its input x, which only A's gradient needs. One inverse (r, r) a layer and step. Without dropout on A's input.

    ValueError if no LoRA is attached. Undo the freezing by `pl.freeze(model, name, frozen=False)`.
    HF PEFT's (0.21) multiplies in bfloat16 wherever the machine can, which rounds the gradients to 3 digits.
    Source: Zhang et al. 2023, arXiv:2308.03303; the corrected gradient is in its second version.
    """
    there = pairs(model)
    for A, _, _ in there:
        A.requires_grad_(False)
    return lambda parameters: LoRAFA(parameters, among(parameters, there), lr, weight_decay)
