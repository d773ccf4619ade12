"""Adapters from Kronecker products. Karimi Mahabadi et al. 2021, arXiv:2106.04647."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._bottleneck import ACTIVATIONS, bottleneck_width, checked_activation


class Compacter(Adapter):
    """Compacter: Houlsby's adapters whose matrices are sums of Kronecker products of few small factors.

    y = h + up(σ(down(h))) with h = f(x), each of the two x ↦ x·W + c with W = Σᵢ Aᵢ ⊗ (sᵢ·tᵢ), i = 1…n, where
    Aᵢ (n, n) is shared by all layers of the model, sᵢ (in/n, r) and tᵢ (r, out/n) are the layer's own. W has in·out
    entries from r·(in + out) numbers. t of the second starts at zero, so that training starts exactly at the base.

    n: number and size of the Aᵢ. rank: r. reduction: D / b, or bottleneck: b itself. activation: σ.
    Trained: 2·r·(D + b) + b + D a site, and n³ once. Raises ValueError if n does not divide D and b.
    Source: Karimi Mahabadi et al. 2021, arXiv:2106.04647, "Compacter layer"; Compacter++ is targets="ffn-output".
    """

    family = "bottleneck"
    targets = "sublayer-output"

    def __init__(
        self, layer: nn.Module, n: int = 4, rank: int = 1, reduction: float = 32, bottleneck: int | None = None,
        activation: str = "gelu",
    ):  # fmt: skip
        super().__init__(layer)
        D = shape_of(layer)[0]
        b = bottleneck_width(D, reduction, bottleneck)
        if n < 1 or rank < 1 or D % n or b % n:
            raise ValueError(f"n={n} must divide the width {D} and the bottleneck {b}, and rank={rank} be at least 1; "
                             f"choose bottleneck={max(1, round(b / max(n, 1))) * max(n, 1)} or another n")  # fmt: skip
        self.activation = checked_activation(activation)
        self.A = nn.Parameter(torch.randn(n, n, n) / n)
        # with these deviations, W starts with that of nn.Linear's own weights or so, 1/√D
        self.down_s = nn.Parameter(torch.randn(n, D // n, rank) * math.sqrt(n / D))
        self.down_t = nn.Parameter(torch.randn(n, rank, b // n) / math.sqrt(rank))
        self.up_s = nn.Parameter(torch.randn(n, b // n, rank) * math.sqrt(n / b))
        self.up_t = nn.Parameter(torch.zeros(n, rank, D // n))
        self.down_bias, self.up_bias = nn.Parameter(torch.zeros(b)), nn.Parameter(torch.zeros(D))

    @classmethod
    def share(cls, made) -> None:
        """One layer (the first by name) keeps A; the others refer to it, so that it is trained and saved once."""
        keeper = made[min(made)]
        for adapter in made.values():
            if adapter is not keeper:
                del adapter.A
                adapter.__dict__["A"] = keeper.A

    @staticmethod
    def size(
        out_features: int, in_features: int, rank: int = 1, reduction: float = 32, bottleneck: int | None = None, **_
    ) -> int:
        """2·r·(D + b) + b + D, without the n³ shared ones"""
        b = bottleneck_width(out_features, reduction, bottleneck)
        return 2 * rank * (out_features + b) + b + out_features

    def expected(self) -> int:
        return super().expected() + ("A" in self._parameters) * self.hyper["n"] ** 3

    def weight(self, s: Tensor, t: Tensor) -> Tensor:
        """Σᵢ Aᵢ ⊗ (sᵢ·tᵢ): (n, in/n, r) and (n, r, out/n) -> (in, out)"""
        return torch.einsum("ipq,iar,irc->paqc", self.A.to(s), s, t).reshape(-1, t.shape[0] * t.shape[2])

    def delta(self, h: Tensor) -> Tensor:  # (..., D) -> (..., D)
        z = h @ self.weight(self.down_s, self.down_t) + self.down_bias
        return ACTIVATIONS[self.activation](z) @ self.weight(self.up_s, self.up_t) + self.up_bias

    def forward(self, f, x: Tensor) -> Tensor:
        h = f(x)
        return h + self.change(h)
