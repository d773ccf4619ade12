"""QA-LoRA: a LoRA that a weight in few bits can take in without loss. Xu et al. 2023, arXiv:2309.14717."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ..sites import at, bare
from ._lora import HYPER, PARAMS, checked_rank, drawn, scaled


class QALoRA(Adapter):
    """QA-LoRA: all inputs of one quantisation group share a column of A, so that the change is constant within it.

    h = W₀x + (α/r)·B·A·pool(x), A (r, in/g), B (out, r), and pool(x) (in/g,) the mean of each group of g inputs, times
    in/g. A weight that is packed as scale·code + zero for each output and group of inputs takes the trained change into
    the zeros and stays in its few bits: zeroⱼₖ + (α/r)·(BA)ⱼₖ·in/g². NF4 has no zeros: there, merging unpacks.

    The paper's pool is the sum of a group, the mean times g. HF PEFT multiplies by the number of groups instead; its
    files mean that, so it is done here too: the same with an α of in/g² times. It has it on layers of GPTQ only.
    g, group_size: divides in; that of the packing, or a multiple; by default the greatest up to 16 that divides the
    inputs of all targets. alpha: α. dropout: probability, on x before pooling.
    Trained: r·(in/g + out). Raises ValueError for a group size that does not divide a layer's inputs, or a rank.
    Source: Xu et al. 2023, arXiv:2309.14717, section 3.3 and algorithm 1.
    """

    family = "low-rank"
    hf_type, hf_flags = "LORA", {"use_qalora": True}
    hf_hyper, hf_params = {**HYPER, "group_size": "qalora_group_size"}, PARAMS

    def __init__(
        self, layer: nn.Module, r: int = 8, alpha: float = 16, dropout: float = 0.0, rslora: bool = False,
        group_size: int | None = None,
    ):  # fmt: skip
        super().__init__(layer)
        out_features, in_features = checked_rank(layer, r)
        group_size = fitting(in_features) if group_size is None else group_size
        if group_size < 1 or in_features % group_size:
            raise ValueError(f"group_size={group_size} does not divide the layer's {in_features} inputs; take one that "
                             "does, such as that of the packing")  # fmt: skip
        self.g, self.L = group_size, in_features // group_size  # L groups, the paper's letter
        self.lora_A, self.lora_B = drawn(r, self.L), nn.Parameter(torch.zeros(out_features, r))
        self.dropout, self.scaling = nn.Dropout(dropout), scaled(alpha, r, rslora)

    @classmethod
    def plan(cls, model, paths, hyper):
        """One group size for all targets, as files have it."""
        if hyper.get("group_size") is None:
            hyper = {**hyper, "group_size": fitting(*(shape_of(bare(at(model, path)))[1] for path in paths))}
        return {path: (cls, hyper) for path in paths}

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 8, group_size: int | None = None, **_) -> int:
        """r·(in/g + out)"""
        return r * (in_features // (group_size or fitting(in_features)) + out_features)

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        pooled = self.dropout(x).unflatten(-1, (self.L, self.g)).mean(-1) * self.L
        return self.scaling * (pooled @ self.lora_A.T @ self.lora_B.T)


def fitting(*inputs: int) -> int:
    """The greatest number up to 16, HF PEFT's default, that divides all of these."""
    return max(n for n in range(1, 17) if math.gcd(*inputs) % n == 0)
