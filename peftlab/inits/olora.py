"""OLoRA: begin at orthonormal columns of W. Büyükakyüz 2024, arXiv:2406.01775."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..hyper import checks
from ._common import begin_all


@checks
def olora(model: nn.Module, name: str = "default") -> nn.Module:
    """Begin an untrained LoRA at the first r columns of W's QR decomposition.

        Q·R ← W;  B₀ = Q[:, :r], A₀ = R[:r];  h = W₀x + s·(BA − B₀A₀)·x

    B₀ has orthonormal columns, the ones that the first r columns of W span: an arbitrary choice, as the order of the
    inputs is, but at a quarter of the price of exact PiSSA. For the start that is subtracted see `_common`.
    Raises ValueError for an adapter that is trained, merged or no LoRA, and for weights without finite values; the
    model is then as it was. Returns the model.

    HF PEFT 0.21 decomposes GPT-2's transposed weights as they are stored, and its model does not begin at the base.
    Source: Büyükakyüz 2024, arXiv:2406.01775.
    """
    return begin_all(model, name, "OLoRA", factors)


def factors(W: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    Q, R = torch.linalg.qr(W)
    return R[:r], Q[:, :r]
