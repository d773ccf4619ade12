"""MonteCLoRA: a LoRA whose A is a distribution while it learns. Sengupta et al. 2024, arXiv:2411.04358."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ._lora import PARAMS, Given, begin, entries


class MonteCLoRA(Adapter):
    """MonteCLoRA: while training, A is a mean of n Gaussian samples around it, which smooths the loss that it sees.

    h = W₀x + (α/r)·B·(A + ε·Σᵢ wᵢ·√v ⊙ Zᵢ)·x with Zᵢ ~ N(0, 1) (r, in), a variance v for each row, and weights w of the
    samples. v is the diagonal of a Wishart matrix with r degrees of freedom: exp(2s) times independent χ²ᵣ. w
    is drawn from a Dirichlet of exp(c), as the softmax of a Gaussian near it. s (r,) and c (n,) are trained, and the
    loss has κ times the KL of w, v and the samples to their priors, a mean over the layers. Evaluated, it is LoRA.

    samples: n. noise: ε. kl: κ. prior: concentration of w's prior. Each pass draws n·r·in numbers a layer.
    Trained: r·(in + out) + r + n. Raises ValueError for a rank, samples or a prior out of range.
    HF PEFT 0.21 has a plus in the Dirichlet's KL where a minus belongs, so that it can be below zero.
    Source: Sengupta et al. 2024, arXiv:2411.04358, section 4.
    """

    family = "low-rank"
    hf_type, hf_flags, _theirs = "LORA", {"monteclora_config": Given()}, "lora_monteclora_sampler."
    hf_hyper = entries("monteclora_config", samples="num_samples", noise="sample_scaler", kl="kl_loss_weight",
                       prior="dirichlet_prior")  # fmt: skip
    hf_params = {**PARAMS, "s": _theirs + "std_prior", "c": _theirs + "expert_weights_prior",
                 "v": _theirs + "gaussian_var_prior", "w": _theirs + "expert_weights"}  # fmt: skip

    def __init__(
        self, layer: nn.Module, r: int = 8, alpha: float = 16, dropout: float = 0.0, rslora: bool = False,
        samples: int = 8, noise: float = 1e-4, kl: float = 1e-5, prior: float = 0.1,
    ):  # fmt: skip
        super().__init__(layer)
        begin(self, r, alpha, dropout, rslora)
        if samples < 1 or prior <= 0:
            raise ValueError(f"samples={samples}, prior={prior}: take at least one sample and a prior above 0")
        self.s, self.c = nn.Parameter(torch.rand(r)), nn.Parameter(torch.rand(samples))
        self.register_buffer("v", torch.eye(r))  # HF PEFT's file has its last v and w; nothing reads them
        self.register_buffer("w", torch.full((samples,), 1 / samples))
        self.noise, self.kl, self.prior, self.layers = noise, kl, prior, 1

    @classmethod
    def share(cls, made):
        for adapter in made.values():
            adapter.layers = len(made)

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 8, samples: int = 8, **_) -> int:
        """r·(in + out) + r + n"""
        return r * (in_features + out_features) + r + samples

    def sampled(self) -> Tensor:
        """A + ε·Σᵢ wᵢ·√v ⊙ Zᵢ: (r, in)"""
        A, c, n = self.lora_A, self.c, len(self.c)
        v = (2 * self.s).exp() * torch.randn(len(A), len(A), dtype=A.dtype, device=A.device).square().sum(1)
        spread = (-c).exp() * (1 - 2 / n) + (-c).exp().sum() / n**2  # Laplace's Gaussian of a Dirichlet, diagonal
        w = torch.softmax(c - c.mean() + spread.clamp(min=1e-6).sqrt() * torch.randn_like(c), 0)
        Z = torch.randn(n, *A.shape, dtype=A.dtype, device=A.device)
        return A + self.noise * v.clamp(min=1e-3).sqrt()[:, None] * torch.einsum("n,nri->ri", w, Z)

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return self.scaling * (self.dropout(x) @ (self.sampled() if self.training else self.lora_A).T @ self.lora_B.T)

    def factors(self):
        return None if self.training else (self.lora_A, self.lora_B, self.scaling)

    def penalty(self) -> Tensor:
        """κ·(KL of w + KL of v + mean over v of the samples' KL), a layer's share"""
        r, n, a, b = len(self.s), len(self.c), self.c.exp(), torch.full_like(self.c, self.prior)
        KL_w = a.sum().lgamma() - b.sum().lgamma() - (a.lgamma() - b.lgamma()).sum()
        KL_w = KL_w + ((a - b) * (a.digamma() - a.sum().digamma())).sum()
        KL_v = r / 2 * ((2 * self.s).exp() - 2 * self.s - 1).sum()
        log_v = 2 * self.s + math.log(2) + self.s.new_tensor(r / 2).digamma()  # its mean
        return self.kl / self.layers * (KL_w + KL_v + n / 2 * (r * (2 * self.s).exp() - log_v - 1).sum())
