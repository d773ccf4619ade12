"""The greatest singular triples of a frozen weight: PSOFT (arXiv:2505.11235), SSVD (arXiv:2509.02830) turn them."""

from __future__ import annotations

import torch
from torch import nn

from ..layers import shape_of, weight_of


@torch.no_grad()
def principal(layer: nn.Module, r: int, how: str = "full", niter: int = 10, seed: int = 0):
    """U (out, r), Σ (r,), Vᵀ (r, in) in float32, of a layer's W; of a layer without values, their shapes.

    how: "full", exact; "lowrank": approximate, by random projections of its own seed and `niter` power iterations.
    Raises ValueError for a rank or a word that does not fit.
    """
    out_features, in_features = shape_of(layer)
    if not 1 <= r <= min(out_features, in_features):
        raise ValueError(f"rank {r} is not in 1…{min(out_features, in_features)}: the layer is "
                         f"{out_features}×{in_features}; take a smaller one, or other targets")  # fmt: skip
    W = weight_of(layer).detach().float()
    if how == "full":
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        return U[:, :r].contiguous(), S[:r].contiguous(), Vt[:r].contiguous()
    if how != "lowrank":
        raise ValueError(f"the decomposition {how!r} is neither 'full' nor 'lowrank'")
    with torch.random.fork_rng([W.device] if W.is_cuda else []):  # svd_lowrank takes no generator
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(W, q=r, niter=niter)
    return U, S, V.T.contiguous()
