"""Lily: LoRAs whose factors are shared between layers. Zhong et al. 2024, arXiv:2407.09946."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of


class Lily(Adapter):
    """Lily: low-rank adaptation connected across layers: a router mixes the B of a layer from a pool for all layers.

    y = W₀x + s·Bᵀ(A·x), B = Σₑ pₑ·Bₑ, p the mean over all tokens of softmax(R·A·x), with A (r, in) shared by `stride`
    layers in a row, Bₑ (r, out) of n experts shared by all layers of the same name and shape, and R (n, r) the layer's
    own. With fewer matrices than LoRA it affords a greater r. B = 0, so training starts at the base.

    The mean is over the batch, as in the authors' code: a row's answer depends a little on the rows beside it, on
    padding and on later words, and generation with a cache, one word at a time, is not quite what training saw. Not
    an affine map, so it cannot be merged.
    r: rank. stride: layers for one A. experts: n, 2 or more. scaling: s.
    Trained: r·in for every `stride` layers, n·r·out once for each name and shape, n·r a layer. Raises ValueError.
    Source: Zhong et al. 2024, "Low-rank interconnected adaptation across layers", arXiv:2407.09946.
    """

    hf_type, family, mixes = "LILY", "mixture", False
    hf_hyper = {"r": "r", "stride": "stride_A", "experts": "num_B", "scaling": "scaling"}
    hf_params = {"lily_A": "lily_A.weight", "lily_B": "lily_B.weight", "lily_router": "lily_router.weight"}

    def __init__(self, layer: nn.Module, r: int = 32, stride: int = 1, experts: int = 2, scaling: float = 1.0):
        super().__init__(layer)
        out_features, in_features = shape_of(layer)
        if r < 1 or stride < 1 or experts < 2:
            raise ValueError(f"r={r}, stride={stride}, experts={experts}: at least 1, 1, and 2 for a router to choose")
        self.experts, self.scaling = experts, scaling
        self.lily_A = nn.Parameter(torch.empty(r, in_features))
        self.lily_B = nn.Parameter(torch.zeros(experts * r, out_features))
        self.lily_router = nn.Parameter(torch.empty(experts, r))
        for drawn in (self.lily_A, self.lily_router):
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))

    @classmethod
    def share(cls, made) -> None:
        hypers = [a.hyper for a in made.values()]
        if len({h["r"] for h in hypers}) > 1:
            raise ValueError("layers that share matrices need one rank r: take no rank_pattern")
        shapes = {path: shape_of(a.layer) for path, a in made.items()}
        for path, (A, B) in keepers(shapes, hypers[0]["stride"]).items():
            for name, keeper in (("lily_A", A), ("lily_B", B)):
                if keeper != path:
                    delattr(made[path], name)
                    made[path].__dict__[name] = getattr(made[keeper], name)

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 32, experts: int = 2, **_) -> int:
        """r·in + n·r·out + n·r, of which the first is shared by `stride` layers and the second by all of a name"""
        return r * in_features + experts * r * out_features + experts * r

    def expected(self) -> int:
        out_features, in_features = shape_of(self.layer)
        r, n, own = self.hyper["r"], self.experts, self._parameters
        return r * in_features * ("lily_A" in own) + n * r * out_features * ("lily_B" in own) + n * r

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        z = x @ self.lily_A.T
        p = torch.softmax(z @ self.lily_router.T, -1).flatten(0, -2).mean(0)
        B = torch.einsum("e,ero->ro", p, self.lily_B.unflatten(0, (self.experts, -1)))
        return self.scaling * (z @ B)


def keepers(shapes: Mapping[str, tuple[int, int]], stride: int) -> dict[str, tuple[str, str]]:
    """path -> (path of the layer that holds its A, of the one that holds its B), for layers in model order."""
    same: dict[tuple, list[str]] = {}
    for path, shape in shapes.items():
        same.setdefault((path.rpartition(".")[2], *shape), []).append(path)
    return {path: (paths[i - i % stride], paths[0]) for paths in same.values() for i, path in enumerate(paths)}
