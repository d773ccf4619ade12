"""VeLoRA: a LoRA that remembers its inputs as a few numbers each. Miles et al. 2024, arXiv:2405.17991."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import Adapter
from ._lora import PARAMS, Given, begin, entries


class VeLoRA(Adapter):
    """VeLoRA: between the passes, an input is kept as its shadow on one vector v in each of G groups of features.

    h = W₀x + (α/r)·B·A·x as in LoRA; but for A's gradient, λ·(Σ g·zᵀ) ⊗ v here, a token x is kept as z = (x₁·v, …,
    x_G·v), G numbers in place of in. On the way back x is taken for (z₁v, …, z_Gv). All other gradients are exact.

    v (⌈in/G⌉,), of length 1, by `start`: "batch_average_once", the mean group of the first batch, as in the paper;
    "batch_average", that of each batch; "random". groups: G, more of them are nearer to the gradient and keep more.
    scale: λ. Evaluated, it is LoRA. Trained: r·(in + out). ValueError for groups, a scale or a start out of range.
    Source: Miles et al. 2024, arXiv:2405.17991, on the inputs of LoRA's A as in HF PEFT.
    """

    hf_type, hf_flags, family = "LORA", {"velora_config": Given()}, "low-rank"
    hf_hyper = entries("velora_config", groups="num_groups", scale="scale", start="init_type")
    hf_params, memory = {**PARAMS, "v": "lora_velora_embed"}, ("v",)

    def __init__(
        self, layer: nn.Module, r: int = 8, alpha: float = 16, dropout: float = 0.0, rslora: bool = False,
        groups: int = 8, scale: float = 1.0, start: str = "batch_average_once",
    ):  # fmt: skip
        super().__init__(layer)
        in_features = begin(self, r, alpha, dropout, rslora)
        if not 1 <= groups <= in_features or scale <= 0:
            raise ValueError(f"groups={groups}, scale={scale}: take 1…{in_features} groups and a scale above 0")
        if start not in ("batch_average_once", "batch_average", "random"):
            raise ValueError(f"start={start!r}: take 'batch_average_once', 'batch_average' or 'random'")
        v = torch.randn(-(-in_features // groups))
        self.register_buffer("v", F.normalize(v, dim=0) * (start == "random"))  # nil: not known yet
        self.groups, self.scale, self.start = groups, scale, start

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 8, **_) -> int:
        """r·(in + out)"""
        return r * (in_features + out_features)

    @torch.no_grad()
    def vector(self, x: Tensor) -> Tensor:
        """v for a batch (..., G, in/G), which is remembered."""
        mean = x.flatten(0, -2).mean(0)
        mean = F.normalize(mean + ~mean.any(), dim=0)
        if self.start != "random":
            self.v.copy_(mean if self.start == "batch_average" else torch.where(self.v.any(), self.v, mean))
        return self.v.clone()

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        x, A = self.dropout(x), self.lora_A
        if not self.training:
            return self.scaling * (x @ A.T @ self.lora_B.T)
        parts = F.pad(x.detach(), (0, -x.shape[-1] % self.groups)).unflatten(-1, (self.groups, -1))
        return self.scaling * (Shadow.apply(x, A, parts, self.vector(parts), self.scale) @ self.lora_B.T)

    def factors(self):
        return None if self.training else (self.lora_A, self.lora_B, self.scaling)


class Shadow(torch.autograd.Function):
    """x·Aᵀ that keeps x·v group by group in place of x."""

    @staticmethod
    def forward(ctx, x: Tensor, A: Tensor, parts: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward((parts @ v).to(x.dtype), A, scale * v)  # autocast makes 16 bits of products
        return (x @ A.T).to(x.dtype)

    @staticmethod
    def backward(ctx, g: Tensor):
        z, A, v = ctx.saved_tensors
        gz = g.flatten(0, -2).T @ z.flatten(0, -2)  # Σ g·zᵀ: (r, G)
        return g @ A, (gz[..., None] * v).flatten(1)[:, : A.shape[1]], None, None, None
