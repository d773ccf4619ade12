"""BOFT: a rotation of the input made of butterfly factors. Liu et al. 2023, arXiv:2311.06243."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import shape_of
from ._block_sizes import block_of, sizes
from ._rotations import blockwise, cayley, eye_of


class BOFT(Adapter):
    """BOFT (butterfly OFT): the input is rotated by a product of sparse rotations, laid out as in the FFT.

    h = s ⊙ (W₀Rᵀx) + b with R = B̃ₘ…B̃₂B̃₁, where each B̃ᵢ is block-diagonal like OFT's, after a fixed permutation. B̃₁
    turns within blocks of b neighbours; B̃ᵢ turns half a block together with one 2ⁱ⁻² blocks further on, so that m
    factors mix 2ᵐ⁻¹ blocks, where OFT would need a block 2ᵐ⁻¹ times as large. Each block is Cayley's (I − Q)(I + Q)⁻¹,
    Q = (A − Aᵀ)/2. A starts at 0 and s at 1, so training starts at the base. s ⊙ is HF PEFT's; files have it.

    boft_block_size: b, even if m > 1. boft_block_num: the number of blocks instead. boft_n_butterfly_factor: m.
    boft_dropout: in training, one factor at random has each of its blocks left out with this probability.
    Trained: m·in·b + out stored numbers; A counts b² a block, though only its b(b−1)/2 differences matter.
    Raises ValueError unless 2ᵐ⁻¹·b divides `in`.
    Source: Liu et al. 2023, arXiv:2311.06243, section 4. HF PEFT 0.21 needs a CUDA extension for m > 1 and without it
    takes m = 1, with a warning; its permutations are dense matrices, m·in² numbers a layer. Here they are views.
    """

    hf_type = "BOFT"
    hf_hyper = {n: n for n in ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout")}
    family = "orthogonal"

    def __init__(
        self, layer: nn.Module, boft_block_size: int | None = None, boft_block_num: int = 0,
        boft_n_butterfly_factor: int = 2, boft_dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__(layer)
        (out_features, inputs), m = shape_of(layer), boft_n_butterfly_factor
        b = block_of(inputs, boft_block_size, boft_block_num, most=4)
        if m < 1 or inputs % (b * 2 ** (m - 1)) or (m > 1 and b % 2):
            raise ValueError(f"boft_n_butterfly_factor={m} needs a multiple of {2 ** max(m - 1, 0)} blocks, of an even "
                             f"size; these {inputs} inputs have {inputs // b} of {b}")  # fmt: skip
        if not 0 <= boft_dropout < 1:
            raise ValueError(f"boft_dropout={boft_dropout} must be in 0…1")
        self.boft_R, self.p = nn.Parameter(torch.zeros(m, inputs // b, b, b)), boft_dropout
        self.boft_s = nn.Parameter(torch.ones(out_features, 1))

    @classmethod
    def plan(cls, model, paths, hyper):
        size, number = sizes(model, paths, hyper.get("boft_block_size"), hyper.get("boft_block_num"), most=4)
        return {path: (cls, {**hyper, "boft_block_size": size, "boft_block_num": number}) for path in paths}

    @staticmethod
    def size(
        out_features: int, in_features: int, boft_block_size=None, boft_block_num=0, boft_n_butterfly_factor=2, **_
    ) -> int:
        """m·in·b + out"""
        b = block_of(in_features, boft_block_size, boft_block_num, most=4)
        return boft_n_butterfly_factor * in_features * b + out_features

    def rotations(self) -> Tensor:  # (m, n, b, b)
        R = cayley((self.boft_R.mT - self.boft_R) / 2)
        if self.training and self.p:
            chosen = torch.randperm(len(R), device=R.device) == 0
            drop = chosen[:, None] & (torch.rand(R.shape[:2], device=R.device) < self.p)
            R = torch.where(drop[..., None, None], eye_of(R), R)
        return R

    def rotated(self, x: Tensor) -> Tensor:  # x·B̃ₘ…B̃₁: (..., in) -> (..., in)
        R = self.rotations()
        half = R.shape[-1] // 2
        for i in range(len(R) - 1, 0, -1):
            pairs = x.unflatten(-1, (-1, 2, 2**i, half)).transpose(-3, -2)  # (..., groups, 2ⁱ, 2, b/2)
            x = blockwise(pairs.flatten(-4), R[i]).unflatten(-1, pairs.shape[-4:]).transpose(-3, -2).flatten(-4)
        return blockwise(x, R[0])

    def forward(self, f, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        y, s, bias = f(self.rotated(x.to(self.boft_s.dtype)).to(x.dtype)), self.boft_s[:, 0], self.layer.bias
        return (s * y if bias is None else s * y + (1 - s) * bias).to(y.dtype)  # b is not scaled
