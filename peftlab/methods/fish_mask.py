"""FISH mask: train the entries with the most Fisher information. Sung et al. 2021, arXiv:2111.09839."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._sparse import scattered


class FishMask(Adapter):
    """FISH mask: the k entries of a weight at given places are trained, the rest stays frozen.

    h = W₀x + ΔW·x, with ΔW zero but for `values` (k,), from zeros, at the flat `places` (k,). Which places, and how
    many of them in which layer, data tell:

        pl.inits.fish(model, rows, tokenizer, density=0.005)      those with the largest diagonal of the Fisher matrix
        pl.inits.lottery(model, tuned, density=0.05)              those that a full fine-tuning moved most (LT-SFT)
        pl.inits.project(model, "diff", density=0.005)            those that diff pruning left, with their values

    attach such an adapter, and the file keeps the places. Attached by hand (k=…), its places are spread evenly. Each
    pass fills the dense ΔW, and the backward pass its dense gradient, as in SHiRA.
    k: 1 to out·in. Trained: k. Raises ValueError without k or with one out of range.
    Source: Sung et al. 2021, arXiv:2111.09839.
    """

    family, hf_patterns = "selective and sparse", {"k": "k_pattern"}
    places: Tensor

    def __init__(self, layer: nn.Module, k: int = 0):
        super().__init__(layer)
        self.shape = shape_of(layer)
        entries = self.shape[0] * self.shape[1]
        if not 1 <= k <= entries:
            raise ValueError(f"k={k} is not in 1…{entries}: name how many entries are trained, or let data choose them "
                             "with pl.inits.fish(model, rows, tokenizer)")  # fmt: skip
        self.values = nn.Parameter(torch.zeros(k))
        self.register_buffer("places", (torch.arange(k) * (entries // k)).int())

    @staticmethod
    def size(out_features: int, in_features: int, k: int = 0, **_) -> int:
        """k"""
        return k

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return x @ scattered(self.values, self.places, self.shape).T
