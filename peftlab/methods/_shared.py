"""What methods have in common whose layers share tensors: who holds them, and how random ones are drawn from a seed.

The first such method was VeRA: Kopiczko et al. 2023, arXiv:2310.11454.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import device_of, shape_of

Held = Any  # a Frozen, None until what it holds is drawn


class Frozen(nn.Module):
    """Frozen tensors for several adapters: in a module, so that who moves its keeper moves them for all.

    saved: whether they are in files; if not, they are drawn again from the seed.
    """

    def __init__(self, saved: bool, **tensors: Tensor):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=saved)


def keep(made: dict[str, Adapter], name: str, thing: nn.Module | nn.Parameter) -> None:
    """One layer (the first by name) holds `thing`; the others refer to it, so that it is trained and saved once.

    A copy for merging doubles the precision of what a layer holds: the others convert when they compute.
    """
    keeper = min(made)
    for path, adapter in made.items():
        if hasattr(adapter, name):
            delattr(adapter, name)  # what it made for itself alone
        if path == keeper:
            setattr(adapter, name, thing)
        else:
            adapter.__dict__[name] = thing


def agree(made: dict[str, Adapter], *names: str) -> None:
    """ValueError if layers that share tensors differ in one of these settings."""
    for name in names:
        if len(values := {getattr(adapter, name) for adapter in made.values()}) > 1:
            raise ValueError(f"{name} must be one for all layers, for they share tensors; it is {sorted(values)}")


def widened(x: Tensor, parameter: Tensor) -> Tensor:
    """x in the dtype that an adapter computes in, for layers whose only parameter is held by another layer."""
    return x.to(torch.promote_types(x.dtype, parameter.dtype))


def largest(made: dict[str, Adapter]) -> tuple[int, int]:
    """(out, in) that no adapted layer exceeds."""
    shapes = [shape_of(adapter.layer) for adapter in made.values()]
    return max(out for out, _ in shapes), max(in_ for _, in_ in shapes)


def uniform(draw: torch.Generator, like: Adapter, *shape: int, dtype=torch.float32, slope: float = 0.0) -> Tensor:
    """Uniform in ±√(6/n/(1 + slope²)), n the numbers of a row, drawn on the CPU: what HF PEFT draws from a seed."""
    if (device := device_of(like.layer)).type == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    return nn.init.kaiming_uniform_(torch.empty(shape, dtype=dtype, device="cpu"), slope, generator=draw).to(device)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(seed)
