"""Attention over several trained adapters. Pfeiffer et al. 2021, arXiv:2005.00247."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._peers import carriers, known, peer


def several(of: Sequence[str]) -> tuple[str, ...]:
    """The names; ValueError unless there are two or more."""
    if isinstance(of, str) or len(of) < 2:
        raise ValueError(f"of={of!r}: name two or more attached adapters, such as of=('sql', 'reviews')")
    return tuple(of)


class AdapterFusion(Adapter):
    """AdapterFusion: each token asks all adapters of its layer and learns how much to listen to which.

    y = h + Σᵢ αᵢ·V·zᵢ,  α = softmaxᵢ((Q·h)·(K·zᵢ)),  with h = f(x), zᵢ (D,) what adapter i adds to h, Q, K, V (D, D).
    V starts as the identity, so that the first answer is the adapters' average or near it. (The paper's code also pulls
    V towards it by a penalty in the loss, and gives Q and K biases; K's cannot change a softmax.) Cannot be merged.

    of: names of two or more attached adapters, on the same layers. They stay as they are: freeze(model, name) first.
    Trained: 3·D² a site, however many are fused. Raises ValueError for adapters missing, not frozen or elsewhere.
    Source: Pfeiffer et al. 2021, arXiv:2005.00247, section 3.2.
    """

    family, on_others = "mixture", True

    def __init__(self, layer: nn.Module, of: tuple[str, ...] = ()):
        super().__init__(layer)
        self.needs = several(of)
        D = shape_of(layer)[0]
        self.Q, self.K = (nn.Parameter(0.02 * torch.randn(D, D)) for _ in range(2))  # 0.02 as in BERT's own layers
        self.V = nn.Parameter(torch.eye(D))

    @classmethod
    def plan(cls, model: nn.Module, paths, hyper: dict) -> dict:
        """Those of the target layers that carry the fused adapters."""
        from ..attach import adapters

        of = several(hyper.get("of", ()))
        found = carriers(model, paths, of)
        for name in of:
            if any(p.requires_grad for a in adapters(model)[name].values() for p in a.parameters()):
                raise ValueError(f"{name!r} is still being trained, and fusion is for finished adapters; "
                                 f"freeze(model, {name!r}) first")  # fmt: skip
        return {path: (cls, hyper) for path in found}

    @staticmethod
    def size(out_features: int, in_features: int, **_) -> int:
        """3·D², with D the width of what the layer gives out"""
        return 3 * out_features**2

    def attention(self, h: Tensor, z: Tensor) -> Tensor:
        """α (N, ...) over the N adapters, from h (..., D) and z (N, ..., D)."""
        return torch.softmax((h @ self.Q.T * (z @ self.K.T)).sum(-1), dim=0)

    def forward(self, f, x: Tensor) -> Tensor:
        h = f(x)
        own = self.V.dtype
        z = torch.stack([peer(self, name)(known(f, x, h), x) - h for name in self.needs]).to(own)
        mixed = (self.attention(h.to(own), z)[..., None] * (z @ self.V.T)).sum(0)
        return h + mixed.to(h.dtype)
