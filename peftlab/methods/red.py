"""RED: scale and shift hidden states. Wu et al. 2024, arXiv:2402.15179."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of


class RED(Adapter):
    """RED: representation editing; what each feed-forward net gives is rescaled and shifted, entry by entry.

    h = l_scale ⊙ f(x) + l_bias, with l_scale (D,) from ones and l_bias (D,) from zeros, so training starts at the base.
    It is (IA)³'s scale and BitFit's bias at one place, the last layer of the feed-forward net, and merges into it.

    Trained: 2·D a block: 0.26M in LLaMA-2 7B. Raises ValueError for a layer that is not linear.
    Source: Wu et al. 2024, arXiv:2402.15179 ("Advancing parameter efficiency in fine-tuning via representation
    editing").
    """

    family = "representation"
    targets = "ffn-output"

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        D = shape_of(layer)[0]
        self.l_scale, self.l_bias = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D))

    @staticmethod
    def size(out_features: int, in_features: int, **_) -> int:
        """2·out"""
        return 2 * out_features

    def forward(self, f, x: Tensor) -> Tensor:  # (..., in) -> (..., D)
        h = f(x)
        return (self.l_scale * h + self.l_bias).to(h.dtype)  # products in its float32, as in (IA)³
