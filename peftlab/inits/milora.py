"""MiLoRA: train the minor part of a weight. Wang et al. 2024, arXiv:2406.09044."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..hyper import checks
from ._common import begin_all, split


@checks
def milora(model: nn.Module, name: str = "default") -> nn.Module:
    """Begin an untrained LoRA at the r smallest singular values of W, with their vectors.

        U·diag(σ)·Vᵀ ← W;  A₀ = √(σ/s)·Vᵀ, B₀ = U·√(σ/s), the r smallest σ;  h = W₀x + s·(BA − B₀A₀)·x

    PiSSA's opposite: what is trained begins orthogonal to what the base knows best, which stays frozen. The start is
    small, and so are the first gradients. For the start that is subtracted, and costs, see `_common` and `pissa`.
    Raises ValueError for an adapter that is trained, merged or no LoRA, and for weights without finite values; the
    model is then as it was. Returns the model.
    Source: Wang et al. 2024, arXiv:2406.09044.
    """
    return begin_all(model, name, "MiLoRA", factors)


def factors(W: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    return split(U[:, -r:], S[-r:], Vt[-r:], scaling)
