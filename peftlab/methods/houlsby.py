"""Bottleneck adapters after each sublayer. Houlsby et al. 2019, arXiv:1902.00751."""

from __future__ import annotations

from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._bottleneck import ACTIVATIONS, bottleneck_width, checked_activation, down_and_up


class Houlsby(Adapter):
    """Bottleneck adapter: a small network with a way around it, behind the attention and behind the feed-forward net.

    y = h + W_up·σ(W_down·h + c) + c′ with h = f(x), W_down (b, D), W_up (D, b); f is the sublayer's last linear layer.
    The paper draws W_up close to zero; here it is zero, so that training starts exactly at the base. σ bends, so the
    adapter cannot be merged (with "identity" it could be: then it is a low-rank map behind the layer).

    reduction: D / b, or bottleneck: b itself, 1 to D. activation: σ; relu, gelu, silu, tanh or identity.
    Trained: 2·D·b + b + D a site, two sites a block: 2L·(2Db + b + D). Raises ValueError for values out of range.
    Source: Houlsby et al. 2019, arXiv:1902.00751, section 2.1 (which trains the layer norms too: LNTuning).
    """

    family = "bottleneck"
    targets = "sublayer-output"

    def __init__(
        self, layer: nn.Module, reduction: float = 16, bottleneck: int | None = None, activation: str = "gelu"
    ):
        super().__init__(layer)
        width = shape_of(layer)[0]
        self.down, self.up = down_and_up(width, bottleneck_width(width, reduction, bottleneck), width)
        self.activation = checked_activation(activation)

    @staticmethod
    def size(out_features: int, in_features: int, reduction: float = 16, bottleneck: int | None = None, **_) -> int:
        """2·D·b + b + D, with D the width of what the layer gives out"""
        b = bottleneck_width(out_features, reduction, bottleneck)
        return 2 * out_features * b + b + out_features

    def delta(self, h: Tensor) -> Tensor:  # (..., D) -> (..., D)
        return self.up(ACTIVATIONS[self.activation](self.down(h)))

    def forward(self, f, x: Tensor) -> Tensor:
        h = f(x)
        return h + self.change(h)
