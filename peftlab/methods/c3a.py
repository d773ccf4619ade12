"""C3A: the change is made of circulant blocks, and multiplied by Fourier transforms. Chen et al. 2024."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of, wide
from ..sites import at, bare


class C3A(Adapter):
    """C3A (circular convolution adaptation): a change of full rank whose blocks have one trained row each.

    h = W₀x + ΔW·x, with ΔW (out, in) cut into b × b blocks, each circulant: entry (k, j) is w[(j − k) mod b] / in. Such
    a block times a vector is a circular correlation, so in frequencies a product: with F the Fourier transform of b
    numbers, block·x = F⁻¹(F(x) ⊙ conj F(w)) / in: O(b·log b), and the matrix is never built.

    b, block_size: divides in and out of each target; by default the greatest number that divides all of them. w starts
    uniform in ±√(6 / (in + out)) as in HF PEFT, not at zero, so training does not start exactly at the base.
    Trained: out·in/b. Raises ValueError for a block size that does not divide a layer's sizes, naming what does.
    HF PEFT 0.21 chains two active C3A adapters instead of adding them (its forward reassigns x), and the gradient that
    it gives the input is not the derivative; here they add up, and it is (tests/test_reparameterised.py shows both).
    Source: Chen et al. 2024, "Parameter-efficient fine-tuning via circular convolution", arXiv:2407.19342, section 3.
    """

    family = "spectral and structured"
    hf_type = "C3A"
    hf_hyper, hf_patterns = {"block_size": "block_size"}, {"block_size": "block_size_pattern"}

    def __init__(self, layer: nn.Module, block_size: int | None = None):
        super().__init__(layer)
        out_features, in_features = shape_of(layer)
        b = block_size or math.gcd(out_features, in_features)
        if b < 1 or out_features % b or in_features % b:
            raise ValueError(f"block_size={block_size} does not divide {out_features}×{in_features}; the divisors of "
                             f"{math.gcd(out_features, in_features)} do")  # fmt: skip
        self.c3a_kernel = nn.Parameter(torch.empty(out_features // b, in_features // b, b))
        edge = math.sqrt(6 / (in_features + out_features))  # Glorot's uniform range
        nn.init.uniform_(self.c3a_kernel, -edge, edge)

    @classmethod
    def plan(cls, model, paths, hyper):
        """One block size for all targets, as files have it."""
        sizes = [n for path in paths for n in shape_of(bare(at(model, path)))]
        block = hyper.get("block_size") or math.gcd(*sizes)
        return {path: (cls, {"block_size": block}) for path in paths}

    @staticmethod
    def size(out_features: int, in_features: int, block_size: int | None = None, **_) -> int:
        """out·in/b"""
        return out_features * in_features // (block_size or math.gcd(out_features, in_features))

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        b = self.c3a_kernel.shape[-1]
        pieces = torch.fft.rfft(wide(x).unflatten(-1, (-1, b)))  # (..., in/b, b/2 + 1)
        w = torch.fft.rfft(wide(self.c3a_kernel)).conj()  # (out/b, in/b, b/2 + 1)
        blocks = torch.fft.irfft(torch.einsum("...nf,mnf->...mf", pieces, w), n=b)
        return blocks.flatten(-2) / x.shape[-1]
