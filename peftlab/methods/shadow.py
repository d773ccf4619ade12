"""Shadow: a small model beside the large one, which corrects each block. Li et al. 2026, arXiv:2604.19254."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..sites import _takes, group
from ._blocks import hidden, width_of
from ._shadow import first_state, freeze, mirrored, with_blocks


class Shadow(Adapter):
    """ShadowPEFT: a thin copy of the model reads the text first, and its state travels along through the blocks.

    s = backbone(E(x));  then at each block:  h ← h + α·W_up·W_down·(h − s),  h′ = f(h),
        s ← (1 − g) ⊙ s + g ⊙ T(h′),  g = σ(G(h′)),  with T and G from D to u to D, gelu between
    backbone: a new model of the base's kind with few blocks, on the base's frozen token vectors E. W_up (D, r) starts
    at zero, so that training starts at the base. Its keys and values are further layers of the model's own cache.
    The paper's auxiliary loss on head(s) is left out: a decoder sees no labels. What the last block does to s changes
    nothing, so its T and G are not trained (HF PEFT counts them, and GPT-2's second token table, which is not used).
    r, alpha (α), dropout (on h − s), layers (of the backbone; None: 1), update (u; None: r). Decoder-only; no merging.
    Trained: the backbone, 2·D·r a block, and 2·(2·D·u + u + D) a block but the last. Raises ValueError for an encoder,
    sizes below 1, and a cache that was filled without the shadow.
    Source: Li et al. 2026, arXiv:2604.19254, sections 3.2 and 3.3.
    """

    family, hf_type, hf_patterns, targets, mixes = "side network", "SHADOW", {}, "all-blocks", False
    hf_hyper = {"r": "r", "alpha": "shadow_alpha", "dropout": "shadow_dropout", "layers": "shadow_num_hidden_layers",
                "update": "update_hidden_size"}  # fmt: skip

    def __init__(self, layer: nn.Module, r: int = 8, alpha: float = 0.1, dropout: float = 0.2,
                 layers: int | None = None, update: int | None = None):  # fmt: skip
        super().__init__(layer)
        self.alpha, self.state, self.beside = alpha, dict[str, Tensor](), _takes(layer, "inputs_embeds")
        if min(r, layers or 1, u := update or r) < 1:
            raise ValueError(f"r={r}, layers={layers}, update={update}: each must be at least 1")
        if self.beside:
            self.depth, self.shadow_backbone = len(group(layer, "all-blocks")), mirrored(layer, layers or 1)
            return
        D, self.dropout = width_of(layer), nn.Dropout(dropout)
        self.shadow_down, self.shadow_up = nn.Linear(D, r, bias=False), nn.Linear(r, D, bias=False)
        nn.init.zeros_(self.shadow_up.weight)
        both = (nn.Sequential(nn.Linear(D, u), nn.GELU(), nn.Linear(u, D)) for _ in range(2))
        self.shadow_update_transform, self.shadow_update_gate = both

    @classmethod
    def plan(cls, model, paths, hyper):
        return {p: (cls, hyper) for p in with_blocks(model, paths)}

    @classmethod
    def share(cls, made) -> None:
        *_, last = made.values()
        freeze(last.shadow_update_transform, last.shadow_update_gate)
        for adapter in made.values():
            adapter.state = last.state

    def expected(self) -> int:
        """2·D·r + 2·(2·D·u + u + D) a block, without the second for the last; and the backbone, as large as it is"""
        if self.beside:
            return sum(p.numel() for p in self.shadow_backbone.parameters())
        (r, D), (first, *_) = self.shadow_down.weight.shape, self.shadow_update_gate
        return 2 * D * r + 2 * (2 * D + 1) * len(first.bias) + 2 * D if first._parameters else 2 * D * r

    def forward(self, f, *args, **kwargs):
        if not self.beside:
            return self.corrected(f, *args, **kwargs)
        self.state["s"] = first_state(self.layer, self.shadow_backbone, self.depth, args, kwargs)
        out = f(*args, **kwargs)
        self.state.clear()
        return out

    def corrected(self, f, h: Tensor, *args, **kwargs):  # one block
        s = self.state["s"]
        change = self.shadow_up(self.shadow_down(self.dropout(h.to(s.dtype) - s)))
        out = f(h + (self.alpha * change).to(h.dtype), *args, **kwargs)
        g = torch.sigmoid(self.shadow_update_gate(after := hidden(out).to(s.dtype)))
        self.state["s"] = (1 - g) * s + g * self.shadow_update_transform(after)
        return out
