"""Adapters folded into the weights, and combined with each other. The model is changed in place."""

from __future__ import annotations

from torch import nn

from .attach import Sharing, check_attached, hosts, merged_names, switch_of


def merge(model: nn.Module, *names: str) -> nn.Module:
    """Fold adapters into the weights (default: the active ones): the same outputs, the speed of the base.

    The untouched layers are kept (their memory too), so that `unmerge` is exact. Names must be the innermost of the
    active adapters. Raises ValueError for a method that is not an affine map, or a tied layer; then nothing is merged.
    """
    switch = switch_of(model)
    names = names or switch.active
    check_attached(model, names)
    if merged_names(model):
        raise ValueError(f"{', '.join(merged_names(model))} is merged already; unmerge(model) first")
    if not names:
        raise ValueError("no adapter is active, so there is nothing to merge; name the adapters")
    if switch.active and switch.active[: len(names)] != tuple(names):
        raise ValueError(f"active are {switch.active}, innermost first; {names} is not how they begin, so merging it "
                         "would change their order. Name them in that order, or activate(model, …) first")  # fmt: skip
    there = hosts(model)
    for path, host in there.items():
        try:
            host.check_merge(names)
        except ValueError as error:
            raise ValueError(f"{names} cannot be merged at {path!r}: {error}") from None
    sharing = Sharing(model)
    try:
        for path, host in there.items():
            if any(n in host.adapters for n in names):
                if sharing.tied(host.layer):
                    raise ValueError(f"{path!r} shares its weight with another module; merging would untie them")
            try:
                host.merge(tuple(names))
            except ValueError as error:
                raise ValueError(f"{names} cannot be merged at {path!r}: {error}") from None
    except BaseException:
        unmerge(model)
        raise
    if not switch.active:
        switch.active = tuple(names)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Take merged adapters out of the weights again, bit for bit; they stay attached and active."""
    for host in hosts(model).values():
        host.unmerge()
    return model
