"""What the bottleneck methods share: the two thin layers, their width and their activations. arXiv:1902.00751."""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import nn

from ..layers import is_linear, shape_of
from ..sites import bare, sites

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "identity": lambda x: x}


def checked_activation(name: str) -> str:
    """The name; ValueError if there is no such activation. Names are kept, since functions do not belong in files."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
    return name


def bottleneck_width(width: int, reduction: float, bottleneck: int | None) -> int:
    """b: `bottleneck` if given, else width / reduction rounded down. ValueError unless 1 ≤ b ≤ width."""
    b = int(width // reduction) if bottleneck is None and reduction > 0 else bottleneck
    if b is None or not 1 <= b <= width:
        wrong = f"reduction={reduction}" if bottleneck is None else f"bottleneck={bottleneck}"
        raise ValueError(f"{wrong} gives no bottleneck of a width of 1…{width}; choose bottleneck=1…{width}, "
                         f"or reduction=1…{width}")  # fmt: skip
    return b


def down_and_up(in_features: int, b: int, out_features: int) -> tuple[nn.Linear, nn.Linear]:
    """The layers in → b and b → out. The second starts at zero, so that training starts exactly at the base."""
    down, up = nn.Linear(in_features, b), nn.Linear(b, out_features)
    for zero in (down.bias, up.weight, up.bias):
        nn.init.zeros_(zero)
    return down, up


def check_network(site: nn.Module) -> None:
    """ValueError for a module that is not simply called as f(x) -> y: a block, attention, a whole model, a pooler."""
    kind = type(site).__name__
    more = {"input_ids", "attention_mask", "past_key_values", "position_embeddings"} & {
        *inspect.signature(type(site).forward).parameters}  # fmt: skip
    if more or "Pooler" in kind:
        raise ValueError(f"{kind} is no network from x to y of the same tokens; choose the feed-forward net inside of "
                         "it, or a linear layer")  # fmt: skip


def site_shape(site: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, or of a module as its first and last linear layers have it."""
    if is_linear(site):
        return shape_of(site)
    linear = [bare(m) for m in sites(site).values() if is_linear(bare(m))]
    if not linear:
        raise ValueError(f"{type(site).__name__} holds no linear layer that tells its width; choose other targets")
    return shape_of(linear[-1])[0], shape_of(linear[0])[1]
