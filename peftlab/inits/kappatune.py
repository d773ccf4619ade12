"""KappaTune: adapt the layers whose weights are least specialised. Ludwig 2025, arXiv:2506.16289."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..attach import Targets, find_targets
from ..hyper import checks
from ..layers import shape_of
from ..sites import at, bare
from ._common import dense


@checks
def kappatune(model: nn.Module, share: float = 0.2, among: Targets = "all-linear") -> list[str]:
    """The targets for `attach`: of the layers that `among` names, the `share` with the smallest condition number.

        κ(W) = σ₁/σₙ, the largest singular value by the smallest

    A large κ means that W amplifies some directions and suppresses others, as a layer does that has learned something
    special; changing layers with a small one forgets less. At least one layer is chosen; smallest κ first.
    Raises ValueError for a share outside 0 < share ≤ 1, no linear layer and weights without finite values.

    HF PEFT's `find_kappa_target_modules` (0.21) takes the head among the layers, and no transposed ones: on GPT-2 the
    head is all that it finds.
    Source: Ludwig 2025, arXiv:2506.16289.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share!r}: a part of the layers, above 0 and at most 1")
    kappas = condition_numbers(model, among)
    return sorted(kappas, key=lambda path: kappas[path])[: max(1, int(len(kappas) * share))]


@torch.no_grad()
def condition_numbers(model: nn.Module, among: Targets = "all-linear") -> dict[str, float]:
    """path -> κ(W), infinite for a W without full rank. Costs the singular values of each layer."""
    found = {}
    for path in find_targets(model, among):
        layer = bare(at(model, path))
        shape_of(layer)
        S = torch.linalg.svdvals(dense(path, layer))
        found[path] = (S[0] / S[-1]).item() if S[-1] > 0 else math.inf
    return found
