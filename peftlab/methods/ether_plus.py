"""ETHER+: ETHER's reflections, relaxed, on both sides of a layer. Bini et al. 2024, arXiv:2405.20271."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._block_sizes import block_of
from ._rotations import along


class ETHERPlus(Adapter):
    """ETHER+: a direction of the input is exchanged for another one, and so is one of the output, block by block.

    h = H̃W₀Hx + b with H = diag(H₁ … Hₙ), Hᵢ = I − ûᵢûᵢᵀ + v̂ᵢv̂ᵢᵀ in blocks of in/n, and H̃ alike in blocks of out/n. Not
    orthogonal, but bounded: ‖Hᵢ − I‖ ≤ 2, whatever is learned. v starts at u, so training starts at the base.

    n: the number of blocks; they save work, not parameters.
    Trained: 2·(in + out). Raises ValueError if n does not divide `in` and `out`.
    Source: Bini et al. 2024, arXiv:2405.20271, sections 3.3 and 3.4.
    """

    family = "orthogonal"

    def __init__(self, layer: nn.Module, n: int = 4):
        super().__init__(layer)
        if n < 1:
            raise ValueError(f"n={n} is no number of blocks; take 1 or more")
        for side, features in zip(("out", "in"), shape_of(layer), strict=True):
            u = torch.empty(n, block_of(features, None, n, most=0))
            nn.init.kaiming_uniform_(u, a=math.sqrt(5))
            setattr(self, f"u_{side}", nn.Parameter(u))
            setattr(self, f"v_{side}", nn.Parameter(u.clone()))

    @staticmethod
    def size(out_features: int, in_features: int, **_) -> int:
        """2·(in + out)"""
        return 2 * (in_features + out_features)

    def forward(self, f, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        own = x.to(self.u_in.dtype)
        y = f((own + (along(own, self.v_in) - along(own, self.u_in))).to(x.dtype))
        own = (y if self.layer.bias is None else y - self.layer.bias).to(self.u_out.dtype)  # b is not turned
        return y + (along(own, self.v_out) - along(own, self.u_out)).to(y.dtype)
