"""AdaMix: several adapters at random, averaged in the end. Wang et al. 2022, arXiv:2205.12410."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._bottleneck import ACTIVATIONS, bottleneck_width, checked_activation, down_and_up
from .pfeiffer import Pfeiffer


class AdaMix(Adapter):
    """AdaMix: a mixture of adaptations; each pass of training draws one of M ways down and of M ways up.

    y = h + W_up[j]·σ(W_down[i]·h + c[i]) + c′[j], with h = f(x), and i, j drawn anew for each layer and pass; no router
    is learnt. In use all M are averaged, weight by weight, and are one adapter of the usual cost: the file holds that
    one, a Pfeiffer, and training cannot go on from it (from a checkpoint it can). W_up starts at zero, so that training
    starts at the base. The paper also draws twice for each batch and adds the two answers' symmetric KL divergence to
    the loss, which a layer alone cannot see: `train`'s penalty can.

    M: how many, 4 in the paper. reduction: D / b, or bottleneck: b itself. activation: σ. Cannot be merged into W.
    Trained: M·(2·D·b + b + D) a site. Raises ValueError for values out of range.
    Source: Wang et al. 2022, arXiv:2205.12410, sections 3.1 to 3.3.
    """

    family = "mixture"
    targets = "ffn-output"

    def __init__(
        self, layer: nn.Module, M: int = 4, reduction: float = 16, bottleneck: int | None = None,
        activation: str = "relu",
    ):  # fmt: skip
        super().__init__(layer)
        D = shape_of(layer)[0]
        b = bottleneck_width(D, reduction, bottleneck)
        if M < 1:
            raise ValueError(f"M={M}: take at least one adapter, 4 in the paper")
        pairs = [down_and_up(D, b, D) for _ in range(M)]
        self.down = nn.Parameter(torch.stack([down.weight.detach() for down, _ in pairs]))  # (M, b, D)
        self.up = nn.Parameter(torch.stack([up.weight.detach() for _, up in pairs]))  # (M, D, b)
        self.down_bias, self.up_bias = nn.Parameter(self.up.new_zeros(M, b)), nn.Parameter(self.up.new_zeros(M, D))
        self.activation = checked_activation(activation)

    @staticmethod
    def size(
        out_features: int, in_features: int, M: int = 4, reduction: float = 16, bottleneck: int | None = None, **_
    ) -> int:
        """M·(2·D·b + b + D), with D the width of what the layer gives out"""
        b = bottleneck_width(out_features, reduction, bottleneck)
        return M * (2 * out_features * b + b + out_features)

    def chosen(self, stacked: Tensor, which: Tensor) -> Tensor:
        """One of M in training, their average in use."""
        return stacked.index_select(0, which)[0] if self.training else stacked.mean(0)

    def delta(self, h: Tensor) -> Tensor:  # (..., D) -> (..., D)
        i, j = torch.randint(len(self.down), (2, 1), device=h.device)
        z = h @ self.chosen(self.down, i).T + self.chosen(self.down_bias, i)
        return ACTIVATIONS[self.activation](z) @ self.chosen(self.up, j).T + self.chosen(self.up_bias, j)

    def forward(self, f, x: Tensor) -> Tensor:
        h = f(x)
        return h + self.change(h)

    def saved(self) -> Adapter:
        """The average: one bottleneck adapter."""
        hyper = {"reduction": 16, "bottleneck": self.down.shape[1], "activation": self.activation}
        with torch.device(self.down.device):
            one = Pfeiffer(self.layer, **hyper)
        one.hyper = hyper
        for linear, weight, bias in ((one.down, self.down, self.down_bias), (one.up, self.up, self.up_bias)):
            linear.weight.data, linear.bias.data = weight.detach().mean(0), bias.detach().mean(0)
        return one.train(self.training)
