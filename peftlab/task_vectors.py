"""Several changes of the same weights made into one: each way from its paper, as a plain function of tensors.

τᵢ are changes of the same weights (task vectors: tuned − base), tensors of one shape; wᵢ are their weights. What they
are changes of is for the caller to say: whole matrices ΔW, as in the papers, or the factors A and B of a LoRA.
A way is two steps: thin each change out (or not), then join them (see `RULES`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def trim(vector: Tensor, density: float) -> Tensor:
    """Keep the `density` of its numbers that are largest in size, ⌊density·n⌋ of them; the others become 0.

    density: 0 < density ≤ 1, in TIES-Merging k = 100·density %. Raises ValueError if it would keep none.
    Source: Yadav et al. 2023, TIES-Merging, arXiv:2306.01708, section 4.2, step 1.
    """
    n = vector.numel()
    kept = int(density * n)
    if not kept:
        raise ValueError(f"density={density} keeps none of {n} numbers; take at least {1 / n:.2g}")
    mask = torch.zeros_like(vector).flatten()
    mask[vector.abs().flatten().topk(kept).indices] = 1
    return vector * mask.view_as(vector)


def drop(vector: Tensor, density: float, draw: torch.Generator | None = None) -> Tensor:
    """DARE: set each number to 0 with probability p = 1 − density, and divide the others by 1 − p; E[drop(τ)] = τ.

    draw: a generator on the CPU, None: torch's own; so masks are the same on each device.
    Source: Yu et al. 2023, "Language models are Super Mario", arXiv:2311.03099, section 3.
    """
    mask = torch.bernoulli(torch.full(vector.shape, density), generator=draw)
    return vector * mask.to(vector) / density


def weighted_sum(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Task arithmetic: τ = Σ wᵢ·τᵢ. A negative weight is meant to forget a task.

    Source: Ilharco et al. 2022, "Editing models with task arithmetic", arXiv:2212.04089, section 2.
    """
    return _weighted(vectors, weights).sum(0)


def elected_sign(vectors: Sequence[Tensor], method: str = "total") -> Tensor:
    """+1 or −1 for each place: the sign with the larger sum of sizes ("total"), or held more often ("frequency").

    A tie is +1. Source: Yadav et al. 2023, arXiv:2306.01708, section 4.2, step 2, which has "total".
    """
    stack = torch.stack(list(vectors))
    votes = {"total": stack, "frequency": stack.sign()}[method].sum(0)
    return torch.where(votes >= 0, 1, -1)


def elected_mean(vectors: Sequence[Tensor], weights: Sequence[float], method: str = "total") -> Tensor:
    """At each place the mean of wᵢ·τᵢ over those τᵢ that have the elected sign; 0 has none and is not counted.

    The weights have no say in the election, so a negative weight does not turn a vote. With all wᵢ = λ this is the
    paper's λ·τ, as HF PEFT generalises it.
    Source: Yadav et al. 2023, arXiv:2306.01708, section 4.2, steps 2 and 3.
    """
    agree = torch.stack(list(vectors)).sign() == elected_sign(vectors, method)
    return (_weighted(vectors, weights) * agree).sum(0) / agree.sum(0).clamp(min=1)


def _weighted(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    stack = torch.stack(list(vectors))
    return stack * torch.tensor(list(weights), device=stack.device).view(-1, *[1] * (stack.dim() - 1))


class Rule(NamedTuple):
    """How changes are thinned out (None, `trim` or `drop`), and whether places are joined by an election."""

    thin: Callable[..., Tensor] | None
    elects: bool


RULES = {
    "linear": Rule(None, False),  # task arithmetic; with equal weights 1/n a model soup, arXiv:2203.05482
    "magnitude_prune": Rule(trim, False),
    "ties": Rule(trim, True),
    "dare_linear": Rule(drop, False),
    "dare_ties": Rule(drop, True),
}


def join(rule: str, vectors: Sequence[Tensor], weights: Sequence[float], density: float = 1.0, method: str = "total",
         draw: torch.Generator | None = None) -> Tensor:  # fmt: skip
    """One change out of several, by one of `RULES`. method: of the election; draw: see `drop`."""
    thin, elects = RULES[rule]
    if thin is trim:
        vectors = [trim(v, density) for v in vectors]
    elif thin is drop:
        vectors = [drop(v, density, draw) for v in vectors]
    return elected_mean(vectors, weights, method) if elects else weighted_sum(vectors, weights)
