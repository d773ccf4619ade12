"""LoRA-GA: let the first step go where full fine-tuning would. Wang, Yu and Li 2024, arXiv:2407.05000."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..hyper import checks
from ..layers import shape_of
from ._common import begin, check_values, svd, untrained
from ._data import batches, gradients

DIRECTIONS = {  # which of the first 2r singular vectors go to A and which to B
    "ArB2r": lambda r: (slice(r), slice(r, 2 * r)),
    "A2rBr": lambda r: (slice(r, 2 * r), slice(r)),
    "ArBr": lambda r: (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
}


@checks
def lora_ga(model: nn.Module, data: Any, tokenizer: Any = None, name: str = "default", *, direction: str = "ArB2r",
            gamma: float = 16, batch_size: int = 16) -> nn.Module:  # fmt: skip
    """Begin an untrained LoRA at the singular vectors of the first gradient of full fine-tuning.

        U·diag(σ)·Vᵀ ← ∂loss/∂W on the data;  A₀ = c·V[1…r]ᵀ, B₀ = c·U[r+1…2r], c = ⁴√out/√gamma
        h = W₀x + s·(BA − B₀A₀)·x

    One step of A and B changes s·BA by −η·s²·(B₀B₀ᵀ·G + G·A₀ᵀA₀), G the gradient: with these A₀, B₀ the best answer of
    that form to a step along G: c²·s² times its 2r largest singular values. With rslora, c keeps the size of what is
    added to the output the same at every width and rank.
    direction: "ArB2r" as above (the paper's), "A2rBr" the other way round, "ArBr" in turn.

    data: rows as `train` takes them, in batches of batch_size, or batches: the mean over all of them. Costs a training
    step of all layers, out·in numbers for each. Works on packed layers. For the start that is subtracted see `_common`.
    Raises ValueError for an adapter that is trained, merged or no LoRA, for no data or labels, for a layer without a
    gradient, and for ranks above min(in, out)/2; the model is then as it was. Returns the model.

    HF PEFT 0.21 multiplies B by the singular values too, which neither the paper nor its code does: B begins as small
    as the gradient is, and the scale depends on the loss.
    Source: Wang, Yu and Li 2024, arXiv:2407.05000, section 3.
    """
    if direction not in DIRECTIONS or gamma <= 0:
        raise ValueError(f"direction={direction!r}, gamma={gamma!r}: need one of {list(DIRECTIONS)}, and gamma > 0")
    there = untrained(model, name, "LoRA-GA")
    check_values(there)
    for path, adapter in there.items():
        r, shape = len(adapter.lora_A), shape_of(adapter.layer)
        if 2 * r > min(shape):
            raise ValueError(f"LoRA-GA gives r={r} singular vectors to A and as many to B, and {path!r}, "
                             f"{shape[0]}×{shape[1]}, has only {min(shape)}; take a smaller r")  # fmt: skip
    found = gradients(model, {path: a.layer for path, a in there.items()},
                      batches(model, data, tokenizer, batch_size, "LoRA-GA"))  # fmt: skip
    made = {path: factors(found[path], len(a.lora_A), direction, gamma) for path, a in there.items()}
    for path, (A, B) in made.items():
        begin(there[path], A, B)
    return model


@torch.no_grad()
def factors(G: Tensor, r: int, direction: str = "ArB2r", gamma: float = 16) -> tuple[Tensor, Tensor]:
    """G (out, in) -> A (r, in), B (out, r)."""
    U, _, Vt = svd(G, 2 * r, niter=4)
    first, second = DIRECTIONS[direction](r)
    c = len(G) ** 0.25 / gamma**0.5
    return c * Vt[first], c * U[:, second]
