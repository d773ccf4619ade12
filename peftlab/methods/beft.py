"""BEFT: train the bias of the values alone. Huang et al. 2025, arXiv:2509.15974."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of

VALUES = r"v_proj|value|value_proj|v_lin|(SelfAttention|EncDecAttention)\.v"  # as the families name them


class BEFT(Adapter):
    """BEFT: of all biases only that of the attention's values is trained, as its change.

    v = W_v·x + b_v + Δb_v, with Δb_v (out,) from zeros, kept as (1, out) as in HF PEFT's files. The rows of a softmax
    add up to 1, so Δb_v goes through attention unchanged: it is a constant added to what each head gives, whatever it
    looks at. A model without such biases (Llama) gets new ones, and merging writes them; HF PEFT refuses to.
    GPT-2 and BLOOM compute queries, keys and values in one layer, whose bias BitFit trains.

    Trained: out. Raises ValueError for a layer that is not linear.
    Source: Huang et al. 2025, arXiv:2509.15974 (which finds b_v the best of b_q, b_k and b_v where data are few).
    """

    family = "selective and sparse"
    hf_type = "BEFT"
    hf_params = {"beft_bias": "beft_bias"}
    targets = f"({VALUES})"

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        self.beft_bias = nn.Parameter(torch.zeros(1, shape_of(layer)[0]))

    @staticmethod
    def size(out_features: int, in_features: int, **_) -> int:
        """out"""
        return out_features

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return self.beft_bias[0].expand(*x.shape[:-1], -1)
