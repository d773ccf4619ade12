"""A bottleneck behind the whole block, with a scale for each channel. Steitz and Roth 2024, arXiv:2406.06820."""

from __future__ import annotations

from torch import Tensor, nn

from ..core import Adapter
from ._blocks import hidden, width_of, with_hidden
from ._bottleneck import ACTIVATIONS, bottleneck_width, checked_activation, down_and_up


class AdapterPlus(Adapter):
    """Adapter+: the bottleneck that won a comparison of places, starts and scales, made for vision transformers.

    y = h + s ⊙ (W_up·σ(W_down·h + c) + c′), with h what the block gives, behind its last residual sum ("Post-Adapter"),
    W_down (b, D), W_up (D, b), and s (D,) from ones, one for each channel. Pfeiffer's reads the feed-forward net's
    answer alone, before it joins the rest. W_up starts at zero, so that training starts at the base; the paper draws
    both from a normal of deviation 0.01. A whole block cannot be merged.

    bottleneck: b, 1 to D. activation: σ. Trained: 2·D·b + b + 2·D a block.
    Raises ValueError for values out of range.
    Source: Steitz and Roth 2024, "Adapters strike back", arXiv:2406.06820; the place: its official code.
    """

    family = "bottleneck"
    targets, mixes = "all-blocks", False

    def __init__(self, layer: nn.Module, bottleneck: int = 8, activation: str = "gelu"):
        super().__init__(layer)
        D = width_of(layer)
        self.down, self.up = down_and_up(D, bottleneck_width(D, 1, bottleneck), D)
        self.s = nn.Parameter(self.up.bias.new_ones(D))
        self.activation = checked_activation(activation)

    def expected(self) -> int:
        """2·D·b + b + 2·D a block"""
        D, b = self.up.weight.shape
        return 2 * D * b + b + 2 * D

    def delta(self, h: Tensor) -> Tensor:  # (..., D) -> (..., D)
        return self.s * self.up(ACTIVATIONS[self.activation](self.down(h)))

    def forward(self, f, *args, **kwargs):
        out = f(*args, **kwargs)
        h = hidden(out)
        return with_hidden(out, h + self.change(h))
