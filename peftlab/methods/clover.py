"""CLOVER: retrain how a head combines its own directions. Meng et al. 2024, arXiv:2411.17426."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of, weight_of
from ..sites import at, bare
from ._block_sizes import block_of, fitting


class CLOVER(Adapter):
    """CLOVER (cross-layer orthogonal vectors): by a small matrix, each head mixes its own orthonormal directions anew.

    h ← h + S_h·T_h⁻¹·(h − b) on each head h of W₀x + b, W₀ cut along the outputs into W_h (d, in) = T_h·V_h, with
    V_h·V_hᵀ = I. T_h (d, d) becomes T_h + S_h, a change of full rank, and S_h starts at 0, so that training starts at
    the base. T_h = (W_h·W_hᵀ)^½, the one that no choice of signs enters.

    This is the paper's form for keys and MLP layers, where d neighbours count as a head. For values it has the matrix
    between V and the output layer instead: the same functions in other coordinates (both reach every W_V·M·W_O).
    Attaching reads W₀ once; T⁻¹ is out·d more frozen numbers. Directions along which a head gives nothing stay unused.
    d: the size of a head, by default the greatest number up to 64 that divides the outputs of all targets.
    Trained: out·d. Raises ValueError if d does not divide `out`, or is above `in`.
    Source: Meng et al. 2024, arXiv:2411.17426, sections 3 and 4.2: keys and values with d = 128, the MLP's up with 64.
    """

    family = "orthogonal"

    def __init__(self, layer: nn.Module, d: int | None = None):
        super().__init__(layer)
        out_features, in_features = shape_of(layer)
        d = block_of(out_features, d, None, most=64)
        if d > in_features:
            raise ValueError(f"a head of d={d} has only {in_features} inputs and as many directions; take a smaller d")
        self.register_buffer("inverse", inverse_roots(layer, d), persistent=False)
        self.S = nn.Parameter(torch.zeros(out_features // d, d, d))

    @classmethod
    def plan(cls, model, paths, hyper):
        """One size for all targets, as files have it."""
        d = hyper.get("d") or fitting([shape_of(bare(at(model, path)))[0] for path in paths], 64)
        return {path: (cls, {"d": d}) for path in paths}

    @staticmethod
    def size(out_features: int, in_features: int, d: int | None = None, **_) -> int:
        """out·d"""
        return out_features * block_of(out_features, d, None, most=64)

    def forward(self, f, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        y = f(x)
        own = (y if self.layer.bias is None else y - self.layer.bias).to(self.S.dtype).unflatten(-1, self.S.shape[:2])
        return y + torch.einsum("hij,hjk,...hk->...hi", self.S, self.inverse, own).flatten(-2).to(y.dtype)


@torch.no_grad()
def inverse_roots(layer: nn.Module, d: int) -> Tensor:
    """(W_h·W_hᵀ)^-½ of each head, (out/d, d, d), in float32; nothing along directions that are not there."""
    W = weight_of(layer).detach().double().unflatten(0, (-1, d))
    values, vectors = torch.linalg.eigh(W @ W.mT)
    inverse = torch.where(values > 1e-10 * values[:, -1:], values.clamp(min=1e-300).rsqrt(), 0)
    return (vectors * inverse[:, None] @ vectors.mT).float()
