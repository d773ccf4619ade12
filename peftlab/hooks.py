"""What the adapters under training want of the loop: a term of the loss, a word after each step, memory kept."""

from __future__ import annotations

from torch import Tensor, nn

from .attach import adapters, switch_of
from .core import Adapter

Group = tuple[type[Adapter], dict[str, Adapter]]  # a method, and one adapter's parts of it by path


def learning(model: nn.Module) -> list[Group]:
    """The active adapters that have something to train."""
    found: dict[tuple[str, type[Adapter]], dict[str, Adapter]] = {}
    there = adapters(model)
    for name in switch_of(model).active if there else ():
        for path, adapter in there[name].items():
            if any(p.requires_grad for p in adapter.parameters()):
                found.setdefault((name, type(adapter)), {})[path] = adapter
    return [(method, made) for (_, method), made in found.items()]


def penalty(groups: list[Group]) -> Tensor | None:
    """The sum of the adapters' own terms of the loss, right after a forward pass; None if there is none."""
    own = (a for method, made in groups if method.penalty is not Adapter.penalty for a in made.values())
    terms = [term for term in (adapter.penalty() for adapter in own) if term is not None]
    return sum(terms[1:], terms[0]) if terms else None


def stepped(groups: list[Group], step: int, steps: int) -> None:
    """Tell each method that a step of the optimizer is done."""
    for method, made in groups:
        method.stepped(made, step, steps)


def memory(groups: list[Group]) -> dict[str, Tensor]:
    """name -> tensor, of the buffers that training changes and a checkpoint must hold."""
    return {f"{i}.{path}.{name}": getattr(adapter, name) for i, (_, made) in enumerate(groups)
            for path, adapter in made.items() for name in adapter.memory}  # fmt: skip
