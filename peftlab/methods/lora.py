"""LoRA: low-rank adaptation. Hu et al. 2021, arXiv:2106.09685."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._parameters import plan_parameters


class LoRA(Adapter):
    """LoRA: the change of a frozen weight is a product of two thin matrices.

    h = W₀x + (α/r)·B·A·x, with A (r, in) drawn at random and B (out, r) zero, so that training starts at the base.
    With `rslora` the scale is α/√r, meant to keep the size of the update the same at every rank. With `lora_bias` the
    product has a bias c (out,) too, from zero: h = W₀x + (α/r)·(B·A·x + c), as in HF PEFT.
    An initialisation that begins at B₀, A₀ subtracts it: h = W₀x + (α/r)·(B·A − B₀·A₀)·x, with W₀ as it was.

    r: rank, 1 to min(in, out). alpha: α, the numerator of the scale. dropout: probability, on the adapter's input only.
    targets may also name parameters that no layer owns, as experts in one tensor (E, out, in): each W has its A and B.
    Trained: r·(in + out) for each W, and out with `lora_bias`. Raises ValueError for a rank or a dropout out of range.
    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; rslora: Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2.
    """

    family = "low-rank"
    hf_type = "LORA"
    hf_hyper = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora",
                "lora_bias": "lora_bias"}  # fmt: skip
    hf_params = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "c": "lora_B.bias"}
    hf_ignored, loose = frozenset({"target_parameters"}), True  # see formats/parameters.py
    plan = classmethod(plan_parameters)  # type: ignore[assignment]

    def __init__(self, layer: nn.Module, r: int = 8, alpha: float = 16, dropout: float = 0.0, rslora: bool = False,
                 lora_bias: bool = False):  # fmt: skip
        super().__init__(layer)
        out_features, in_features = shape_of(layer)
        if not 1 <= r <= min(in_features, out_features):
            raise ValueError(f"rank r={r} is not in 1…{min(in_features, out_features)}, the layer is "
                             f"{out_features}×{in_features}: a larger product is no longer low-rank; take a smaller r "
                             "(rank_pattern: for this layer alone) or other targets")  # fmt: skip
        self.lora_A = nn.Parameter(torch.empty(r, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear: uniform in ±1/√in
        self.c = nn.Parameter(torch.zeros(out_features)) if lora_bias else None
        self.register_buffer("start_A", None)  # A₀, B₀: see `peftlab.inits`
        self.register_buffer("start_B", None)
        self.dropout = nn.Dropout(dropout)
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 8, lora_bias: bool = False, **_) -> int:
        """r·(in + out); with lora_bias, out more"""
        return r * (in_features + out_features) + lora_bias * out_features

    def product(self) -> tuple[Tensor, Tensor]:
        """A and B of the change. With a start, BA − B₀A₀ = [B − B₀, B₀]·[A; A − A₀], which is nothing at first."""
        A, B, A_0, B_0 = self.lora_A, self.lora_B, self.start_A, self.start_B
        return (A, B) if A_0 is None else (torch.cat([A, A - A_0]), torch.cat([B - B_0, B_0], 1))

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        A, B = self.product()
        BAx = self.dropout(x) @ A.T @ B.T
        return self.scaling * (BAx if self.c is None else BAx + self.c)

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """The same Δ as matrices, unless it has a bias, or dropout gives the adapter another input than the layer."""
        dropping = self.training and self.dropout.p > 0
        return None if dropping or self.c is not None else (*self.product(), self.scaling)

    def saved(self) -> LoRA:
        """With a start, the plain LoRA of rank 2r that changes the same: its file fits the base as it is."""
        if self.start_A is None:
            return self
        from ..inits._common import plain

        return plain(self)
