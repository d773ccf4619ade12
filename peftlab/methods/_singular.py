"""A weight's first singular vectors as frozen factors. Bałazy et al. 2024, arXiv:2405.17604."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers import shape_of, weight_of


def singular(layer: nn.Module, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), Σ (r,) and Vᵀ (r, in) of W's r largest singular values, in float32; r at most min(in, out).

    A pair (uᵢ, vᵢ) is known up to its sign; here uᵢ's largest entry is positive, so that it is the same on any machine.
    Costs one full decomposition, O(in·out·min(in, out)).
    """
    out_features, in_features = shape_of(layer)
    if not 1 <= r <= min(out_features, in_features):
        raise ValueError(f"r={r} is not in 1…{min(out_features, in_features)}, the number of singular values of the "
                         f"{out_features}×{in_features} layer; take a smaller r")  # fmt: skip
    W = weight_of(layer).detach()
    if W.is_meta:
        return W.new_empty(out_features, r), W.new_empty(r), W.new_empty(r, in_features)
    U, S, Vt = torch.linalg.svd(W.float(), full_matrices=False)
    U, S, Vt = U[:, :r], S[:r], Vt[:r]
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()  # (1, r)
    return (U * sign).contiguous(), S.contiguous(), (Vt * sign.T).contiguous()
