"""KeepLoRA: learn only where the weights, and earlier tasks, have little. Luo et al. 2026, arXiv:2601.19659."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..hyper import checks
from ._common import check_values, dense, fill, untrained
from ._data import batches, gradients, second_moments


@checks
def keeplora(model: nn.Module, data: Any, tokenizer: Any = None, name: str = "default", *, past: Any = None,
             energy: float = 0.9, past_energy: float = 0.99, batch_size: int = 16) -> nn.Module:  # fmt: skip
    """Begin an untrained LoRA at the first gradient, without what the base and earlier tasks need; freeze A there.

        Ĝ = G − G·V·Vᵀ − G·M·Mᵀ;  U·diag(σ)·A₀ ← Ĝ, r of the σ, B₀ = 0;  h = W₀x + s·B·A₀·x, B alone is trained

    G (out, in) is the mean gradient of full fine-tuning on the data. V (in, p) are the main input directions of W₀, as
    few as hold `energy` of ‖W₀‖²: they carry general knowledge. M (in, m) are those of the layer's inputs on `past`,
    data of earlier tasks, as few as hold with V `past_energy` of ‖X‖². As A₀·V = A₀·M = 0 and A stays, no training
    changes what inputs in these directions give; and a step of B is one along the best rank-r part of Ĝ.

    The paper begins at B₀ = U·diag(σ) and takes s·B₀A₀ off the base. With A frozen that is the same training, for only
    B − B₀ counts; but not with weight decay, which pulls to B = 0, here the base. It keeps M instead of past data.
    data, costs: see `lora_ga`, and a decomposition of (in, in) a layer. `pl.freeze(model, name, frozen=False)` frees A.
    Raises ValueError for an adapter that is trained, merged or no LoRA, for no data or labels, for a layer without a
    gradient or with under r directions left; the model is then as it was. Returns the model.
    Source: Luo et al. 2026, arXiv:2601.19659.
    """
    for what, share in (("energy", energy), ("past_energy", past_energy)):
        if not 0 <= share < 1:
            raise ValueError(f"{what}={share!r} must be in [0, 1): the share that is kept from training")
    there = untrained(model, name, "KeepLoRA")
    layers = {path: adapter.layer for path, adapter in there.items()}
    check_values(there)
    G = gradients(model, layers, batches(model, data, tokenizer, batch_size, "KeepLoRA"))
    seen = None if past is None else batches(model, past, tokenizer, batch_size, "KeepLoRA")
    moments = {} if seen is None else second_moments(model, layers, seen)
    found = {}
    for path, adapter in there.items():
        W, r = dense(path, adapter.layer).double(), len(adapter.lora_A)
        N = beside(W.T @ W, energy, torch.eye(W.shape[1]).to(W))
        N = beside(moments[path].double(), past_energy, N) if moments else N
        if N.shape[1] < r:
            raise ValueError(f"{path!r} has {N.shape[1]} of {W.shape[1]} input directions left to learn in, and r={r}; "
                             f"take a smaller r, or less energy={energy}, past_energy={past_energy}")  # fmt: skip
        found[path] = directions(G[path].double(), N, r)
    for path, A in found.items():
        fill(there[path], A)
        there[path].lora_A.requires_grad_(False)
    return model


@torch.no_grad()
def beside(C: Tensor, energy: float, N: Tensor) -> Tensor:
    """N (in, n), columns orthonormal, without the fewest main directions of NᵀCN that leave less than 1 − energy of C's
    trace; C (in, in)."""
    values, vectors = torch.linalg.eigh(N.T @ C @ N)  # in ascending order
    left = values.clamp(min=0).cumsum(0)
    return N @ vectors[:, left <= (1 - energy) * C.trace() * (1 + 1e-9)]  # energy 0 leaves all


@torch.no_grad()
def directions(G: Tensor, N: Tensor, r: int) -> Tensor:
    """A₀ (r, in), rows orthonormal: the main input directions of G·N·Nᵀ, and others of N where that has under r."""
    _, _, Vt = torch.linalg.svd(G @ N, full_matrices=True)
    return Vt[:r] @ N.T
