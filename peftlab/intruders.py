"""Intruder dimensions: singular vectors that a LoRA put among the first of a weight, and how to make them smaller.

    print(intruders(model, "sql"))                          # how many, layer by layer
    reduce_intruders(model, "sql", into="mild")             # a new adapter with them at three quarters

A weight that was trained in full keeps its singular vectors, a little turned. With a LoRA, some of the largest are new:
no vector of the base is near them. Scaling these down gives back much of what was forgotten, for a little of what was
learned.
Source: Shuttleworth, Andreas, Torralba and Sharma 2024, arXiv:2410.21228.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .attach import adapters, check_attached, merged_names
from .core import Adapter
from .inits._common import dense
from .lowrank import _check_free, attach_values, product_of, truncate
from .runtime import mode


@dataclass(frozen=True)
class Intruders:
    """Of each layer the places of its intruders among the first singular vectors of W₀ + s·BA, from 0."""

    name: str
    top: int
    epsilon: float
    found: dict[str, list[int]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(map(len, self.found.values()))

    def __repr__(self) -> str:
        with_any = {path: places for path, places in self.found.items() if places}
        wide = max(map(len, with_any), default=0)
        lines = [f"{self.name!r}: {self.total} intruders among the first {self.top} singular vectors of "
                 f"{len(self.found)} layers (cosine below {self.epsilon})"]  # fmt: skip
        return "\n".join(lines + [f"  {path:<{wide}}  {places}" for path, places in with_any.items()])


@torch.no_grad()
def intruders(model: nn.Module, name: str = "default", top: int = 10, epsilon: float = 0.5) -> Intruders:
    """Which of the first `top` left singular vectors of W₀ + s·BA have a cosine below epsilon with every one of W₀.

    For any adapter that is a product s·B·A; nothing is changed. Costs two singular value decompositions a layer.
    Raises ValueError for an unknown or merged adapter, another method, and numbers out of range.
    """
    found = {path: _places(W, change, top, epsilon)[0] for path, (W, change) in _changes(model, name, top, epsilon)}
    return Intruders(name, top, epsilon, found)


@torch.no_grad()
def reduce_intruders(model: nn.Module, name: str, into: str, top: int = 10, epsilon: float = 0.5,
                     factor: float = 0.75) -> Intruders:  # fmt: skip
    """Attach, as `into`, the adapter with its intruders scaled by `factor`, and make it the active one.

        U·diag(σ)·Vᵀ ← W₀ + s·BA;  ΔW ← s·BA + (factor − 1)·Σᵢ σᵢ·uᵢ·vᵢᵀ over intruders i;  s·B′A′ ≈ ΔW of rank r

    Each intruder adds a rank, and the new adapter keeps the rank and alpha of the old one, as HF PEFT does: its r
    largest singular values. A layer without intruders keeps its A and B. factor: 1 keeps all, 0 removes them.
    Returns the intruders that were found. Raises ValueError as `intruders`, and for a name that is taken.
    Source: Shuttleworth et al. 2024, arXiv:2410.21228.
    """
    from .methods.lora import LoRA

    _check_free(model, into)
    if not 0 <= factor <= 1:
        raise ValueError(f"factor={factor!r}: what is left of an intruder, from 0 to 1")
    table, plan, values = Intruders(name, top, epsilon), {}, {}
    for path, (W, change) in _changes(model, name, top, epsilon):
        A, B, scaling = _product(path, name, adapters(model)[name][path])
        table.found[path], part = _places(W, change, top, epsilon)
        r = min(len(A), *W.shape)
        if table.found[path] or r < len(A):
            short = truncate((change + (factor - 1) * part) / scaling, r)
            root = short.B.norm(dim=0).sqrt()  # of the singular values, which truncate leaves in B
            A, B = root[:, None] * short.A, short.B / root.clamp_min(1e-30)
        plan[path] = (LoRA, {"r": len(A), "alpha": scaling * len(A)})
        values[path] = {"lora_A": A, "lora_B": B}
    attach_values(model, into, plan, values)
    return table


def _changes(model: nn.Module, name: str, top: int, epsilon: float):
    """path, (W₀, s·BA) of each layer, in float32."""
    check_attached(model, [name])
    if merged := merged_names(model):
        raise ValueError(f"{', '.join(merged)} is merged into the weights; unmerge(model) first")
    if type(top) is not int or top < 1 or not 0 < epsilon <= 1:
        raise ValueError(f"top={top!r}, epsilon={epsilon!r}: need a whole number from 1, and a cosine from 0 to 1")
    for path, adapter in adapters(model)[name].items():
        A, B, scaling = _product(path, name, adapter)
        yield path, (dense(path, adapter.layer), scaling * (B.float() @ A.float()))


def _product(path: str, name: str, adapter: Adapter) -> tuple[Tensor, Tensor, float]:
    with mode(adapter, training=False):
        product = product_of(adapter)
    if product is None:
        raise ValueError(f"{name!r} is {type(adapter).__name__} on {path!r}, whose change is no product s·B·A; "
                         f"to_lora(model, {name!r}, r=16, into='{name}_lora') makes it one")  # fmt: skip
    return product


def _places(W: Tensor, change: Tensor, top: int, epsilon: float) -> tuple[list[int], Tensor]:
    """The intruders of W + change, and their part Σ σᵢ·uᵢ·vᵢᵀ of it."""
    base, _, _ = torch.linalg.svd(W, full_matrices=False)
    U, S, Vt = torch.linalg.svd(W + change, full_matrices=False)
    nearest = (U[:, :top].T @ base).abs().amax(1)
    places = (nearest < epsilon).nonzero()[:, 0].tolist()
    return places, U[:, places] * S[places] @ Vt[places]
