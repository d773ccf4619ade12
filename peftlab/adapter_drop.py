"""AdapterDrop: do without the adapters of the first blocks. Rücklé et al. 2021, arXiv:2010.11918."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from .attach import adapters, hosts
from .core import Adapted
from .sites import group


@contextmanager
def adapter_drop(model: nn.Module, first: int | None = None) -> Iterator[nn.Module]:
    """AdapterDrop: inside of a `with`, the first n blocks run, or are trained, without their adapters.

    hᵢ = fᵢ(hᵢ₋₁) for i ≤ n, and hᵢ = adapter(fᵢ, hᵢ₋₁) for i > n, with fᵢ the frozen block i of L.
    What is dropped is not computed, merged or not; counts and files are as ever, and so is all outside of the `with`.
    It saves the first n blocks' share of what adapters cost, and in training the way back through these blocks. They
    then give the same with any adapter, so that one pass through them could serve several tasks: with that, the paper
    computes eight tasks 39 % faster at n = 5 of 12 (here each has a pass of its own). To leave adapters out for good,
    and out of the file ("specialised"), attach by `targets` to the blocks above.

    first: n. None, for training ("robust", for use with any n later): each pass in training mode draws n, from 0 up to
    what leaves the last block that has adapters; other passes drop nothing. In an encoder–decoder, n of either stack.
    Adapters outside of the blocks stay. Attach before: modules adapted inside of the `with` are not looked at.
    Raises ValueError for an n out of range, no adapters in blocks, and methods with a part around the blocks.
    Source: Rücklé et al. 2021, arXiv:2010.11918.
    """
    level, L = levels(model)
    if first is not None and not 0 <= first <= L:
        raise ValueError(f"first={first} blocks cannot be without adapters: {type(model).__name__} has {L}; 0…{L} can")
    before = {host: host.__dict__.get("forward") for host in level}

    def drop(n: int) -> None:
        for host, number in level.items():
            host.__dict__.pop("forward", None)
            if (forward := partial(frozen, host) if number < n else before[host]) is not None:
                host.__dict__["forward"] = forward  # what nn.Module calls

    def draw(*_) -> None:
        drop(int(torch.randint(max(level.values()) + 1, ())) if model.training else 0)

    hook = model.register_forward_pre_hook(draw) if first is None else None
    try:
        drop(first or 0)
        yield model
    finally:
        drop(0)
        if hook is not None:
            hook.remove()


def frozen(host: Adapted, *args, **kwargs):
    """What a host gives without its adapters, even while they are merged into its layer."""
    return (host.layer if host.original is None else host.original)(*args, **kwargs)


def levels(model: nn.Module) -> tuple[dict[Adapted, int], int]:
    """Each host in a block -> the block's number, from 0; and how many blocks a stack has."""
    blocks = {f"{path}.": int(path.rpartition(".")[2]) for path in group(model, "all-blocks")}
    there = hosts(model)
    inside = {path: n for path in there for block, n in blocks.items() if f"{path}.".startswith(block)}
    if not inside:
        raise ValueError(f"no block of this {type(model).__name__} has adapters that could be dropped; attach some")
    for name, parts in adapters(model).items():
        around = [path for path in parts if path not in inside and any(b.startswith(f"{path}.") for b in blocks)]
        if around and set(parts) & set(inside):
            raise ValueError(f"{name!r} is {type(parts[around[0]]).__name__}, whose part on {around[0]!r} works with "
                             "those in all blocks: none of them can be dropped")  # fmt: skip
    return {there[path]: n for path, n in inside.items()}, 1 + max(blocks.values())
