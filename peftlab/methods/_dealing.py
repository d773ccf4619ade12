"""How few trained numbers are dealt out to many places: for VB-LoRA (arXiv:2405.15179), Uni-LoRA (arXiv:2506.00799) and
TinyLoRA (arXiv:2602.04118), as HF PEFT does it, so that a seed means the same."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def fitting(*sizes: int) -> int:
    """The greatest divisor of all of these up to 256, HF PEFT's default."""
    common = math.gcd(*sizes)
    return max(b for b in range(1, 257) if common % b == 0)


def assignment(D: int, d: int, seed: int) -> Tensor:
    """Which of d numbers each of D is a copy of: each ⌊D/d⌋ or ⌈D/d⌉ times, in random order; drawn as HF PEFT does."""
    import numpy as np

    draw, each = np.random.default_rng(seed), np.repeat(np.arange(d), D // d)
    rest = draw.choice(d, size=D % d, replace=False) if D % d else each[:0]
    dealt = np.concatenate([each, rest])
    draw.shuffle(dealt)
    return torch.as_tensor(dealt, dtype=torch.long)


def groups(n: int, weight_tying: float) -> list[int]:
    """The group of each of n targets: n·(1 − tying) of them or so, of neighbours; the last has what is left over."""
    number = max(1, round(n * (1 - weight_tying)))
    return [min(i // max(1, n // number), number - 1) for i in range(n)]
