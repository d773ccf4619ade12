"""X-LoRA: a classifier mixes trained LoRAs anew for each token. Buehler and Buehler 2024, arXiv:2402.07148."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import Adapter
from ._gates import hidden_of, plan_gates, share_head
from .adapter_fusion import several


class XLoRA(Adapter):
    """X-LoRA: the model reads the text once as it is, and then again with the experts that each token wants.

    h = W₀x + Σᵢ sᵢ·Δᵢ(x), s = softmax(K(u)/τ), where the layer carries experts i, u is the token's last hidden state in
    the first pass, and K a linear layer (depth 1) or an MLP. The first pass is the base's, without gradient. Twice
    the time, and no cache: generate(use_cache=False). Starts at a mixture, not at the base; cannot be merged.

    of: names of two or more attached adapters that are added terms (LoRA); freeze(model, name) them, or they learn too.
    layerwise: an s for each layer. depth, width, dropout: of K. softmax: else s = K(u). temperature: τ. top_k: only the
    k largest sᵢ; topk_softmax: softmax over these. scale: of the sum. layers: how many carry the experts; counted.
    Trained: K alone; depth 1: (d + 1)·n for n experts, times `layers` if layerwise. ValueError for unfit experts.
    Source: Buehler & Buehler 2024, arXiv:2402.07148.
    """

    targets, mixes, on_others, hf_type, family = "decoder", False, True, "XLORA", "mixture"
    hf_hyper = {"layerwise": "layerwise_scalings", "depth": "xlora_depth", "width": "xlora_size",
                "dropout": "xlora_dropout_p", "softmax": "enable_softmax", "temperature": "softmax_temperature",
                "top_k": "top_k_lora", "topk_softmax": "enable_softmax_topk",
                "scale": "global_scaling_weight"}  # fmt: skip

    def __init__(
        self, layer: nn.Module, of: tuple[str, ...] = (), layers: int = 1, layerwise: bool = False, depth: int = 1,
        width: int = 2048, dropout: float = 0.2, softmax: bool = True, temperature: float = 1.0,
        top_k: int | None = None, topk_softmax: bool = False, scale: float = 1.0,
    ):  # fmt: skip
        super().__init__(layer)
        self.n, self.layerwise, self.softmax, self.temperature = len(several(of)), layerwise, softmax, temperature
        if min(depth, width) < 1 or temperature <= 0 or not 1 <= (top_k or 1) <= self.n:
            raise ValueError(f"{depth=}, {width=}, {temperature=}, {top_k=}: above 0, and up to the {self.n} experts")
        self.top_k, self.topk_softmax, self.scale, outputs = top_k, topk_softmax, scale, self.n * layers**layerwise
        sizes = [layer.config.hidden_size, *[width] * (depth - 1), outputs]
        K: list[nn.Module] = [nn.Linear(sizes[0], sizes[1])]
        for a, b in zip(sizes[1:], sizes[2:], strict=False):
            K += [nn.ReLU(), *[nn.Dropout(dropout)] * (dropout > 0), nn.Linear(a, b)]
        self.layers = nn.Sequential(*K)
        self.u: Tensor | None = None  # (B, T, d); None in the first pass

    @classmethod
    def plan(cls, model, paths, hyper):
        return plan_gates(cls, model, paths, hyper)

    @classmethod
    def share(cls, made):
        share_head(cls, made)

    def expected(self) -> int:
        """(d + 1)·n·L, or (d + 1)·w + (depth − 2)·(w + 1)·w + (w + 1)·n·L, with L = layers if layerwise, else 1"""
        d, w, depth = self.layer.config.hidden_size, self.hyper["width"], self.hyper["depth"]
        outputs = self.n * self.hyper["layers"] ** self.layerwise
        return (d + 1) * outputs if depth == 1 else (d + 1) * w + (depth - 2) * (w + 1) * w + (w + 1) * outputs

    def scalings(self, slot: int) -> Tensor | None:
        """s (B, T, n) for one layer, None in the first pass; each layer asks anew, so that it can be checkpointed."""
        if self.u is None:
            return None
        own, last = slice(slot * self.n, (slot + 1) * self.n) if self.layerwise else slice(None), self.layers[-1]
        s = F.linear(self.layers[:-1](self.u.to(last.weight.dtype)), last.weight[own], last.bias[own])
        s = torch.softmax(s / self.temperature, -1) if self.softmax else s
        if self.top_k is not None:
            kept = torch.zeros_like(s, dtype=torch.bool).scatter(-1, s.topk(self.top_k).indices, True)
            s = s.masked_fill(~kept, -torch.inf).softmax(-1) if self.topk_softmax else s * kept
        return self.scale * s

    def forward(self, f, *args, **inputs):
        self.u = None
        self.u = hidden_of(f, *args, **inputs)
        return f(*args, **inputs)
