"""BitFit: train the biases alone. Ben Zaken et al. 2022, arXiv:2106.10199."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import is_linear, shape_of


class BitFit(Adapter):
    """BitFit: of all a layer's parameters only the bias is trained, here as its change.

    y = f(x) + Δb, with Δb (out,) trained from zeros; so the layer's new bias is b + Δb.
    Default sites: every linear and every normalisation layer that has a bias, besides the output head. The paper's
    smaller choice, the biases of the queries and of the first feed-forward layer, is targets="query|intermediate.dense"
    in BERT. A model without biases (Llama) has no such site: name linear layers yourself (targets="all-linear"), and
    each gets a new bias, y = W₀x + Δb.

    Trained: out numbers a linear layer, d a norm. Raises ValueError for other layers, and for a norm without a bias.
    Source: Ben Zaken et al. 2022, arXiv:2106.10199, section 3.
    """

    family = "selective and sparse"
    hf_params = {"delta_b": "delta_b"}
    targets = "all-biases"

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        bias = getattr(layer, "bias", None)
        if not is_linear(layer) and not ("norm" in type(layer).__name__.lower() and isinstance(bias, nn.Parameter)):
            raise ValueError(f"{type(layer).__name__} is neither a linear layer nor a norm with a bias; choose other "
                             "targets, or LNTuning for norms that have only a weight")  # fmt: skip
        self.delta_b = nn.Parameter(torch.zeros(self._width()))

    def _width(self) -> int:
        return shape_of(self.layer)[0] if is_linear(self.layer) else len(self.layer.weight)

    @staticmethod
    def size(out_features: int, in_features: int, **_) -> int:
        """out"""
        return out_features

    def expected(self) -> int:
        """out of a linear layer, d of a norm"""
        return self._width()

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return self.delta_b.expand(*x.shape[:-1], -1)

    def fold(self, layer: nn.Module) -> nn.Module:
        """b + Δb; a linear layer without a bias gets one."""
        if is_linear(layer):
            return super().fold(layer)
        new = copy.deepcopy(layer)
        new.bias = nn.Parameter(layer.bias + self.delta_b.double(), requires_grad=False)
        return new
