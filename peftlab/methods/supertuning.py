"""Super-tuning: train the largest weights alone, with a LoRA beside them if asked. arXiv:2607.09287."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of, weight_of
from ._sparse import scattered, top


class SuperTuning(Adapter):
    """Super-tuning: the entries of a weight that are largest in size are trained, the rest stays frozen.

    h = W₀x + ΔW·x + (α/r)·B·A·x, with ΔW zero but for the values at the ⌊(1 − sparsity)·out·in⌋ places where |W₀| is
    largest (select_top=False: smallest). Values start at zero, so training starts at the base. Without r there is no
    A (r, in) and B (out, r): that is Super; with them, the paper's hybrid, Supra.

    Places are found from W₀ without data. The file holds them, or (save_places=False) is smaller and found again from
    the base: then it must be the very same base, for ties and rounding move places. Four bits have ties everywhere.
    Each pass fills the dense ΔW, as SHiRA does. alpha: α, by default 2·r. dropout: of A's input alone.
    Trained: ⌊(1 − sparsity)·out·in⌋, and r·(in + out). Raises ValueError for a sparsity that leaves nothing to train
    or is not in 0…1, an r below 1, or an alpha without r.
    Source: Ilin, Zmushko and Richtárik 2026, arXiv:2607.09287, as HF PEFT's docs of SupertuningConfig describe it.
    """

    family = "selective and sparse"
    hf_type = "SUPERTUNING"
    hf_hyper = {"sparsity": "sparsity", "select_top": "select_top", "r": "r", "alpha": "lora_alpha",
                "dropout": "lora_dropout", "save_places": "save_precomputed_indices"}  # fmt: skip
    hf_params = {"values": "supertuning_values", "places": "supertuning_indices", "lora_A": "supertuning_lora_A.weight",
                 "lora_B": "supertuning_lora_B.weight"}  # fmt: skip
    places: Tensor

    def __init__(
        self, layer: nn.Module, sparsity: float = 0.99, select_top: bool = True, r: int | None = None,
        alpha: float | None = None, dropout: float = 0.0, save_places: bool = True,
    ):  # fmt: skip
        super().__init__(layer)
        out_features, in_features = self.shape = shape_of(layer)
        k = self.size(out_features, in_features, sparsity)
        if not 0 <= sparsity < 1 or k < 1:
            raise ValueError(f"sparsity={sparsity} leaves {k} of {out_features * in_features} entries to train; "
                             "choose 0 ≤ sparsity < 1 with at least one left")  # fmt: skip
        if (r is None and alpha is not None) or (r is not None and r < 1):
            raise ValueError(f"r={r} with alpha={alpha}: the hybrid needs a rank r of at least 1")
        W = weight_of(layer).detach()
        self.values = nn.Parameter(torch.zeros(k))
        self.register_buffer("places", top(W.abs(), k, select_top), persistent=save_places)
        self.scaling = 0.0 if r is None else (2 * r if alpha is None else alpha) / r
        if r is not None:
            self.lora_A = nn.Parameter(torch.empty(r, in_features))
            self.lora_B = nn.Parameter(torch.zeros(out_features, r))
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)

    @staticmethod
    def size(out_features: int, in_features: int, sparsity: float = 0.99, r: int | None = None, **_) -> int:
        """⌊(1 − sparsity)·out·in⌋ + r·(in + out)"""
        return int(out_features * in_features * (1 - sparsity)) + (r or 0) * (in_features + out_features)

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        y = x @ scattered(self.values, self.places, self.shape).T
        return y + self.scaling * (self.dropout(x) @ self.lora_A.T @ self.lora_B.T) if self.scaling else y
