"""What DEFT and PaRa share: the trained directions that are taken out of a weight. arXiv:2509.22793, 2406.05641."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers import shape_of, wide

KINDS = "relu", "qr"


def drawn(layer: nn.Module, r: int, kind: str) -> nn.Parameter:
    """P (out, r) from N(0, 0.02²); ValueError for an r that is not in 1…out, or an unknown kind."""
    out_features, _ = shape_of(layer)
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is none of {', '.join(KINDS)}")
    if not 1 <= r <= out_features:
        raise ValueError(f"r={r} is not in 1…{out_features}, the layer's outputs: there are no more directions")
    return nn.Parameter(0.02 * torch.randn(out_features, r))


def directions(P: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(Q, N), both (out, r): Q·Nᵀ·W is what is taken out of W. "qr": both an orthonormal basis of P's columns, so that
    Q·Nᵀ is the projection onto them. "relu": P and max(P, 0), without a decomposition, and no projection."""
    if kind == "relu":
        return P, P.relu()
    Q = torch.linalg.qr(wide(P)).Q.to(P.dtype)
    return Q, Q
