"""MixLoRA's parts: the linear layers inside of a network that has several experts. arXiv:2404.15159."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import is_linear, shape_of
from ..sites import at, bare, sites
from ._bottleneck import check_network


class Expert(Adapter):
    """A linear layer of a network, as the expert that runs now has it. Nothing is trained; a part of MixLoRA."""

    mixes, part_of = False, "MixLoRA"

    def __init__(self, layer: nn.Module, path: str):
        super().__init__(layer)
        self.path = path  # in the network
        self.__dict__["mixture"] = None  # the MixLoRA, set by its `share`

    def expected(self) -> int:
        return 0

    def forward(self, f, x: Tensor, *others) -> Tensor:
        y = f(x, *others)
        return y if self.mixture.expert is None else y + self.mixture.change(x, self.path)


def load(p: Tensor) -> Tensor:
    """n·Σᵢ Fᵢ·Pᵢ of the probabilities p (N, n): 1 if all experts have as much to do, n if one has everything."""
    first = torch.zeros_like(p).scatter(-1, p.argmax(-1, keepdim=True), 1.0)
    return p.shape[-1] * (first.mean(0) * p.mean(0)).sum()


def key(path: str) -> str:
    """A path as the name of a parameter."""
    return path.replace(".", "_")


def linear_inside(network: nn.Module) -> dict[str, tuple[int, int]]:
    """path -> (out, in) of the linear layers inside of a module, the first of which reads its input."""
    return {path: shape_of(bare(m)) for path, m in sites(network).items() if is_linear(bare(m))}


def plan_experts(method: type[Adapter], model: nn.Module, paths: Sequence[str], hyper: dict) -> dict[str, Any]:
    """{path: (method, hyper)} and an `Expert` on every linear layer inside."""
    plan: dict[str, Any] = {}
    for path in paths:
        check_network(bare(at(model, path)))
        inside = linear_inside(bare(at(model, path)))
        plan |= {path: (method, hyper)} | {f"{path}.{p}": (Expert, {"path": p}) for p in inside}
    return plan


def share_experts(made: Mapping[str, Any]) -> None:
    """The linear layers ask the mixture of their network."""
    for path, adapter in made.items():
        if isinstance(adapter, Expert):
            adapter.__dict__["mixture"] = made[path.removesuffix(f".{adapter.path}")]
