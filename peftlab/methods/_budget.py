"""AdaLoRA's budget: which triplets stay. Zhang et al. 2023, arXiv:2303.10512, section 3.2 and 3.3, algorithm 1."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def keep_the_best(made, step: int, steps: int) -> None:
    """After a step: note how important each number was; when it is time, set E of the least important triplets to 0.

    What is dropped may come back, since E goes on learning, until `tfinal` steps before the end; then the choice stays.
    """
    one = next(iter(made.values())).hyper
    first, last = one["tinit"], steps - one["tfinal"]
    if first >= last:
        raise ValueError(f"tinit={first} and tfinal={one['tfinal']} leave none of the {steps} steps for choosing ranks")
    if step < last:
        for adapter in made.values():
            observe(adapter)
    if step > last:
        for adapter in made.values():
            adapter.lora_E.mul_(adapter.mask[:, None])
    elif step == last or (step > first and step % one["deltaT"] == 0):
        whole, target = (sum(a.hyper[name] for a in made.values()) for name in ("r", "target_r"))
        allocate(made, int(target + (whole - target) * (1 - (step - first) / (last - first)) ** 3))


def observe(adapter) -> None:
    """I = |θ·∂L/∂θ| of each number, about what the loss would lose without it; its running mean Ī, and that of |I − Ī|:
    an I that jumps from batch to batch is uncertain, and kept for that (equations 8 to 10)."""
    beta1, beta2 = adapter.hyper["beta1"], adapter.hyper["beta2"]
    for name, p in adapter.named_parameters():
        mean, spread = getattr(adapter, f"mean_{name}"), getattr(adapter, f"spread_{name}")
        importance = (p * p.grad).abs()
        mean.lerp_(importance, 1 - beta1)
        spread.lerp_((importance - mean).abs(), 1 - beta2)


def score(adapter) -> Tensor:
    """(r,): a triplet's importance, Ī·spread of E plus the means of those of its row of A and its column of B."""
    A, E, B = (getattr(adapter, f"mean_{n}") * getattr(adapter, f"spread_{n}") for n in ("lora_A", "lora_E", "lora_B"))
    return E[:, 0] + A.mean(1) + B.mean(0)


@torch.no_grad()
def allocate(made, budget: int) -> None:
    """Keep the `budget` best triplets of all layers; of equals at the border, none."""
    scores = {path: score(adapter) for path, adapter in made.items()}
    ranked = torch.cat(list(scores.values())).sort().values
    border = ranked[len(ranked) - budget - 1] if budget < len(ranked) else ranked[0] - 1
    for path, adapter in made.items():
        adapter.mask.copy_(scores[path] > border)
        adapter.lora_E.mul_(adapter.mask[:, None])
