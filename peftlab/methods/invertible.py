"""Invertible adapters: another vocabulary for the same model. Pfeiffer et al. 2020, arXiv:2005.00052."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import is_linear
from ..sites import at, bare, sites
from ..vocabulary import ties
from ._bottleneck import bottleneck_width, down_and_up


class Invertible(Adapter):
    """Invertible adapter (MAD-X): token vectors are mapped on their way in, and mapped back before the output head.

    Behind the embedding, with its vector e cut in halves e₁ and e₂:   o₁ = e₁ + F(e₂),  o₂ = e₂ + G(o₁).
    Before the head, the exact inverse of the same map:                e₂ = o₂ − G(o₁),  e₁ = o₁ − F(e₂).
    F and G are bottlenecks, x ↦ W_up·relu(W_down·x + c) + c′, with any F and G the pair can be undone: NICE's coupling.
    W_up starts at zero, so training starts at the base. The paper trains it with a bottleneck in each block, on text
    of a new language. A model without a tied or other head for words (a classifier) has the way in only.

    reduction: width of a half / b, or bottleneck: b itself. Trained, once: 2·(D·b + b + D/2).
    Raises ValueError for an odd width, a b out of range, or sites that are no table of token vectors.
    Source: Pfeiffer et al. 2020, arXiv:2005.00052; the coupling: Dinh et al. 2014, arXiv:1410.8516.
    """

    family = "bottleneck"
    targets = "embeddings"

    def __init__(self, layer: nn.Module, reduction: float = 2, bottleneck: int | None = None):
        super().__init__(layer)
        D = layer.in_features if is_linear(layer) else layer.embedding_dim
        if D % 2:
            raise ValueError(f"the vectors have {D} entries, an odd number, and cannot be cut in halves")
        b = bottleneck_width(D // 2, reduction, bottleneck)
        down_F, up_F = down_and_up(D // 2, b, D // 2)
        down_G, up_G = down_and_up(D // 2, b, D // 2)
        self.F, self.G = nn.Sequential(down_F, nn.ReLU(), up_F), nn.Sequential(down_G, nn.ReLU(), up_G)
        self.register_buffer("back", torch.tensor([is_linear(layer)]).int())  # so that the file knows of the head

    @classmethod
    def plan(cls, model, paths, hyper):
        """The embedding, other tables that share its weight (T5 has three), and the head."""
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        table, weights = model.get_input_embeddings(), [getattr(bare(at(model, p)), "weight", None) for p in paths]
        known = [id(bare(m).weight) for m in (table, head) if m is not None]
        if odd := [p for p, w in zip(paths, weights, strict=True) if id(w) not in known]:
            raise ValueError(f"{odd[0]!r} is no table of token vectors; leave targets out")
        if known[0] not in map(id, weights):
            raise ValueError(f"{paths[0]!r} is the way back alone, without the way in; leave targets out")
        found = {tied for path in paths for tied in (path, *ties(model, path))}
        found |= {path for path, site in sites(model).items() if head is not None and bare(site) is bare(head)}
        return {path: (cls, hyper) for path in sorted(found)}

    @classmethod
    def share(cls, made) -> None:
        """The first embedding keeps F and G."""
        keeper = made[min(path for path in made if isinstance(made[path].layer, nn.Embedding))]
        for adapter in made.values():
            if adapter is not keeper:
                del adapter.F, adapter.G
                adapter.__dict__["F"], adapter.__dict__["G"] = keeper.F, keeper.G

    def expected(self) -> int:
        """2·(D·b + b + D/2), once"""
        b, half = self.F[0].weight.shape
        return 2 * (2 * half * b + b + half) if "F" in self._modules else 0

    def forward(self, f, x: Tensor) -> Tensor:
        if not isinstance(self.layer, nn.Embedding):  # head: (..., D) -> (..., V)
            o1, o2 = x.to(self.F[0].weight.dtype).chunk(2, -1)
            e2 = o2 - self.G(o1)
            return f(torch.cat([o1 - self.F(e2), e2], -1).to(x.dtype))
        e = f(x)  # embedding: ids (...) -> (..., D)
        e1, e2 = e.to(self.F[0].weight.dtype).chunk(2, -1)
        o1 = e1 + self.F(e2)
        return torch.cat([o1, e2 + self.G(o1)], -1).to(e.dtype)
