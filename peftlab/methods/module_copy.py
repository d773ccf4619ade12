"""A trained copy of a whole module: what HF PEFT calls modules_to_save."""

from __future__ import annotations

import copy

from torch import nn

from ..core import Adapter
from ..layers import dense, is_quantised


class ModuleCopy(Adapter):
    """A copy of the module, trained in full in its place: for new heads and other parts that must change entirely.

    y = f′(x), with f′ the copy; the frozen module stays, so the copy is switched, mixed, merged like any adapter.
    The copy of a quantised layer is dense. Trained: every parameter of the module.
    In HF PEFT's files: `modules_to_save`, beside any other method.
    Source: modules_to_save of HF PEFT, docs of LoraConfig; a head beside adapters: Houlsby et al. 2019,
    arXiv:1902.00751, figure 2.
    """

    family = "selective and sparse"
    replaces = True

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        copied = dense(layer) if is_quantised(layer) else copy.deepcopy(layer)
        if next(copied.parameters(), None) is None:
            raise ValueError(f"{type(layer).__name__} has no parameters to train; choose another module")
        if inner := next((n for n, m in copied.named_modules() if is_quantised(m)), None):
            raise ValueError(f"its {inner!r} is quantised and cannot be trained; choose modules inside of it")
        self.module = copied.requires_grad_(True)

    @staticmethod
    def size(out_features: int, in_features: int, bias: bool = True, **_) -> int:
        """in·out, and out for a bias"""
        return in_features * out_features + bias * out_features

    def forward(self, f, *args, **kwargs):
        return self.module(*args, **kwargs)

    def fold(self, layer: nn.Module) -> nn.Module:
        return copy.deepcopy(self.module).double()
