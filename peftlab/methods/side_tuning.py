"""Side-tuning: a small model beside the large one, and a blend of both. Zhang et al. 2020, arXiv:1912.13503."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..core import Adapter
from ..layers import is_conv1d, is_linear, weight_of
from ..sites import at, bare, group
from ._shadow import decoder_only, first_state, mirrored


class SideTuning(Adapter):
    """Side-tuning: the base stays whole, a small network reads the same input, and their answers are blended.

    y = α·B(x) + (1 − α)·S(x),  α = σ(a): B the base up to its last norm, S a model of its kind with few blocks that
    reads the base's frozen token vectors, and a, one number, trained. S starts as the base's first blocks and last norm
    (the paper copies the base too, or distils it), so that training starts beside the base, but with sense. Nothing is
    passed from B to S or back, unlike in `LadderSide`: backward goes through S alone and keeps its activations alone.
    S's keys and values are further layers of the model's own cache: one side network at a time. Decoder-only; no
    merging.
    alpha: α at the start, 0…1; ½ in the paper's code. layers: blocks of S. Trained: S without token vectors, and 1.
    Raises ValueError for an encoder, for values out of range, and for a cache that was filled without S.
    Source: Zhang et al. 2020, arXiv:1912.13503; the start of α: its official code.
    """

    family = "side network"
    targets, mixes = "decoder", False

    def __init__(self, layer: nn.Module, alpha: float = 0.5, layers: int = 1):
        super().__init__(layer)
        self.depth = len(group(layer, "all-blocks"))
        if not 0 < alpha < 1 or not 1 <= layers <= self.depth:
            raise ValueError(f"alpha={alpha}, layers={layers}: α is between 0 and 1, and S has 1…{self.depth} blocks")
        self.side = begun(layer, mirrored(layer, layers))
        self.a = nn.Parameter(torch.tensor(math.log(alpha / (1 - alpha))))

    @classmethod
    def plan(cls, model, paths, hyper):
        decoder = decoder_only(model)
        if odd := [path for path in paths if path != decoder]:
            raise ValueError(f"{odd[0]!r} is not {decoder!r}: S stands beside the whole model; leave targets out")
        return {decoder: (cls, hyper)}

    def expected(self) -> int:
        """the side network's blocks and its last norm, as large as the base's, and 1"""
        return 1 + sum(p.numel() for p in self.side.parameters())

    def forward(self, f, *args, **kwargs):
        alpha = torch.sigmoid(self.a)
        S = first_state(self.layer, self.side, self.depth, args, kwargs)
        out = f(*args, **kwargs)
        B = out.last_hidden_state
        out.last_hidden_state = (alpha * B + (1 - alpha) * S).to(B.dtype)
        return out


@torch.no_grad()
def begun(base: nn.Module, side: Any) -> nn.Module:
    """The side network with the values of the base's modules of the same names, dense and in its own dtype."""
    for path, module in side.named_modules():
        host = at(base, path)
        source = getattr(host, "original", None) or bare(host)  # the base's, even while adapters are merged
        for name, p in module.named_parameters(recurse=False):
            dense = weight_of(source) if name == "weight" and is_linear(source) else getattr(source, name)
            p.copy_(dense.T if name == "weight" and is_conv1d(module) else dense)
    return side
