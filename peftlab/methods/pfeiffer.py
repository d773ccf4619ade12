"""One bottleneck adapter a block. Pfeiffer et al. 2021, arXiv:2005.00247."""

from __future__ import annotations

from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._bottleneck import ACTIVATIONS, bottleneck_width, checked_activation, down_and_up


class Pfeiffer(Adapter):
    """Bottleneck adapter, once a block: Houlsby's network behind the feed-forward net only, for half the price.

    y = h + W_up·σ(W_down·h + c) + c′ with h = f(x), W_down (b, D), W_up (D, b); f is the feed-forward net's last layer.
    In the paper's BERT the adapter reads h after the residual sum and its layer norm; modern models have no norm there,
    so it reads h itself. It starts exactly at the base (W_up = 0) and cannot be merged, since σ bends.

    reduction: D / b, or bottleneck: b itself, 1 to D. activation: σ; relu, gelu, silu, tanh or identity.
    Trained: 2·D·b + b + D a block: L·(2Db + b + D). Raises ValueError for values out of range.
    Source: Pfeiffer et al. 2021, arXiv:2005.00247, appendix: found best by a search over places.
    """

    family = "bottleneck"
    targets = "ffn-output"

    def __init__(
        self, layer: nn.Module, reduction: float = 16, bottleneck: int | None = None, activation: str = "relu"
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
