"""LoRA on one parameter that no layer owns, as the experts of a mixture in one tensor. arXiv:2106.09685."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..core import Adapter


class Factors(Adapter):
    """One parameter W (E, out, in) or (out, in) with a change of its own for each matrix in it; a part of LoRA.

    W′ₑ = Wₑ + (α/r)·Bₑ·Aₑ, with A (E, r, in) drawn as LoRA's and B (E, out, r) zero. Where a module keeps its matrices
    as (E, in, out) and says so (`is_transposed`, gpt-oss), it is the change's transpose that is added.
    Raises ValueError for a rank out of range, weights in codes, and what acts on a layer's input or output alone.
    """

    part_of = "LoRA"

    def __init__(self, layer: nn.Module, parameter: str, r: int = 8, alpha: float = 16, dropout: float = 0.0,
                 rslora: bool = False, lora_bias: bool = False):  # fmt: skip
        super().__init__(layer)
        W = getattr(layer, parameter)
        if dropout or lora_bias:
            raise ValueError(f"dropout={dropout}, lora_bias={lora_bias}: these act on what goes into a layer and comes "
                             f"out of it, and {parameter!r} is no layer. Leave them out, or attach two adapters and "
                             "activate both")  # fmt: skip
        if not W.is_floating_point() or W.itemsize < 2:
            raise ValueError(f"{parameter!r} is stored as {W.dtype}, to which nothing can be added: load bfloat16")
        self.transposed = W.dim() == 3 and getattr(layer, "is_transposed", False)
        *E, out_features, in_features = W.mT.shape if self.transposed else W.shape
        if not 1 <= r <= min(in_features, out_features):
            raise ValueError(f"rank r={r} is not in 1…{min(in_features, out_features)}, matrices in {parameter!r} are "
                             f"{out_features}×{in_features}; take a smaller r (rank_pattern: for it)")  # fmt: skip
        bound = 1 / math.sqrt(in_features)
        self.lora_A = nn.Parameter(torch.empty(*E, r, in_features).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(*E, out_features, r))
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r

    def expected(self) -> int:
        """E·r·(in + out)"""
        *E, out_features, in_features = getattr(self.layer, self.hyper["parameter"]).shape
        return math.prod(E) * self.hyper["r"] * (in_features + out_features)

    def added_to(self, W: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """W′, computed in a dtype (by default the adapter's or W's, whichever is wider) and rounded once, to W's."""
        change = self.scaling * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))
        return (W + (change.mT if self.transposed else change)).to(W.dtype)


@contextmanager
def holding(layer: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the module's parameters of these names are these tensors."""
    before = {name: layer._parameters[name] for name in tensors}
    layer._parameters.update(tensors)  # type: ignore[arg-type]
    try:
        yield
    finally:
        layer._parameters.update(before)
