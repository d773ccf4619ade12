"""LN tuning: train the normalisation layers alone. Zhao et al. 2023, arXiv:2312.11420."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.func import functional_call

from ..core import Adapter


class LNTuning(Adapter):
    """LN tuning: the gain (and, where there is one, the bias) of each normalisation layer is trained, and nothing else.

    y = x̂ ⊙ w′ + b′, with x̂ the normalised input; the copies w′ and b′ (d,) start at the frozen w and b.
    LayerNorm and RMSNorm of any make: the layer itself computes, in its own dtype, with the copies in place of its own.
    On top of another adapter of the same norm it adds its change: f(x) + (y − frozen(x)).

    Trained: d a norm, 2d with a bias. Raises ValueError for a layer that is no norm or has no weight.
    Source: Zhao et al. 2023, arXiv:2312.11420.
    """

    family = "scaling"
    hf_type = "LN_TUNING"
    hf_params = {"weight": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias"}
    targets = "all-norms"

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        if "norm" not in type(layer).__name__.lower() or getattr(layer, "weight", None) is None:
            raise ValueError(f"{type(layer).__name__} is no normalisation layer with a weight; choose other targets, "
                             "such as 'all-norms'")  # fmt: skip
        for name, parameter in layer.named_parameters(recurse=False):  # weight, and bias if there is one
            setattr(self, name, nn.Parameter(parameter.detach().clone().float()))

    def expected(self) -> int:
        """d, or 2d with a bias"""
        return len(self.layer.weight) * (2 if getattr(self.layer, "bias", None) is not None else 1)

    def forward(self, f, x: Tensor) -> Tensor:  # (..., d) -> (..., d)
        copies = {name: p.to(getattr(self.layer, name).dtype) for name, p in self.named_parameters()}
        y = functional_call(self.layer, copies, (x,))
        return y if f is self.layer else f(x) + (y - self.layer(x))

    def fold(self, layer: nn.Module) -> nn.Module:
        """w + (w′ − w), b + (b′ − b): on an untouched norm, the copies."""
        new = copy.deepcopy(layer)
        for name, p in self.named_parameters():
            change = p.double() - getattr(self.layer, name).double()
            setattr(new, name, nn.Parameter(getattr(layer, name) + change, requires_grad=False))
        return new
