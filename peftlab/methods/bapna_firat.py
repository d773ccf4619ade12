"""A bottleneck behind each block, with a layer norm in front. Bapna and Firat 2019, arXiv:1909.08478."""

from __future__ import annotations

from torch import Tensor, nn

from ..core import Adapter
from ._blocks import hidden, width_of, with_hidden
from ._bottleneck import ACTIVATIONS, bottleneck_width, checked_activation, down_and_up


class BapnaFirat(Adapter):
    """Bapna and Firat's adapter: a bottleneck with a layer norm of its own, once a block, made for translation.

    y = h + W_up·σ(W_down·LN(h) + c) + c′, with h what the block gives, behind its last residual sum, LN a layer norm
    over D with a trained scale and bias, W_down (b, D), W_up (D, b). The norm makes one setting fit blocks whose h
    differ in size. Nearest here: Adapter+ at the same place, with a scale for each channel instead; Pfeiffer reads the
    feed-forward net's answer alone, without a norm. Encoder–decoders: in both. W_up starts at zero: at the base.
    A whole block cannot be merged.

    reduction: D / b, or bottleneck: b itself, 1 to D. activation: σ.
    Trained: 2·D·b + b + 3·D a block. Raises ValueError for values out of range.
    Source: Bapna and Firat 2019, arXiv:1909.08478.
    """

    family = "bottleneck"
    targets, mixes = "all-blocks", False

    def __init__(
        self, layer: nn.Module, reduction: float = 16, bottleneck: int | None = None, activation: str = "relu"
    ):
        super().__init__(layer)
        D = width_of(layer)
        self.norm = nn.LayerNorm(D)
        self.down, self.up = down_and_up(D, bottleneck_width(D, reduction, bottleneck), D)
        self.activation = checked_activation(activation)

    def expected(self) -> int:
        """2·D·b + b + 3·D a block"""
        D, b = self.up.weight.shape
        return 2 * D * b + b + 3 * D

    def delta(self, h: Tensor) -> Tensor:  # (..., D) -> (..., D)
        return self.up(ACTIVATIONS[self.activation](self.down(self.norm(h))))

    def forward(self, f, *args, **kwargs):
        out = f(*args, **kwargs)
        h = hidden(out)
        return with_hidden(out, h + self.change(h))
