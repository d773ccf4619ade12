"""Uni-LoRA: all of LoRA's numbers from one short vector. Li et al. 2025, arXiv:2506.00799."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import device_of, shape_of
from ._dealing import assignment
from ._shared import Frozen, Held, agree, keep, widened


class UniLoRA(Adapter):
    """Uni-LoRA: one vector is trained for the whole model; a fixed projection makes LoRA's factors of all layers of it.

    h = W₀x + B·A·x, where A (r, in) and B (out, r) of all layers, laid end to end as θ_D (D,), are P·θ_d. P (D, d) has
    one entry a row: each number of θ_D is a copy of one number of θ_d, divided by √(how often that is copied). So the
    columns of P are orthonormal, and lengths are kept: ‖P·θ_d‖ = ‖θ_d‖. Which number goes where is random and balanced.
    θ_d starts uniform in ±0.02, and B is made of it too, so training starts close to the base, not at it.

    Memory: r·(in + out) integers a layer, drawn again from the seed, not saved. r: rank. d: length of θ_d. dropout: on
    the adapter's input. seed: of P. save_indices: P in the file. Trained: d, once for the whole model.
    Raises ValueError for r or d below 1. Source: Li et al. 2025, arXiv:2506.00799; balanced as in HF PEFT.
    """

    family = "shared and vector-based"
    hf_type = "UNILORA"
    hf_hyper = {"r": "r", "d": "theta_d_length", "dropout": "unilora_dropout", "seed": "proj_seed",
                "save_indices": "save_indices"}  # fmt: skip

    def __init__(self, layer: nn.Module, r: int = 4, d: int = 256, dropout: float = 0.0, seed: int = 42,
                 save_indices: bool = False):  # fmt: skip
        super().__init__(layer)
        if r < 1 or d < 1:
            raise ValueError(f"r={r} and d={d} must be at least 1")
        out_features, in_features = shape_of(layer)
        self.unilora_theta_d = nn.Parameter(torch.empty(d).uniform_(-0.02, 0.02))
        for name, shape in (("unilora_indices_A", (r, in_features)), ("unilora_indices_B", (out_features, r))):
            self.register_buffer(name, torch.empty(shape, dtype=torch.long), persistent=save_indices)
        self.dropout, self.r, self.d, self.seed, self.save_indices = nn.Dropout(dropout), r, d, seed, save_indices
        self.shared: Held = None  # Frozen: the scale of each number of θ_d

    @classmethod
    def share(cls, made) -> None:
        """Deal θ_d's numbers out to all factors, layer by layer, A before B."""
        agree(made, "r", "d", "seed", "save_indices")
        scale = torch.empty((one := made[min(made)]).d, device=device_of(one.layer))
        if scale.device.type != "meta":
            indices = [i for a in made.values() for i in (a.unilora_indices_A, a.unilora_indices_B)]
            dealt = assignment(sum(i.numel() for i in indices), one.d, one.seed)
            scale.copy_(dealt.bincount(minlength=one.d).clamp(min=1).rsqrt())
            for i, part in zip(indices, dealt.split([i.numel() for i in indices]), strict=True):
                i.copy_(part.view_as(i))
        keep(made, "shared", Frozen(one.save_indices, scale=scale))
        keep(made, "unilora_theta_d", one.unilora_theta_d)

    @staticmethod
    def size(out_features: int, in_features: int, d: int = 256, **_) -> int:
        """d, once a model"""
        return d

    def expected(self) -> int:
        return self.d if "unilora_theta_d" in self._parameters else 0

    def matrices(self, like: Tensor) -> tuple[Tensor, Tensor]:  # A (r, in) and B (out, r)
        if self.shared is None:  # attached to nothing: all of θ_d for this layer
            self.share({"": self})
        numbers = self.unilora_theta_d.to(like) * self.shared.scale.to(like)
        return numbers[self.unilora_indices_A], numbers[self.unilora_indices_B]

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        A, B = self.matrices(x)
        return self.dropout(x) @ A.T @ B.T

    def change(self, x: Tensor) -> Tensor:
        return self.delta(widened(x, self.unilora_theta_d)).to(x.dtype)

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        return None if self.training and self.dropout.p > 0 else (*self.matrices(self.unilora_theta_d), 1.0)
