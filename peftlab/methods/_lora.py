"""What LoRA's variants share with it (Hu et al. 2021, arXiv:2106.09685): factors, their scale, their file's names."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of, weight_of

HYPER = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora"}
PARAMS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}


def entries(section: str, **names: str) -> dict[str, str]:
    """LoRA's hyper-parameters and these: ours -> its entry in a section of adapter_config.json."""
    return HYPER | {ours: f"{section}.{theirs}" for ours, theirs in names.items()}


class Given:
    """In `hf_flags`: equal to whatever a file gives there, if it gives something."""

    def __eq__(self, other: Any) -> bool:
        return bool(other)


def checked_rank(layer: nn.Module, r: int) -> tuple[int, int]:
    """(out, in) of the layer; ValueError for a rank that it cannot have."""
    out_features, in_features = shape_of(layer)
    if not 1 <= r <= min(in_features, out_features):
        raise ValueError(f"rank r={r} is not in 1…{min(in_features, out_features)}, the layer is "
                         f"{out_features}×{in_features}; take a smaller r or other targets")  # fmt: skip
    return out_features, in_features


def drawn(*shape: int) -> nn.Parameter:
    """A of LoRA: as the weight of an nn.Linear, uniform in ±1/√(inputs)."""
    A = nn.Parameter(torch.empty(*shape))
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return A


def scaled(alpha: float, r: int, rslora: bool) -> float:
    """α/r, or α/√r."""
    return alpha / math.sqrt(r) if rslora else alpha / r


def begin(adapter: Adapter, r: int, alpha: float, dropout: float, rslora: bool) -> int:
    """Give an adapter what LoRA has: A drawn, B zero, a dropout and a scale. Returns in; ValueError for a bad rank."""
    out_features, in_features = checked_rank(adapter.layer, r)
    adapter.lora_A, adapter.lora_B = drawn(r, in_features), nn.Parameter(torch.zeros(out_features, r))
    adapter.dropout, adapter.scaling = nn.Dropout(dropout), scaled(alpha, r, rslora)
    return in_features


@torch.no_grad()
def minor(layer: nn.Module, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), σ (r,) and Vᵀ (r, in) of the r smallest singular values of the layer's weight, in float32.

    A decomposition of the whole weight; without values (counting on the meta device) only the shapes.
    """
    W = weight_of(layer).float()
    if W.is_meta:
        return W.new_empty(W.shape[0], r), W.new_empty(r), W.new_empty(r, W.shape[1])
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, -r:].contiguous(), S[-r:].contiguous(), Vh[-r:].contiguous()
