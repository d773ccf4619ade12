"""The sizes of equal blocks of a layer's features, as in OFT (arXiv:2306.07280): given, counted, or found."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from ..layers import shape_of
from ..sites import at, bare


def block_of(features: int, size: int | None, number: int | None, most: int) -> int:
    """The size of a block: as given, by the number of blocks, or up to `most`. ValueError if it does not fit."""
    if size and number:
        raise ValueError(f"give the size of the blocks, {size}, or their number, {number}, not both")
    given = size or number or fitting([features], most)
    if given < 0 or features % given:
        what = "number of blocks" if number else "block size"
        raise ValueError(f"the {what} {given} does not divide the width {features} of this layer; "
                         f"{', '.join(map(str, divisors(features)))} do")  # fmt: skip
    b = features // given if number else given
    if b < 2:
        raise ValueError(f"blocks of {b} have no rotation to train; take blocks of 2 or more")
    return b


def sizes(model: nn.Module, paths: Sequence[str], size: int | None, number: int | None, most: int) -> tuple[int, int]:
    """(size, number) of the inputs' blocks for all targets, as files have it: 0 stands for what is not given."""
    if not size and not number:
        size = fitting([shape_of(bare(at(model, path)))[1] for path in paths], most)
    return size or 0, number or 0


def divisors(n: int, most: int = 128) -> list[int]:
    """The numbers from 2 to `most` that divide n."""
    return [k for k in range(2, min(n, most) + 1) if n % k == 0]


def fitting(features: list[int], most: int) -> int:
    """The greatest block size up to `most` that divides all of these; ValueError if there is none."""
    found = divisors(math.gcd(*features), most)
    if not found:
        raise ValueError(f"no block size from 2 to {most} divides all targets' widths, {sorted(set(features))}; "
                         "attach to layers of one width, and give the size")  # fmt: skip
    return found[-1]
