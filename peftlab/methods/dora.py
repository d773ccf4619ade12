"""DoRA: LoRA turns the rows of a weight, and their lengths are trained apart. Liu et al. 2024, arXiv:2402.09353."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import weight_of
from ._lora import HYPER, PARAMS, begin


class DoRA(Adapter):
    """DoRA: weight-decomposed adaptation: directions from LoRA, magnitudes from a vector.

    h = m ⊙ (V / ‖V‖)·x + b with V = W₀ + (α/r)·B·A, where ‖V‖ (out,) holds the length of each row of V: all that enters
    one output. m (out,) starts at the lengths of W₀, so that training starts at the base. ‖V‖ is taken for a constant
    on the way back (section 4.3): m's gradient is exact, and that of A and B keeps the part along V that a true
    derivative would take out.

    Each pass reads W₀, dense, and builds V once for its lengths; neither is kept for the backward pass. On a base in
    four bits, that is one unpacked copy of a layer at a time. Behind other adapters, what they left is turned and
    stretched likewise, and ‖V‖ is still that of the frozen W₀. dropout: probability, on the low-rank term's input only.
    Trained: r·(in + out) + out. Raises ValueError for a rank or a dropout out of range.
    The paper's columns, of a weight (in, out), are rows of W (out, in) here.
    Source: Liu et al. 2024, arXiv:2402.09353, equation 5 and section 4.3.
    """

    family = "low-rank"
    hf_type, hf_flags = "LORA", {"use_dora": True}
    hf_hyper, hf_params = HYPER, {**PARAMS, "m": "lora_magnitude_vector"}

    def __init__(self, layer: nn.Module, r: int = 8, alpha: float = 16, dropout: float = 0.0, rslora: bool = False):
        super().__init__(layer)
        begin(self, r, alpha, dropout, rslora)
        self.m = nn.Parameter(self.lengths())

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 8, **_) -> int:
        """r·(in + out) + out"""
        return r * (in_features + out_features) + out_features

    def lengths(self) -> Tensor:
        """‖W₀ + (α/r)·B·A‖ of each row, (out,); a constant for autograd."""
        A, B = self.lora_A.detach(), self.lora_B.detach()
        V = weight_of(self.layer).detach().to(A.dtype) + self.scaling * (B @ A)
        return torch.linalg.vector_norm(V, dim=1)

    def forward(self, f, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        y, gain, bias = f(x), self.m / self.lengths(), getattr(self.layer, "bias", None)
        W0x = y if bias is None else y - bias
        BAx = self.scaling * (self.dropout(x.to(self.m.dtype)) @ self.lora_A.T @ self.lora_B.T)
        return (y + ((gain - 1) * W0x + gain * BAx)).to(y.dtype)  # written so that a gain of 1 is exact
