"""HRA: rotate a layer's input by a chain of reflections. Yuan et al. 2024, arXiv:2405.17484."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of, wide


class HRA(Adapter):
    """HRA (Householder reflection adaptation): the input is reflected at r trained planes, then the layer sees it.

    h = W₀H₁H₂…Hᵣx + b with Hᵢ = I − 2ûᵢûᵢᵀ, û = u / ‖u‖: an orthogonal matrix, and I plus one of rank r, so that this
    is a way between OFT and LoRA. The two planes of a pair start equal, and two reflections at one plane are none:
    training starts at the base. A pair's product is computed as a rotation, from the difference d = û₁ − û₂,

        H₁H₂x = x + 2a·d − 2(dᵀx + a‖d‖²)·û₁   with a = û₂ᵀx,

    which is exact where d is small; one after the other they would leave rounding errors of the size of x.

    r: even; if odd, the last plane has no partner, and training does not start at the base. apply_GS: the planes are
    made orthogonal by Gram–Schmidt, H = I − 2U(UᵀU)⁻¹Uᵀ: with r eigenvalues −1 it is never the identity, and starts at
    random planes. Trained: r·in. Raises ValueError for r below 1, or above `in` with apply_GS.
    Source: Yuan et al. 2024, arXiv:2405.17484, section 3.1; apply_GS is its λ = ∞. HF PEFT 0.21 builds H, dense, in·in
    numbers a layer, and with apply_GS starts at what rounding leaves of equal planes (tests/test_orthogonal.py).
    """

    hf_type = "HRA"
    hf_hyper = {"r": "r", "apply_GS": "apply_GS"}
    family = "orthogonal"

    def __init__(self, layer: nn.Module, r: int = 8, apply_GS: bool = False):
        super().__init__(layer)
        inputs = shape_of(layer)[1]
        if r < 1 or (apply_GS and r > inputs):
            raise ValueError(f"r={r} is not in 1…{inputs}: there are no more planes at right angles to each other")
        paired = not apply_GS and r % 2 == 0
        u = torch.empty(inputs, r // 2 if paired else r)
        nn.init.kaiming_uniform_(u, a=math.sqrt(5))
        self.hra_u = nn.Parameter(u.repeat_interleave(2, 1) if paired else u)
        self.apply_GS = apply_GS

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 8, **_) -> int:
        """r·in"""
        return r * in_features

    def reflected(self, x: Tensor) -> Tensor:  # (..., in) -> (..., in)
        if self.apply_GS:
            U = torch.linalg.qr(wide(self.hra_u)).Q.to(x.dtype)
            return x - 2 * (x @ U) @ U.T
        # rows: equal planes must have equal norms to the last bit, which sums over columns may not give
        units = nn.functional.normalize(self.hra_u.T.contiguous(), dim=1)
        if len(units) % 2:
            x = x - 2 * (x @ units[-1:].T) * units[-1]
        for k in range(len(units) // 2 * 2 - 1, 0, -2):
            first, second = units[k - 1], units[k]
            d, a = first - second, (x @ second)[..., None]
            x = x + 2 * a * d - 2 * ((x @ d)[..., None] + a * (d @ d)) * first
        return x

    def forward(self, f, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return f(self.reflected(x.to(self.hra_u.dtype)).to(x.dtype))
