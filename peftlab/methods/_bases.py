"""RandLoRA's random bases, drawn as HF PEFT draws them, for the same numbers from a seed. arXiv:2502.00987."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..layers import device_of
from ._shared import seeded, uniform


def bases(one, few: int, many: int) -> tuple[Tensor, Tensor]:
    """A (r, 1, few) and B (many, N, r) for an adapter `one` and all that share with it, each of deviation 1."""
    draw, r, N = seeded(one.seed), one.r, -(-few // one.r)
    if one.sparse or one.very_sparse:
        A, B = (ternary(draw, one, *shape, share=1 / math.sqrt(few) if one.very_sparse else 1 / 3)
                for shape in ((r, 1, few), (many, N, r)))  # fmt: skip
    else:  # in bfloat16, and B basis by basis
        A, *parts = (uniform(draw, one, *shape, dtype=torch.bfloat16, slope=math.sqrt(5))
                     for shape in ((r, 1, few), *((many, 1, r) for _ in range(N))))  # fmt: skip
        B = torch.cat(parts, 1)
    return (A / A.std()).float(), (B / B.std()).float()


def ternary(draw: torch.Generator, like, *shape: int, share: float) -> Tensor:
    """−1 and 1, each with half the probability `share`, else 0: Li, Hastie and Church 2006, "Very sparse random
    projections", KDD."""
    if (device := device_of(like.layer)).type == "meta":
        return torch.empty(shape, device="meta")
    u = torch.rand(shape, generator=draw, device="cpu")
    return ((u > 1 - share / 2).float() - (u < share / 2).float()).to(device)
