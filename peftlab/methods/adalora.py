"""AdaLoRA: low-rank adaptation whose ranks are given to the layers that need them. Zhang et al. 2023."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._budget import keep_the_best

NAMES = ("lora_A", "lora_E", "lora_B")


class AdaLoRA(Adapter):
    """AdaLoRA: the change is P·Λ·Q, and while it is trained the least important triplets of all layers are dropped.

    h = W₀x + (α/r)·B·(E ⊙ A)·x, with A = Q (r, in) and B = P (out, r) drawn at random and E = Λ (r, 1) zero, so that
    training starts at the base. Triplet i is E_i, row i of A, column i of B. `pl.train` adds a term that keeps A's rows
    and B's columns orthonormal, and after each step drops the worst triplets (E_i = 0; see `_budget`): r a layer stay
    until step tinit, then by (1 − progress)³ less, down to target_r on average, tfinal steps before the end.

    A loop of your own adds each `penalty()` to the loss and calls AdaLoRA.stepped({path: adapter}, step, steps) after
    each step. Costs two more copies of all parameters. deltaT: steps between two choices. beta1, beta2: memory of the
    importance and of its spread. orth: weight of the term. dropout: on the input of A. Trained: r·(in + out) + r.
    Raises ValueError for target_r above r, other values out of range, a schedule longer than the steps.
    Source: Zhang et al. 2023, arXiv:2303.10512, section 3; the term as in the authors' code, which takes the mean of
    the norms where the paper sums their squares. α is divided by r + 10⁻⁵, as in HF PEFT.
    """

    family = "low-rank"
    hf_type, hf_patterns = "ADALORA", {}  # its rank_pattern is another thing: which triplets are kept
    hf_hyper = {"r": "init_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "orth": "orth_reg_weight",
                **{name: name for name in ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2")}}  # fmt: skip
    memory = ("mask", *(f"{kind}_{name}" for kind in ("mean", "spread") for name in NAMES))
    layers = 1  # among which the budget is shared

    def __init__(self, layer: nn.Module, r: int = 12, target_r: int = 8, alpha: float = 8, dropout: float = 0.0,
                 tinit: int = 0, tfinal: int = 0, deltaT: int = 1, beta1: float = 0.85, beta2: float = 0.85,
                 orth: float = 0.5):  # fmt: skip
        super().__init__(layer)
        o, i = shape_of(layer)
        if not 1 <= target_r <= r or min(tinit, tfinal, deltaT - 1, orth) < 0 or not (0 < beta1 < 1 and 0 < beta2 < 1):
            raise ValueError(f"target_r={target_r} must be in 1…{r}=r; tinit={tinit}, tfinal={tfinal}, orth={orth} at "
                             f"least 0; deltaT={deltaT} at least 1; beta1={beta1}, beta2={beta2} between 0 and 1")
        for name, shape in zip(NAMES, ((r, i), (r, 1), (o, r)), strict=True):
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
            for kind in ("mean", "spread"):
                self.register_buffer(f"{kind}_{name}", torch.zeros(shape), persistent=False)
        for factor in (self.lora_A, self.lora_B):
            nn.init.normal_(factor, std=0.02)
        self.register_buffer("mask", torch.ones(r, dtype=torch.bool))  # the triplets that are kept
        self.dropout = nn.Dropout(dropout)
        self.scaling = alpha / (r + 1e-5)

    @classmethod
    def share(cls, made) -> None:
        for adapter in made.values():
            adapter.layers = len(made)

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 12, **_) -> int:
        """r·(in + out) + r"""
        return r * (in_features + out_features) + r

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return self.scaling * (self.dropout(x) @ (self.lora_E * self.lora_A).T @ self.lora_B.T)

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        dropping = self.training and self.dropout.p > 0
        return None if dropping else (self.lora_E * self.lora_A, self.lora_B, self.scaling)

    def penalty(self) -> Tensor:
        """orth · mean over all A and B of ‖AAᵀ − I‖ and ‖BᵀB − I‖: this layer's part."""
        A, B, one = self.lora_A, self.lora_B, torch.eye(len(self.lora_A)).to(self.lora_A)
        return self.hyper["orth"] / (2 * self.layers) * ((A @ A.T - one).norm() + (B.T @ B - one).norm())

    @classmethod
    def stepped(cls, made, step: int, steps: int) -> None:
        keep_the_best(made, step, steps)
