"""PVeRA: VeRA with a random latent. Fillioux et al. 2025, arXiv:2512.07703."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._shared import Frozen, Held, agree, keep, largest, seeded, uniform


class PVeRA(Adapter):
    """PVeRA: VeRA, whose r numbers between the random matrices are drawn from a normal distribution that is learned.

    h = W₀x + Λ_b·B·z, z ~ N(μ, σ²) with (μ, log σ²) = Λ_d·A·x, where A (2r, in) and B (out, r) are frozen, random and
    shared by all layers, d (2r,) starts at `d_initial` and b (out,) at zero, so training starts at the base.
    In training z = μ + σ⊙ε with ε ~ N(0, 1) for each token, so that gradients reach μ and σ (the reparameterisation of
    variational autoencoders). Else z = μ: then it is an added matrix, and it merges.

    r: length of z, one for all layers. dropout: on the adapter's input. seed: of A and B. save_projection: both in the
    file. Trained: out + 2r; σ's half of d learns in training mode only. Raises ValueError for r below 1.
    Source: Fillioux et al. 2025, arXiv:2512.07703. HF PEFT's `sample_at_inference` is not here.
    """

    family = "shared and vector-based"
    hf_type = "PVERA"
    hf_hyper = {"r": "r", "d_initial": "d_initial", "dropout": "pvera_dropout", "seed": "projection_prng_key",
                "save_projection": "save_projection"}  # fmt: skip
    hf_ignored = frozenset({"generator_seed"})  # of ε

    def __init__(
        self, layer: nn.Module, r: int = 256, d_initial: float = 0.1, dropout: float = 0.0, seed: int = 0,
        save_projection: bool = False,
    ):  # fmt: skip
        super().__init__(layer)
        if r < 1:
            raise ValueError(f"rank r={r} is below 1")
        self.pvera_lambda_d = nn.Parameter(torch.full((2 * r,), float(d_initial)))
        self.pvera_lambda_b = nn.Parameter(torch.zeros(shape_of(layer)[0]))
        self.dropout = nn.Dropout(dropout)
        self.r, self.seed, self.save_projection = r, seed, save_projection
        self.shared: Held = None  # Frozen: A and B

    @classmethod
    def share(cls, made) -> None:
        agree(made, "r", "seed", "save_projection")
        one, draw = made[min(made)], seeded(made[min(made)].seed)
        out_features, in_features = largest(made)
        A = uniform(draw, one, 2 * one.r, in_features)
        keep(made, "shared", Frozen(one.save_projection, pvera_A=A, pvera_B=uniform(draw, one, out_features, one.r)))

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 256, **_) -> int:
        """out + 2·r"""
        return out_features + 2 * r

    def pair(self) -> tuple[Tensor, Tensor]:
        """A (2r, in) and B (out, r) of this layer."""
        if self.shared is None:  # attached to nothing: a pair of its own
            self.share({"": self})
        out_features, in_features = shape_of(self.layer)
        return self.shared.pvera_A[:, :in_features], self.shared.pvera_B[:out_features]

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        A, B = (frozen.to(x) for frozen in self.pair())
        mu, log_variance = (self.pvera_lambda_d * (self.dropout(x) @ A.T)).chunk(2, dim=-1)
        z = mu + torch.randn_like(mu) * (log_variance / 2).exp() if self.training else mu
        return self.pvera_lambda_b * (z @ B.T)

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """The mean's, outside of training."""
        if self.training:
            return None
        A, B = self.pair()
        return self.pvera_lambda_d[: self.r, None] * A[: self.r], self.pvera_lambda_b[:, None] * B, 1.0
