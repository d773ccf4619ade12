"""What a transformer block gives out, for methods that read or change it. The first: LoReFT, arXiv:2404.03592."""

from __future__ import annotations

from torch import Tensor, nn

from ..layers import is_linear
from ..sites import _takes
from ._bottleneck import site_shape


def width_of(block: nn.Module) -> int:
    """D, the width of the hidden states: what a block's first linear layer reads; what a linear layer gives."""
    if _takes(block, "input_ids") or "Pooler" in type(block).__name__:
        raise ValueError(f"{type(block).__name__} gives out other things than (B, T, D) hidden states; choose blocks")
    return site_shape(block)[0 if is_linear(block) else 1]


def hidden(out) -> Tensor:
    """The hidden states (B, T, D) among what a block gives: some families give them alone, others first in a tuple."""
    return out[0] if isinstance(out, tuple) else out


def with_hidden(out, h: Tensor):
    """What a block gives, with other hidden states."""
    return (h, *out[1:]) if isinstance(out, tuple) else h
