"""MixLoRA: a feed-forward network becomes a mixture of experts, each a LoRA on it. Li et al. 2024, arXiv:2404.15159."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ._experts import key, linear_inside, load, plan_experts, share_experts


class MixLoRA(Adapter):
    """MixLoRA: the frozen feed-forward network with n sets of LoRAs, and a router that picks k of them for each token.

    y = Σᵢ wᵢ·FFNᵢ(x) over the k experts with the largest p = softmax(R·x), wᵢ = pᵢ/Σp over these, R (n, d); FFNᵢ is the
    network with W + (α/r)·Bᵢ·Aᵢ in each of its linear layers. B = 0, so training starts at the base; it is computed as
    FFN(x) + Σᵢ wᵢ·(FFNᵢ(x) − FFN(x)). The paper has LoRA in the attention besides: attach one, and activate both.

    `pl.train` adds the load-balance loss balance·n·Σᵢ Fᵢ·Pᵢ, with Fᵢ the share of tokens whose first choice is i and Pᵢ
    the mean of pᵢ: balance if all is even, n times that if one expert does everything. It moves R alone.
    Clear, not fast: every expert computes every token, in n + 1 passes of the network. Cannot be merged. top_k: k.
    Trained: n·(r·Σ(in + out) + d) a network. Raises ValueError for numbers out of range, or no linear layers.
    Source: Li et al. 2024, arXiv:2404.15159; F and P as in Fedus et al. 2021, arXiv:2101.03961, section 2.2.
    """

    targets, mixes, family = "all-mlp", False, "mixture"

    def __init__(self, layer, r: int = 8, alpha: float = 16, experts: int = 4, top_k: int = 2, balance: float = 0.01):
        super().__init__(layer)
        shapes = linear_inside(layer)
        if not shapes or r < 1 or not 2 <= top_k <= experts:
            raise ValueError(f"r={r}, top_k={top_k} of experts={experts}: needs r ≥ 1, linear layers inside, and two "
                             "experts or more a token: with one, w = 1 teaches R nothing")  # fmt: skip
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for path, (out_features, in_features) in shapes.items():
            self.lora_A[key(path)] = nn.Parameter((2 * torch.rand(experts, r, in_features) - 1) / in_features**0.5)
            self.lora_B[key(path)] = nn.Parameter(torch.zeros(experts, out_features, r))
        self.router = nn.Parameter(0.02 * torch.randn(experts, next(iter(shapes.values()))[1]))
        self.scaling, self.top_k, self.balance = alpha / r, top_k, balance
        self.expert: int | None = None  # the one that runs now
        self.x: Tensor | None = None  # of the last pass in training, for the penalty

    @classmethod
    def plan(cls, model, paths, hyper):
        return plan_experts(cls, model, paths, hyper)

    @classmethod
    def share(cls, made):
        share_experts(made)

    def expected(self) -> int:
        """n·(r·Σ(in + out) + d), d of the network's input"""
        shapes = list(linear_inside(self.layer).values())
        return self.hyper["experts"] * (self.hyper["r"] * sum(map(sum, shapes)) + shapes[0][1])

    def probabilities(self, x: Tensor) -> Tensor:  # (..., d) -> (..., n)
        return torch.softmax(x.to(self.router.dtype) @ self.router.T, -1)

    def penalty(self) -> Tensor | None:
        x, self.x = self.x, None
        return None if x is None else self.balance * load(self.probabilities(x).flatten(0, -2))

    def change(self, x: Tensor, path: str) -> Tensor:
        """What the expert that runs now adds in a linear layer."""
        A, B = self.lora_A[key(path)][self.expert], self.lora_B[key(path)][self.expert]
        return (self.scaling * (x.to(A.dtype) @ A.T @ B.T)).to(x.dtype)

    def forward(self, f, x: Tensor, *others) -> Tensor:
        self.x = x.detach() if self.training else None
        p = self.probabilities(x)
        best = p.topk(self.top_k, -1)
        w = torch.zeros_like(p).scatter(-1, best.indices, best.values / best.values.sum(-1, keepdim=True))
        self.expert = None  # gradient checkpointing leaves the loop below as soon as it has what it needs
        y = base = f(x, *others)
        for i in range(len(self.router)):
            self.expert = i
            y = y + (w[..., i, None] * (f(x, *others) - base)).to(y.dtype)
        self.expert = None
        return y
