"""Ladder side-tuning: train beside the model, not through it. Sung et al. 2022, arXiv:2206.06522."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..sites import _takes, bare, group, sites
from ._blocks import hidden, width_of
from ._bottleneck import bottleneck_width, down_and_up


class LadderSide(Adapter):
    """Ladder side-tuning: a thin network reads each block's hidden states, and no gradient passes through the base.

    s₀ = W₀·h₀ + c₀;  sᵢ = gᵢ(μᵢ·sᵢ₋₁ + (1 − μᵢ)·(Wᵢ·hᵢ + cᵢ)),  μᵢ = σ(αᵢ/0.1),  i = 1…L;  y = h + W_up·s_L + c
    with h₀ (D,) the embedded token, hᵢ what block i gives, h what the base gives after its last norm, sᵢ (b,), gates αᵢ
    from zero, and gᵢ(s) = s + Vᵢ·gelu(Uᵢ·norm(s)). The base runs without a graph, so backward keeps the side network's
    activations alone; adapters inside of the base cannot be trained along with it. W_up starts at zero: at the base.
    In the paper gᵢ is a transformer block of width b, cut from the base's; here it works on each token alone, since the
    hᵢ have attended already, and generation needs no second cache. Encoder–decoders: beside the decoder. No merging.
    reduction: D / b, 8 in the paper, or bottleneck: b itself. Raises ValueError for no blocks, or a b out of range.
    Trained: (L + 1)·(D·b + b) + L·(2·b² + 4·b + 1) + D·b + D. Source: Sung et al. 2022, arXiv:2206.06522.
    """

    family = "side network"
    targets, mixes = "decoder", False
    seen: list[Tensor]

    def __init__(self, layer: nn.Module, reduction: float = 8, bottleneck: int | None = None):
        super().__init__(layer)
        self.seen, self.beside = [], _takes(layer, "inputs_embeds")  # h before and after each block, in this pass
        self.register_buffer("side_network", torch.tensor([self.beside]).int())  # so that the file has all sites
        if not self.beside:
            return
        blocks = group(layer, "all-blocks")
        D, L = width_of(bare(sites(layer)[blocks[0]])), len(blocks)
        b = bottleneck_width(D, reduction, bottleneck)
        self.W = nn.ModuleList(nn.Linear(D, b) for _ in range(L + 1))
        rungs = ([nn.LayerNorm(b), nn.Linear(b, b), nn.GELU(), nn.Linear(b, b)] for _ in range(L))
        self.g = nn.ModuleList(nn.Sequential(*rung) for rung in rungs)
        self.alpha, self.W_up = nn.Parameter(torch.zeros(L)), down_and_up(D, b, D)[1]

    @classmethod
    def plan(cls, model, paths, hyper):
        top = group(model, "decoder")[-1]  # and its blocks
        return {p: (cls, hyper) for p in (top, *group(model, "all-blocks")) if f"{p}.".startswith(f"{top}.")}

    @classmethod
    def share(cls, made) -> None:
        seen: list[Tensor] = []  # the blocks' adapters, which only listen, note here what the decoder's reads
        for adapter in made.values():
            adapter.seen = seen

    def expected(self) -> int:
        """(L + 1)·(D·b + b) + L·(2·b² + 4·b + 1) + D·b + D, once"""
        (D, b), L = (self.W_up.weight.shape, len(self.alpha)) if self.beside else ((0, 0), 0)
        return (L + 1) * (D * b + b) + L * (2 * b * b + 4 * b + 1) + D * b + D

    def side(self, h: list[Tensor]) -> Tensor:  # L + 1 times (B, T, D) -> (B, T, b)
        s, mu = self.W[0](h[0]), torch.sigmoid(self.alpha / 0.1)
        for i, g in enumerate(self.g):
            mixed = mu[i] * s + (1 - mu[i]) * self.W[i + 1](h[i + 1])
            s = mixed + g(mixed)
        return s

    def forward(self, f, *args, **kwargs):
        if not self.beside:
            self.seen += [args[0] if args else kwargs["hidden_states"], hidden(out := f(*args, **kwargs))]
            return out
        self.seen.clear()
        with torch.no_grad():
            out = f(*args, **kwargs)
        h = self.side([t.to(self.alpha.dtype) for t in (self.seen.pop(0), *self.seen[::2])])
        self.seen.clear()
        out.last_hidden_state = out.last_hidden_state + self.W_up(h).to(out.last_hidden_state.dtype)
        if getattr(out, "pooler_output", None) is not None:  # BERT's classifier reads this
            out.pooler_output = self.layer.pooler(out.last_hidden_state)
        return out
