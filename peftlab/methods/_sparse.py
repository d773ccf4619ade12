"""What the sparse methods share: values on fixed places of a weight, and the best places. arXiv:2406.13175."""

from __future__ import annotations

import torch
from torch import Tensor


def scattered(values: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """ΔW (out, in) with `values` (k,) at the flat, row-major `places` (k,) and zeros elsewhere."""
    return values.new_zeros(shape[0] * shape[1]).scatter(0, places.long(), values).view(shape)


def top(scores: Tensor, k: int, largest: bool = True) -> Tensor:
    """The flat places (k,) of the k highest (or lowest) scores, best first; int32 as in HF PEFT's files."""
    return torch.topk(scores.flatten(), k, largest=largest).indices.int()
