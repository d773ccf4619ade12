"""A gate on another adapter. Mao et al. 2022 (UniPELT), arXiv:2110.07577."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import is_linear
from ..prefix import cache_name, weigh_prefix
from ._bottleneck import site_shape
from ._peers import carriers, known, peer


class Gated(Adapter):
    """UniPELT's gate: each token decides how much of another adapter's change it takes.

    y = h + g·(adapter(f, x) − h) with h = f(x), g = σ(w·u + c) in 0…1, and u what the adapter reads: x (LoRA), or h if
    it sits behind the layer (Houlsby). A prefix is gated in its share of attention: its keys p weigh g·exp(q·p), and
    the text's positions are not moved. The gate starts near ½; it is activated in the adapter's place, and both learn.

    In the paper g is averaged over a BERT's tokens and multiplies P_k, P_v. In a model that writes, an average would
    look at words to come and differ with each new word, so here each token has its own gate, and g = 0 is the base.

    of: name of the attached adapter. reads: "input" or "output", by default as the adapter does. Cannot be merged.
    Trained: width + 1 a site, width that of u. Raises ValueError if the adapter is missing or sits on other modules.
    Source: Mao et al. 2022, arXiv:2110.07577, section 3.2.
    """

    family, on_others = "mixture", True

    def __init__(self, layer: nn.Module, of: str = "", reads: str = "input"):
        super().__init__(layer)
        if not of or reads not in ("input", "output"):
            raise ValueError(f"of={of!r}, reads={reads!r}: name one attached adapter, and 'input' or 'output'")
        self.needs, self.reads, self.mixes = (of,), reads, is_linear(layer)
        self.w = nn.Parameter(0.02 * torch.randn(site_shape(layer)[reads == "input"]))
        self.c = nn.Parameter(torch.zeros(1))

    @classmethod
    def plan(cls, model: nn.Module, paths, hyper: dict) -> dict:
        """Those of the targets that carry the adapter."""
        from ..attach import adapters

        found = carriers(model, paths, [hyper.get("of", "")])
        there = adapters(model)[hyper["of"]]
        behind = {p: is_linear(there[p].layer) and type(there[p]).forward is not Adapter.forward for p in found}
        return {p: (cls, {"reads": "output" if behind[p] else "input", **hyper}) for p in found}

    @staticmethod
    def size(out_features: int, in_features: int, reads: str = "input", **_) -> int:
        """width + 1"""
        return (in_features if reads == "input" else out_features) + 1

    def expected(self) -> int:
        return self.size(*site_shape(self.layer), **self.hyper)

    def gate(self, u: Tensor) -> Tensor:  # (..., width) -> (..., 1)
        return torch.sigmoid(u.to(self.w.dtype) @ self.w + self.c)[..., None]

    def forward(self, f, *args, **kwargs):
        adapter = peer(self, self.needs[0])
        x = args[0] if args else kwargs["hidden_states"]
        if hasattr(adapter, "prefix"):
            return adapter(partial(self.attend, f, self.gate(x)), *args, **kwargs)
        h = f(x)
        change = adapter(known(f, x, h), x) - h
        return h + (self.gate(x if self.reads == "input" else h) * change).to(h.dtype)

    def attend(self, f, g: Tensor, *args, **kwargs):
        """Attention with g (B, T, 1) times the weight of each of the prefix's keys."""
        x = args[0] if args else kwargs["hidden_states"]
        mask = weigh_prefix(self.layer, kwargs["attention_mask"], g, x, kwargs[cache_name(kwargs)])
        return f(*args, **kwargs | {"attention_mask": mask})
