"""DyLoRA: one training for all ranks. Valipour et al. 2022, arXiv:2210.07558."""

from __future__ import annotations

import random
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..core import Adapter
from ._lora import checked_rank, drawn
from .lora import LoRA


class DyLoRA(Adapter):
    """DyLoRA: a LoRA trained at a rank that is drawn anew for each step, so that afterwards any rank can be cut off.

    h = W₀x + (α/b)·B[:, :b]·A[:b]·x, with A (r, in) drawn at random and B (out, r) zero: training starts at the base.
    While training, b is drawn uniformly from 1…r after each step, the same for all layers (`pl.train` does; in a loop
    of your own: DyLoRA.stepped({path: adapter}, step, steps)). So the first rows have to do with few others, and rows
    are sorted by what they are worth. Otherwise b is r, or what `cut` says. Saved, it is a plain LoRA of rank b.

    r: largest rank. alpha: α. dropout: on the input of A. frozen: at b, only row b of A and column b of B learn, not
    all up to b. seed: of the draws. Trained: r·(in + out). Raises ValueError for a rank or a dropout out of range.
    Source: Valipour et al. 2022, arXiv:2210.07558, algorithm 1.
    """

    family = "low-rank"
    memory = ("drawn",)

    def __init__(self, layer: nn.Module, r: int = 8, alpha: float = 16, dropout: float = 0.0, frozen: bool = False,
                 seed: int = 0):  # fmt: skip
        super().__init__(layer)
        out_features, in_features = checked_rank(layer, r)
        self.lora_A, self.lora_B = drawn(r, in_features), nn.Parameter(torch.zeros(out_features, r))
        self.register_buffer("drawn", torch.tensor(r), persistent=False)  # b of the next training step
        self.dropout, self.alpha, self.frozen = nn.Dropout(dropout), alpha, frozen
        self.b = r  # otherwise

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 8, **_) -> int:
        """r·(in + out)"""
        return r * (in_features + out_features)

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if not self.training:
            A, B, s = self.factors()
            return s * (x @ A.T @ B.T)
        A, B, i = self.lora_A, self.lora_B, torch.arange(self.lora_B.shape[1], device=x.device)
        if self.frozen:
            A = torch.where((i == self.drawn - 1)[:, None], A, A.detach())
            B = torch.where(i == self.drawn - 1, B, B.detach())
        return self.alpha / self.drawn * (self.dropout(x) @ (A * (i < self.drawn)[:, None]).T @ B.T)

    def factors(self):
        return None if self.training else (self.lora_A[: self.b], self.lora_B[:, : self.b], self.alpha / self.b)

    @classmethod
    def stepped(cls, made, step: int, steps: int) -> None:
        for adapter in made.values():
            adapter.drawn.fill_(random.Random(f"{adapter.hyper['seed']} {step}").randint(1, len(adapter.lora_A)))

    def saved(self) -> LoRA:
        from ..attach import defaults_of

        plain = LoRA(self.layer, self.b, self.alpha, self.dropout.p)
        plain.lora_A, plain.lora_B = nn.Parameter(self.lora_A[: self.b]), nn.Parameter(self.lora_B[:, : self.b])
        plain.hyper = defaults_of(LoRA) | {"r": self.b, "alpha": self.alpha, "dropout": self.dropout.p}
        return plain


def cut(adapters: Iterable[DyLoRA], b: int) -> None:
    """From now on the first b rows and columns alone: `cut(pl.adapters(model)["sql"].values(), 4)`."""
    for adapter in adapters:
        if not 1 <= b <= len(adapter.lora_A):
            raise ValueError(f"b={b} is not in 1…{len(adapter.lora_A)}, the ranks that were trained")
        adapter.b = b
