"""A bottleneck beside the frozen module. He et al. 2022, arXiv:2110.04366."""

from __future__ import annotations

from torch import Tensor, nn

from ..core import Adapter
from ._bottleneck import ACTIVATIONS, bottleneck_width, check_network, checked_activation, down_and_up, site_shape


class ParallelAdapter(Adapter):
    """Parallel adapter: the bottleneck reads what the feed-forward net reads, and its answer is added, scaled.

    y = f(x) + s·(W_up·σ(W_down·x + c) + c′), with W_down (b, in), W_up (out, b); f is the feed-forward net as a whole,
    or any module or linear layer that is named. in and out are those of its first and last linear layer. W_down starts
    as nn.Linear's and W_up at zero, as in LoRA, which this is but for σ, the biases and the place.

    scale: s, a number ("scaled parallel", the paper's 4), or "learned": trained from 1. reduction: out / b, or
    bottleneck: b itself. activation: σ. Trained: b·(in + out) + b + out a site, and 1 for a learned scale.
    Raises ValueError for values out of range and for modules without a linear layer.
    Source: He et al. 2022, arXiv:2110.04366, sections 3.3 and 4.5; initialisation: its official code.
    """

    family = "bottleneck"
    targets = "all-mlp"

    def __init__(
        self, layer: nn.Module, reduction: float = 2, bottleneck: int | None = None, activation: str = "relu",
        scale: float | str = 4.0,
    ):  # fmt: skip
        super().__init__(layer)
        check_network(layer)
        out_features, in_features = site_shape(layer)
        b = bottleneck_width(out_features, reduction, bottleneck)
        self.down, self.up = down_and_up(in_features, b, out_features)
        self.activation = checked_activation(activation)
        if isinstance(scale, str) and scale != "learned":
            raise ValueError(f"scale={scale!r} is neither a number nor 'learned'")
        self.scale = nn.Parameter(self.up.bias.new_ones(1)) if scale == "learned" else float(scale)

    @staticmethod
    def size(
        out_features: int, in_features: int, reduction: float = 2, bottleneck: int | None = None,
        scale: float | str = 4.0, **_,
    ) -> int:  # fmt: skip
        """b·(in + out) + b + out, and 1 for a learned scale"""
        b = bottleneck_width(out_features, reduction, bottleneck)
        return b * (in_features + out_features) + b + out_features + (scale == "learned")

    def expected(self) -> int:
        return self.size(*site_shape(self.layer), **self.hyper)

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return self.scale * self.up(ACTIVATIONS[self.activation](self.down(x)))
