"""SVFT: a sparse trained matrix between a weight's singular vectors. Lingam et al. 2024, arXiv:2405.19597."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._singular import singular


class SVFT(Adapter):
    """SVFT: the change is a sparse combination of outer products of the frozen weight's own singular vectors.

    h = W₀x + U·M·Vᵀ·x, with W₀ = U·Σ·Vᵀ, U (out, n) and Vᵀ (n, in) frozen, n = min(in, out). M (n, n) is trained on its
    diagonal and on d diagonals above and below it, and zero elsewhere: with d = 0 it moves the singular values alone
    (the paper's "plain"), else it turns neighbours into each other ("banded"). M starts at zero, so training starts at
    the base. The change can have full rank.

    Memory: U and V, n·(in + out) frozen numbers a layer: more than the weight itself. They are computed again from the
    base when a file is read, which must be the very same, packed in four bits or not. off_diagonals: d, 0 to n − 1.
    Trained: n·d + (n − d)·(d + 1). Raises ValueError for d out of range.
    Source: Lingam et al. 2024, arXiv:2405.19597, section 3.1.
    """

    family = "shared and vector-based"

    def __init__(self, layer: nn.Module, off_diagonals: int = 0):
        super().__init__(layer)
        n, d = min(shape_of(layer)), off_diagonals
        if not 0 <= d < n:
            raise ValueError(f"off_diagonals={d} is not in 0…{n - 1}, for the layer has {n} singular values")
        U, _, Vt = singular(layer, n)
        self.register_buffer("U", U, persistent=False)
        self.register_buffer("Vt", Vt, persistent=False)
        near = [(i, j) for k in range(-d, d + 1) for i in range(n) if 0 <= (j := i + k) < n]
        for name, place in zip(("row", "column"), zip(*near, strict=True), strict=True):
            self.register_buffer(name, torch.tensor(place), persistent=False)
        self.M = nn.Parameter(torch.zeros(len(near)))  # diagonal by diagonal, the lowest first

    @staticmethod
    def size(out_features: int, in_features: int, off_diagonals: int = 0, **_) -> int:
        """n·d + (n − d)·(d + 1), n = min(in, out)"""
        n, d = min(out_features, in_features), off_diagonals
        return n * d + (n - d) * (d + 1)

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        n = len(self.Vt)
        M = self.M.new_zeros(n, n).index_put((self.row, self.column), self.M)
        return x @ self.Vt.T @ M.T @ self.U.T
