"""LoRA-Pro: A and B move so that W moves as in full fine-tuning, as nearly as they can. arXiv:2407.18242."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..hyper import checks
from ._pairs import Maker, Pair, adam, among, inverse, products, refuse

DAMPING = 1e-8  # on BᵀB and AAᵀ, of the authors' code: B begins at zero


def nearest(pair: Pair, g_A: Tensor, g_B: Tensor) -> tuple[Tensor, Tensor]:
    """The (g_A, g_B) for which s·B·g_A + s·g_B·A is nearest to G, where the ones given are s·Bᵀ·G and s·G·Aᵀ.

        g_A ← (BᵀB)⁻¹·g_A/s² + X·A,    g_B ← (I − B·(BᵀB)⁻¹·Bᵀ)·g_B·(AAᵀ)⁻¹/s² − B·X

    Any X (r, r) moves W alike. This one moves A and B least away from their own gradients:
    BᵀB·X + X·AAᵀ = −(BᵀB)⁻¹·g_A·Aᵀ/s², which is diagonal in the eigenvectors of BᵀB and AAᵀ.
    """
    A, B, s = pair
    BtB, AAt = B.T @ B, A @ A.T
    first = inverse(BtB, DAMPING) @ g_A / s**2
    second = (g_B - B @ (inverse(BtB, DAMPING) @ (B.T @ g_B))) @ inverse(AAt, DAMPING) / s**2
    (b, U), (a, V) = torch.linalg.eigh(BtB), torch.linalg.eigh(AAt)
    X = U @ ((U.T @ -(first @ A.T) @ V) / (b[:, None] + a + DAMPING)) @ V.T
    return first + X @ A, second - B @ X


class LoRAPro(torch.optim.AdamW):
    """AdamW in the space of W, its steps carried back to A and B. See `lora_pro`."""

    def __init__(self, parameters: list[nn.Parameter], there: list[Pair], lr: float, weight_decay: float):
        super().__init__(parameters, lr=lr, weight_decay=weight_decay)
        self.there = there

    @torch.no_grad()
    def step(self, closure=None):
        refuse(closure)
        group = self.param_groups[0]
        for pair in self.there:
            if pair.A.grad is not None and pair.B.grad is not None:
                exact = torch.promote_types(pair.B.dtype, torch.float32)
                A, B, s = wide = Pair(pair.A.to(exact), pair.B.to(exact), pair.s)
                g_A, g_B = nearest(wide, pair.A.grad.to(exact), pair.B.grad.to(exact))
                moved = (s * (B @ g_A + g_B @ A)).to(pair.B.dtype)  # (out, in)
                G = adam(self.state[pair.B], moved, group).to(exact)
                g_A, g_B = nearest(wide, s * B.T @ G, s * G @ A.T)
                for p, g in ((pair.A, g_A), (pair.B, g_B)):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_((group["lr"] * g).to(p.dtype))
                    p.grad = None  # what is left has AdamW's own step
        super().step()


@checks
def lora_pro(model: nn.Module, lr: float, weight_decay: float = 0.0) -> Maker:
    """Train LoRA by the steps that full fine-tuning would take, each replaced by the nearest that B·A can follow.

    A step of A and B by −η·g_A and −η·g_B changes W by −η·G̃ with G̃ = s·B·g_A + s·g_B·A. Of all (g_A, g_B), `nearest`
    gives the best approximation of the full gradient, from nothing but LoRA's own gradients. Adam's moments are those
    of G̃, and its step is carried back by the same formula.

    Costs two moments (out, in) a layer: as many numbers as full fine-tuning keeps, which is the price of the method.
    ValueError if no LoRA, or another adapter with A and B, is trained.
    Source: Wang, Liang et al. 2024, arXiv:2407.18242, theorems in section 2 and the algorithm with AdamW; the authors'
    code also decays the frozen weight.
    """
    there = products(model)
    return lambda parameters: LoRAPro(parameters, among(parameters, there), lr, weight_decay)
