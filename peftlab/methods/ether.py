"""ETHER: reflect a layer's input. Bini et al. 2024, arXiv:2405.20271."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._block_sizes import block_of
from ._rotations import along


class ETHER(Adapter):
    """ETHER: the input is reflected, block by block, at one trained plane each.

    h = W₀Hx + b with H = diag(H₁ … Hₙ), Hᵢ = I − 2ûᵢûᵢᵀ, û = u / ‖u‖, in blocks of in/n. Whatever is learned, Hᵢ is
    orthogonal and ‖Hᵢ − I‖ = 2: neither nearer to the base nor further from it, so that high learning rates are safe.
    It starts there too, at random planes: training does not start at the base.

    n: the number of blocks; they save work, not parameters. Trained: in. Raises ValueError if n does not divide `in`.
    Source: Bini et al. 2024, arXiv:2405.20271, sections 3.2 and 3.4.
    """

    family = "orthogonal"

    def __init__(self, layer: nn.Module, n: int = 4):
        super().__init__(layer)
        if n < 1:
            raise ValueError(f"n={n} is no number of blocks; take 1 or more")
        self.u = nn.Parameter(torch.empty(n, block_of(shape_of(layer)[1], None, n, most=0)))
        nn.init.kaiming_uniform_(self.u, a=math.sqrt(5))

    @staticmethod
    def size(out_features: int, in_features: int, **_) -> int:
        """in"""
        return in_features

    def forward(self, f, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        own = x.to(self.u.dtype)
        return f((own - 2 * along(own, self.u)).to(x.dtype))
