"""The layout of OFT: as usual, but HF PEFT replaces sizes of blocks that do not fit, and its file does not say so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..layers import shape_of
from ..sites import at, bare
from .common import Layout, Plan, keyed, paths_of

if TYPE_CHECKING:
    from ..core import Adapter


def _oft_to_hf(model: nn.Module, found: Mapping[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from ..files import endings_of, settings_of

    method = type(next(iter(found.values())))
    return keyed(found), {"target_modules": endings_of(model, list(found)), **settings_of(method, found)}


def _oft_from_hf(model: nn.Module, method: type[Adapter], config: dict, tensors: dict[str, Tensor]):
    """The size, or the number, follows from the b(b−1)/2 entries that a block has."""
    given = {ours: config[theirs] for ours, theirs in method.hf_hyper.items() if theirs in config}
    plan: Plan = {}
    found = paths_of(model, tensors, "oft_R.weight")
    for path, entries in found.items():
        b = (1 + math.isqrt(1 + 8 * entries.shape[1])) // 2
        own = {"r": shape_of(bare(at(model, path)))[1] // b} if given.get("r") else {"oft_block_size": b}
        plan[path] = (method, {**given, **own})
    return plan, {path: {"oft_R": entries} for path, entries in found.items()}


LAYOUTS: dict[str, Layout] = {"OFT": Layout(_oft_to_hf, _oft_from_hf, frozenset())}
