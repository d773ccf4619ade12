"""DVoRA: DoRA's magnitudes around VeRA's directions. Liu et al. 2024, arXiv:2402.09353."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import weight_of
from .vera import VeRA


class DVoRA(Adapter):
    """DVoRA: DoRA whose directions are turned by VeRA instead of LoRA, so that it trains vectors alone.

    h = m ⊙ (V / ‖V‖)·x + bias with V = W₀ + Λ_b·B·Λ_d·A, where A (r, in) and B (out, r) are frozen, random and shared
    by all layers, as in `VeRA`, and ‖V‖ (out,) holds the length of each row of V, a constant on the way back, as in
    `DoRA`. d (r,) starts at `d_initial`, b (out,) at zero and m (out,) at the lengths of W₀, so training starts at the
    base.

    Each pass reads W₀, dense, and multiplies the r·(in + out) numbers of A and B for the lengths: with VeRA's large r
    that costs as much as the layer on r tokens. Behind other adapters: see `DoRA`.
    r, d_initial, dropout, seed, save_projection: see `VeRA`. Trained: 2·out + r. Raises ValueError for r below 1.
    Source: Liu et al. 2024, arXiv:2402.09353, its experiment with VeRA.
    """

    family = "shared and vector-based"

    def __init__(
        self, layer: nn.Module, r: int = 256, d_initial: float = 0.1, dropout: float = 0.0, seed: int = 0,
        save_projection: bool = False,
    ):  # fmt: skip
        super().__init__(layer)
        self.vera = VeRA(layer, r, d_initial, dropout, seed, save_projection)
        self.m = nn.Parameter(self.lengths(0.0))

    @classmethod
    def share(cls, made) -> None:
        VeRA.share({path: adapter.vera for path, adapter in made.items()})

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 256, **_) -> int:
        """2·out + r"""
        return 2 * out_features + r

    def lengths(self, turned: Tensor | float) -> Tensor:
        """‖W₀ + turned‖ of each row, (out,); a constant for autograd."""
        W0 = weight_of(self.layer).detach().to(self.vera.vera_lambda_b.dtype)
        return torch.linalg.vector_norm(W0 + turned, dim=1).clamp(min=torch.finfo(W0.dtype).tiny)  # a pruned row is 0

    def turned(self) -> Tensor:
        """Λ_b·B·Λ_d·A, (out, in)."""
        d, b = self.vera.vera_lambda_d.detach(), self.vera.vera_lambda_b.detach()
        A, B = (frozen.to(b) for frozen in self.vera.pair())
        return (b[:, None] * B) @ (d[:, None] * A)

    def forward(self, f, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        y, gain, bias = f(x), self.m / self.lengths(self.turned()), getattr(self.layer, "bias", None)
        W0x = y if bias is None else y - bias
        BAx = self.vera.delta(x.to(self.m.dtype))
        return (y + ((gain - 1) * W0x + gain * BAx)).to(y.dtype)  # written so that a gain of 1 is exact
