"""LoRA-Null: begin where the inputs of old knowledge do not reach. Tang et al. 2025, arXiv:2503.02659."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..hyper import checks
from ._common import begin, check_values, dense, split, untrained
from ._data import batches, second_moments


@checks
def lora_null(model: nn.Module, data: Any, tokenizer: Any = None, name: str = "default", *,
              batch_size: int = 16) -> nn.Module:  # fmt: skip
    """Begin an untrained LoRA in the null space of the inputs that some data gives its layers.

        N (in, r) ← the eigenvectors of mean(x·xᵀ) with the r smallest eigenvalues;  U·diag(σ)·Vᵀ ← W·N·Nᵀ
        A₀ = √(σ/s)·Vᵀ, B₀ = U·√(σ/s), r of the σ;  h = W₀x + s·(BA − B₀A₀)·x

    What is trained first answers to inputs that the data hardly has: A₀x ≈ 0 for its x. So data whose knowledge should
    stay goes in here, not the task's. Frozen A (`lora_A.requires_grad_(False)`) keeps it so: then no step of B changes
    what these inputs give, as far as they leave a null space at all.

    data, costs: see `corda`. For the start that is subtracted see `_common`. Raises ValueError for an adapter that is
    trained, merged or no LoRA, and for no data; the model is then as it was. Returns the model.
    Source: Tang et al. 2025, arXiv:2503.02659.
    """
    there = untrained(model, name, "LoRA-Null")
    layers = {path: adapter.layer for path, adapter in there.items()}
    check_values(there)
    moments = second_moments(model, layers, batches(model, data, tokenizer, batch_size, "LoRA-Null"))
    found = {path: factors(dense(path, a.layer), moments[path], len(a.lora_A), a.scaling) for path, a in there.items()}
    for path, (A, B) in found.items():
        begin(there[path], A, B)
    return model


@torch.no_grad()
def factors(W: Tensor, C: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """W (out, in), C (in, in) -> A (r, in), B (out, r), from the (out, r) matrix W·N alone."""
    _, vectors = torch.linalg.eigh(C.double())
    N = vectors[:, :r]
    U, S, Vt = torch.linalg.svd(W.double() @ N, full_matrices=False)
    return split(U, S, Vt @ N.T, scaling)
