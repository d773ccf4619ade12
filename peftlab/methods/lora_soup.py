"""LoRA soups: how much of which trained LoRA, learned layer by layer. Prabhakar et al. 2024, arXiv:2410.13025."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core import Adapter
from ._peers import carriers, peer
from .adapter_fusion import several


class LoRASoup(Adapter):
    """LoRA soup (CAT): the sum of trained LoRAs with a learned weight for each of them in each layer.

    h = W₀x + Σᵢ αᵢ·Bᵢ·Aᵢ·x with the αᵢ alone trained, on examples of a task that needs several skills. It is the LoRA
    of rank Σ rᵢ whose factors are the others' side by side, so it merges and can be in a mixed batch. αᵢ starts at 1/n:
    the mean of the others, not the base.

    of: names of two or more attached adapters that are products B·A, on the same layers. They stay as they are:
    freeze(model, name) them first, or they learn too.
    Trained: n a layer. Raises ValueError for adapters that are missing, elsewhere, or no product.
    Source: Prabhakar et al. 2024, "LoRA soups", arXiv:2410.13025.
    """

    family, on_others = "mixture", True

    def __init__(self, layer: nn.Module, of: tuple[str, ...] = ()):
        super().__init__(layer)
        self.needs = several(of)
        self.alpha = nn.Parameter(torch.full((len(self.needs),), 1 / len(self.needs)))

    @classmethod
    def plan(cls, model: nn.Module, paths: Sequence[str], hyper: dict) -> dict:
        """Those of the target layers that carry the LoRAs."""
        from ..attach import adapters
        from ..lowrank import product_of

        of = several(hyper.get("of", ()))
        found = carriers(model, paths, of)
        for name in of:
            if odd := next((a for p in found if product_of(a := adapters(model)[name][p]) is None), None):
                raise ValueError(f"{name!r} is {type(odd).__name__}, no product B·A that could lie beside others")
        return {path: (cls, hyper) for path in found}

    @staticmethod
    def size(out_features: int, in_features: int, of: Sequence[str] = (), **_) -> int:
        """n"""
        return len(of)

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if (found := self.factors()) is None:
            return sum(a * peer(self, name).change(x) for a, name in zip(self.alpha, self.needs, strict=True))
        return x @ found[0].T.to(x.dtype) @ found[1].T.to(x.dtype)  # float64 where it is merged

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """The LoRAs' factors side by side, unless dropout gives one another input than the layer."""
        given = [peer(self, name).factors() for name in self.needs]
        found = [factors for factors in given if factors is not None]
        if len(found) < len(given):
            return None
        B = [a * s * B for a, (_, B, s) in zip(self.alpha, found, strict=True)]
        return torch.cat([A for A, _, _ in found]), torch.cat(B, 1), 1.0
