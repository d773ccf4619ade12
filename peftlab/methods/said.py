"""SAID: fine-tuning in a random subspace of few dimensions. Aghajanyan et al. 2020, arXiv:2012.13255."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of


class SAID(Adapter):
    """SAID: all layers together are moved by one vector of d numbers, blown up by fixed random projections.

    h = W₀x + ΔW·x, vec(ΔW) = λ·P(θ), with θ (d,), from zeros, shared by all layers, and λ, from one, the layer's own;
        P(θ) = first D entries of H·G·Π·H·B·[θ, 0 … 0] / √(D·ΣG²),  D = out·in
    Fastfood: H is Hadamard's matrix of 2ⁿ ≥ D rows, B random signs, Π a permutation, G normal; ‖P(θ)‖ is ‖θ‖ on
    average. The smallest d with 90 % of full fine-tuning's result is a task's intrinsic dimension: the paper needs 200
    for MRPC on a RoBERTa, the default here.

    B, Π and G are drawn from seed and the layer's rank among the targets' paths, so the file holds θ and the λ alone.
    They cost 9 bytes for each entry of the weight, and each pass 2·2ⁿ·n additions a layer: a method to measure with.
    Trained: d once, and 1 a layer. Raises ValueError for a d below 1 or above the entries of a layer.
    Source: Aghajanyan et al. 2020, arXiv:2012.13255; Fastfood: Le et al. 2013, arXiv:1408.3060.
    """

    family = "selective and sparse"

    def __init__(self, layer: nn.Module, d: int = 200, seed: int = 0):
        super().__init__(layer)
        self.shape = shape_of(layer)
        D = self.shape[0] * self.shape[1]
        if not 1 <= d <= D:
            raise ValueError(f"d={d} is not in 1…{D}, the entries of a {self.shape[0]}×{self.shape[1]} layer")
        self.theta, self.scale, self.seed = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.ones(1)), seed
        n = 2 ** math.ceil(math.log2(D))
        for name, dtype in (("signs", torch.int8), ("order", torch.int32), ("normal", torch.float32)):
            self.register_buffer(name, torch.empty(n, dtype=dtype), persistent=False)

    @classmethod
    def share(cls, made) -> None:
        """One layer (the first by name) keeps θ; each layer draws its projection."""
        keeper = made[min(made)]
        for i, path in enumerate(sorted(made)):
            adapter = made[path]
            if adapter is not keeper:
                del adapter.theta
                adapter.__dict__["theta"] = keeper.theta
            if not adapter.signs.is_meta:
                n, draw = len(adapter.signs), torch.Generator().manual_seed(adapter.seed * 100_003 + i)
                adapter.signs.copy_(torch.randint(2, (n,), generator=draw, device="cpu") * 2 - 1)
                adapter.order.copy_(torch.randperm(n, generator=draw, device="cpu"))
                adapter.normal.copy_(torch.randn(n, generator=draw, device="cpu"))

    @staticmethod
    def size(out_features: int, in_features: int, **_) -> int:
        """1, without the d shared ones"""
        return 1

    def expected(self) -> int:
        return 1 + ("theta" in self._parameters) * self.hyper["d"]

    def projected(self, theta: Tensor) -> Tensor:
        """P(θ), as a matrix (out, in)."""
        D, n = self.shape[0] * self.shape[1], len(self.signs)
        v = hadamard(self.signs * nn.functional.pad(theta, (0, n - len(theta))))[self.order.long()]
        return (hadamard(self.normal * v) / (D * self.normal.square().sum()).sqrt())[:D].view(self.shape)

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return x @ (self.scale * self.projected(self.theta.to(x))).T


def hadamard(x: Tensor) -> Tensor:
    """H·x for x (2ⁿ,), in n steps of sums and differences."""
    for _ in range(len(x).bit_length() - 1):
        x = torch.stack([x[0::2] + x[1::2], x[0::2] - x[1::2]]).flatten()
    return x
