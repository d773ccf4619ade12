"""SHiRA: sparse high-rank adapters. Bhardwaj et al. 2024, arXiv:2406.13175."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._sparse import scattered


class SHiRA(Adapter):
    """SHiRA: a few entries of each weight are trained, at places drawn once; as many as a LoRA of rank r would have.

    h = W₀x + ΔW·x, with ΔW zero but for r·(in + out) entries, which start at zero. The rank of ΔW is whatever falls
    out, mostly full. Two such adapters overlap in few entries, so switching or adding them disturbs neither much.

    The places come from `seed` (None: torch's own default, a fixed number too), so layers of one shape get the same
    ones, as in HF PEFT; the file holds them beside the values, as rows and columns, so places chosen in another way
    are read too. Each pass fills the dense ΔW, and the backward pass its dense gradient: the sparseness saves
    optimizer state and file, not time. r: 1 to in·out / (in + out).
    Trained: r·(in + out). Raises ValueError for an r out of range.
    Source: Bhardwaj et al. 2024, arXiv:2406.13175 (its SHiRA-Rand; with the largest |W|, its SHiRA-WM: SuperTuning).
    """

    family = "selective and sparse"
    hf_type = "SHIRA"
    hf_hyper = {"r": "r", "seed": "random_seed"}
    hf_ignored = frozenset({"mask_type"})  # the places themselves are in the file
    hf_params = {"shira_weight": "shira_weight", "shira_indices": "shira_indices"}
    shira_indices: Tensor

    def __init__(self, layer: nn.Module, r: int = 8, seed: int | None = None):
        super().__init__(layer)
        out_features, in_features = self.shape = shape_of(layer)
        k, entries = r * (in_features + out_features), in_features * out_features
        if not 1 <= k <= entries:
            most = entries // (in_features + out_features)
            raise ValueError(f"r={r} asks for {k} of the {out_features}×{in_features} layer's {entries} entries; "
                             f"choose r in 1…{most}")  # fmt: skip
        self.shira_weight = nn.Parameter(torch.zeros(k))
        places = drawn(entries, k, seed).to(self.shira_weight.device) if not self.shira_weight.is_meta else None
        indices = torch.empty(2, k) if places is None else torch.stack([places // in_features, places % in_features])
        self.register_buffer("shira_indices", indices.int())

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 8, **_) -> int:
        """r·(in + out)"""
        return r * (in_features + out_features)

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        row, column = self.shira_indices.long()
        return x @ scattered(self.shira_weight, row * self.shape[1] + column, self.shape).T


def drawn(entries: int, k: int, seed: int | None) -> Tensor:
    """k of the flat places 0…entries − 1, in order: HF PEFT's permutation for this seed, cut after k."""
    draw = torch.Generator()
    if seed is not None:
        draw.manual_seed(seed)
    return torch.randperm(entries, generator=draw, device="cpu")[:k].sort().values
