"""What FourierFT and WaveFT share: a few trained numbers at random places of a matrix. arXiv:2405.03003, 2505.12532."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers import shape_of
from ..sites import at, bare


def places(out_features: int, in_features: int, n: int, seed: int, device: torch.device) -> Tensor:
    """(n,) different places of an (out, in) matrix, row by row: the first of a random order of all out·in of them.

    The order of HF PEFT, which keeps no places in its files, so it is made whole, 8 bytes a place, for a moment.
    ValueError unless 1 ≤ n ≤ out·in.
    """
    if not 1 <= n <= out_features * in_features:
        raise ValueError(f"n={n} is not in 1…{out_features * in_features}, the entries of the layer's "
                         f"{out_features}×{in_features}")  # fmt: skip
    if device.type == "meta":
        return torch.empty(n, dtype=torch.long, device=device)
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(out_features * in_features, generator=draw, device="cpu")
    return order[:n].clone().to(device)


def spread(numbers: Tensor, where: Tensor, out_features: int, in_features: int) -> Tensor:
    """(out, in): the numbers at their places, else zero."""
    flat = numbers.new_zeros(out_features * in_features)
    return flat.index_put((where,), numbers).view(out_features, in_features)


def one_for_all(model, paths, wanted: int | None, usual: int) -> int:
    """The number of places for all targets, as files have it: `usual`, or all entries of the smallest of them."""
    if wanted is not None:
        return wanted
    shapes = (shape_of(bare(at(model, path))) for path in paths)
    return min(usual, *(out_features * in_features for out_features, in_features in shapes))
