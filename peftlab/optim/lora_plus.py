"""LoRA+: B learns faster than A. Hayou et al. 2024, arXiv:2402.12354."""

from __future__ import annotations

import torch
from torch import nn

from ..hyper import checks
from ._pairs import Maker, pairs


@checks
def lora_plus(model: nn.Module, lr: float, ratio: float = 16.0, weight_decay: float = 0.0) -> Maker:
    """AdamW with two learning rates: η for A, λ·η for B.

    In a wide layer, equal rates leave one of the two factors learning next to nothing: B begins at zero and has to
    reach the size of 1, A begins at 1/√in. Nothing else differs from AdamW, neither memory nor time.

    ratio: λ, 16 in the paper's recipe; 1 is AdamW. Take η about half of what plain LoRA likes. What has one dimension
    (biases, DoRA's magnitudes) learns at B's rate and is not decayed; all else, a head for instance, at A's.
    ValueError if no B is trained or ratio is not positive.
    Source: Hayou et al. 2024, arXiv:2402.12354, "LoRA+: Efficient low rank adaptation of large models".
    """
    if ratio <= 0:
        raise ValueError(f"ratio={ratio!r} must be positive: 16 is the paper's, 1 is AdamW")
    B = {id(pair.B) for pair in pairs(model, of_experts=True)}

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        flat = [p for p in parameters if p.ndim == 1]
        fast = [p for p in parameters if id(p) in B]
        slow = [p for p in parameters if id(p) not in B and p.ndim != 1]
        groups = [
            {"params": slow, "lr": lr, "weight_decay": weight_decay},
            {"params": fast, "lr": ratio * lr, "weight_decay": weight_decay},
            {"params": flat, "lr": ratio * lr, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]])

    return make
