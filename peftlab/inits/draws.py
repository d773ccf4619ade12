"""Random starts of a LoRA: its own, HF PEFT's "gaussian", and two factors that are both trained from the first step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..hyper import checks
from ._common import fill, untrained

if TYPE_CHECKING:
    from ..methods.lora import LoRA

    Draw = Callable[[LoRA, torch.Generator], tuple[Tensor, Tensor | None]]


@checks
def kaiming(model: nn.Module, name: str = "default", seed: int = 0) -> nn.Module:
    """A uniform in ±1/√in, B zero: how LoRA begins by itself, drawn anew from `seed`. Returns the model.

    Source: the paper's code, as nn.Linear: Kaiming uniform with a = √5.
    """

    def draw(adapter: LoRA, generator: torch.Generator) -> tuple[Tensor, None]:
        return nn.init.kaiming_uniform_(torch.empty(adapter.lora_A.shape), a=math.sqrt(5), generator=generator), None

    return _draw_all(model, name, "kaiming", draw, seed)


@checks
def gaussian(model: nn.Module, name: str = "default", seed: int = 0) -> nn.Module:
    """A normal with deviation 1/r, B zero: LoRA as the paper has it, with HF PEFT's deviation. Returns the model.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; HF PEFT, `init_lora_weights="gaussian"`.
    """

    def draw(adapter: LoRA, generator: torch.Generator) -> tuple[Tensor, None]:
        return torch.randn(adapter.lora_A.shape, generator=generator) / len(adapter.lora_A), None

    return _draw_all(model, name, "gaussian", draw, seed)


@checks
def orthogonal(model: nn.Module, name: str = "default", seed: int = 0) -> nn.Module:
    """Neither A nor B zero, but B·A = 0: both have a gradient at the first step, and no start has to be kept.

        A = (X·Q₁)ᵀ/10, B = Y·Q₂/10, with X (in, r/2) and Y (out, r/2) normal and Q₁, Q₂ (r/2, r) the odd and the even
        rows of a random orthogonal matrix, so that B·A = Y·Q₂·Q₁ᵀ·Xᵀ/100 = 0

    The base is met up to rounding (about 1e-8 a weight). Raises ValueError for an odd rank. Returns the model.
    Source: HF PEFT, `init_lora_weights="orthogonal"`, after https://datta0.github.io/posts/rethink-lora-init/
    """

    def draw(adapter: LoRA, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        (r, in_features), out_features = adapter.lora_A.shape, len(adapter.lora_B)
        if r % 2:
            raise ValueError(f"orthogonal shares the rank between A and B, and r={r} is odd; take an even one")
        Q, _ = torch.linalg.qr(torch.randn(r, r, generator=generator))
        X, Y = (torch.randn(n, r // 2, generator=generator) for n in (in_features, out_features))
        return (X @ Q[0::2]).T / 10, Y @ Q[1::2] / 10

    return _draw_all(model, name, "orthogonal", draw, seed)


def _draw_all(model: nn.Module, name: str, by: str, draw: Draw, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers on every device
    there = untrained(model, name, by)
    found = {path: draw(adapter, generator) for path, adapter in there.items()}
    for path, (A, B) in found.items():
        fill(there[path], A, B)
    return model
