"""What methods share that work on other adapters of the same layer: fusion and gates. arXiv:2005.00247."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..core import Adapter


def carriers(model: nn.Module, paths: Sequence[str], names: Sequence[str]) -> list[str]:
    """The target paths that carry the named adapters. ValueError if one is missing, or not where the others are."""
    from ..attach import adapters, check_attached

    check_attached(model, names)
    there = adapters(model)
    found = {name: [path for path in paths if path in there[name]] for name in names}
    for name, here in found.items():
        if not here:
            raise ValueError(f"none of the targets carries {name!r}, which sits on {next(iter(there[name]))!r} and "
                             f"{len(there[name]) - 1} more modules; name those with targets=…")  # fmt: skip
        if apart := set(here) ^ set(found[names[0]]):
            raise ValueError(f"{names[0]!r} and {name!r} must sit on the same layers, but only one of them sits on "
                             f"{min(apart)!r}; choose targets=… where both are")  # fmt: skip
    return found[names[0]]


def peer(adapter: Adapter, name: str) -> Adapter:
    """The adapter of that name on the same layer."""
    if name not in adapter.peers:
        raise ValueError(f"{type(adapter).__name__} needs the adapter {name!r} on its layer, and it is not attached; "
                         "attach or load it first")  # fmt: skip
    return adapter.peers[name]


def known(f, x, h):
    """f, whose answer h for the input x is known already; a method that asks for another input (IA3) gets f's."""
    return lambda u: h if u is x else f(u)
