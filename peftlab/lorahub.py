"""LoraHub: for a new task with a few examples, the weights of trained LoRAs are searched for, without a gradient.

    print(lorahub(model, rows, tokenizer, of=("sql", "reviews", "voices"), name="hub"))

Source: Huang et al. 2023, arXiv:2307.13269.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from .attach import activate, adapters, check_attached, detach
from .lowrank import attach_products, product_of
from .rows import collate, encode
from .runtime import mode
from .texts import pad_of


@dataclass(frozen=True)
class Hub:
    """What the search found."""

    weights: dict[str, float]
    losses: list[float]  # the best objective after each trial, the first at w = 0

    def __repr__(self) -> str:
        found = ", ".join(f"{name} {w:+.3f}" for name, w in self.weights.items())
        trials = len(self.losses) - 1
        return f"{found}; objective {self.losses[0]:.4f} at 0, {self.losses[-1]:.4f} after {trials} trials"


def evolve(objective: Callable[[Tensor], float], n: int, trials: int, bound: float, seed: int) -> tuple[Tensor, list]:
    """Minimise over w in [−bound, bound]ⁿ, from 0:  w′ = w + σ·N(0, I), kept if it is no worse.

    A (1+1) evolution strategy: σ grows by 3/2 with each success and falls by its fourth root with each failure, which
    is steady where one trial in five succeeds. Returns (the best w, the best value after each trial); a value that is
    no number counts as a failure. (The paper lets the library nevergrad choose the strategy.)
    Source: Rechenberg 1973, "Evolutionsstrategie": the rule of one fifth.
    """
    draw = torch.Generator().manual_seed(seed)
    w, sigma = torch.zeros(n), bound / 3
    values = [objective(w)]
    for _ in range(trials):
        trial = (w + sigma * torch.randn(n, generator=draw)).clamp(-bound, bound)
        value = objective(trial)
        better = isfinite(value) and value <= values[-1]
        w, sigma = (trial, sigma * 1.5) if better else (w, sigma * 1.5**-0.25)
        values.append(value if better else values[-1])
    return w, values


def lorahub(model: nn.Module, rows: Any, tokenizer: Any = None, *, of: Sequence[str], name: str = "hub",
            trials: int = 40, bound: float = 1.5, l1: float = 0.05, seed: int = 0) -> Hub:  # fmt: skip
    """LoraHub: attach the sum of trained LoRAs that suits a few rows best, as `name`, and make it active.

    ΔW = (Σ wᵢ·Bᵢ)·(Σ wᵢ·Aᵢ) with the w that `evolve` finds for the objective: loss on the rows + l1·Σ|wᵢ|, 1 + `trials`
    times one pass without gradient. Factors are summed, as in the paper, so all must have one rank; and since B·c and
    A/c are the same LoRA, but not in a sum, they should come from one recipe. rows: a few examples, as for `train`; all
    in one batch. The LoRAs of `of` stay as they are.
    Raises ValueError for fewer than two, adapters that are no B·A, other ranks or other layers.
    Source: Huang et al. 2023, arXiv:2307.13269.
    """
    if isinstance(of, str) or len(of) < 2:
        raise ValueError(f"of={of!r}: name two or more attached LoRAs, such as of=('sql', 'reviews')")
    check_attached(model, of)
    factors: list[dict[str, tuple[Tensor, Tensor]]] = []
    for one in of:
        found = {path: product_of(adapter) for path, adapter in adapters(model)[one].items()}
        if not all(found.values()):
            raise ValueError(f"{one!r} is no LoRA in every layer; only products B·A have factors to sum")
        factors.append({path: (f[0], f[2] * f[1]) for path, f in found.items() if f})
    for one, mine in zip(of, factors, strict=True):
        if {p: f[0].shape for p, f in mine.items()} != {p: f[0].shape for p, f in factors[0].items()}:
            raise ValueError(f"{one!r} and {of[0]!r} have other layers or ranks, so their factors cannot be summed")
    encoded = encode(model, rows, tokenizer, None)
    device = next(iter(factors[0].values()))[0].device
    batch = collate(encoded, pad_of(model, tokenizer), device)
    attach_products(model, name, factors[0])

    @torch.no_grad()
    def put(w: Tensor) -> None:
        for path, adapter in adapters(model)[name].items():
            for i, parameter in enumerate((adapter.lora_A, adapter.lora_B)):
                parameter.copy_(sum(float(x) * f[path][i] for x, f in zip(w, factors, strict=True)))

    @torch.no_grad()
    def objective(w: Tensor) -> float:
        put(w)
        return (model(**batch).loss + l1 * w.abs().sum()).item()

    try:
        with mode(model, training=False):
            w, losses = evolve(objective, len(of), trials, bound, seed)
    except BaseException:
        detach(model, name)
        raise
    put(w)
    activate(model, name)
    return Hub(dict(zip(of, w.tolist(), strict=True)), losses)
