"""BD-LoRA: a factor of LoRA in diagonal blocks, one for each GPU that shares a layer. Wang et al. 2025."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..sites import ATTENTION_OUTPUT, FFN_OUTPUT
from ._lora import PARAMS, Given, checked_rank, drawn, entries, scaled


class BDLoRA(Adapter):
    """BD-LoRA: LoRA that needs no communication of its own where a layer is split over N GPUs.

    h = W₀x + (α/r)·B·A·x with A or B = diag(block₁, …, block_N). Where W₀ is split by its outputs (queries, keys,
    values, the first feed-forward layers) B has the blocks: GPU i computes its r/N rows of Ax and from them its
    outputs. Where W₀ is split by its inputs (the last layer of attention and of the feed-forward net) A has them: GPU i
    makes r/N numbers of its own inputs, and its part of B·(Ax) goes into the sum that the layer needs anyhow. B starts
    at zero, so training starts at the base.

    Stored are the blocks, one below the other: A as (r, in/N), B as (out, r/N). nblocks: N, divides r and the size that
    is cut. bd_a, bd_b: the targets with blocks in A, in B: parts of their paths, as in HF PEFT; by default as above.
    Trained: r·(in + out/N), or r·(in/N + out). Raises ValueError for sizes that N does not divide, a target in both
    lists or in none. (HF PEFT's help texts for its two lists have them the wrong way round.)
    Source: Wang et al. 2025, "Block-diagonal LoRA for eliminating communication overhead in tensor parallel LoRA
    serving", arXiv:2510.23346, section 3.
    """

    family = "low-rank"
    hf_type, hf_flags = "LORA", {"use_bdlora": Given()}
    hf_hyper = entries("use_bdlora", nblocks="nblocks", bd_a="target_modules_bd_a", bd_b="target_modules_bd_b")
    hf_params = PARAMS

    def __init__(
        self, layer: nn.Module, r: int = 8, alpha: float = 16, dropout: float = 0.0, rslora: bool = False,
        nblocks: int = 2, bd_a: tuple[str, ...] | None = None, bd_b: tuple[str, ...] | None = None, side: str = "B",
    ):  # fmt: skip
        super().__init__(layer)
        out_features, in_features = checked_rank(layer, r)
        N, cut = nblocks, in_features if side == "A" else out_features
        if N < 1 or r % N or cut % N:
            raise ValueError(f"nblocks={N} must divide r={r} and the layer's {cut} "
                             f"{'inputs' if side == 'A' else 'outputs'}; choose another number or rank")  # fmt: skip
        self.lora_A = drawn(r, in_features // (N if side == "A" else 1))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r // (N if side == "B" else 1)))
        self.dropout, self.N, self.side, self.scaling = nn.Dropout(dropout), N, side, scaled(alpha, r, rslora)

    @classmethod
    def plan(cls, model, paths, hyper):
        """Each path with its side; the lists of both sides in all of them, as files have it."""
        last = [p for p in paths if ATTENTION_OUTPUT.fullmatch(p) or FFN_OUTPUT.fullmatch(p)]
        bd_a, bd_b = hyper.get("bd_a"), hyper.get("bd_b")
        if "side" in hyper:
            raise ValueError(f"side={hyper['side']!r} follows from bd_a and bd_b, layer by layer; leave it out")
        if bd_a is None and bd_b is None:
            bd_a, bd_b = last, [p for p in paths if p not in last]
        sides = {p: "A" * any(w in p for w in bd_a or ()) + "B" * any(w in p for w in bd_b or ()) for p in paths}
        if wrong := next((p for p in paths if len(sides[p]) != 1), None):
            raise ValueError(f"{wrong!r} is in {'both' if sides[wrong] else 'none'} of bd_a and bd_b: a layer has "
                             "blocks in A or in B; name it in one of them")  # fmt: skip
        lists = {"bd_a": tuple(bd_a or ()), "bd_b": tuple(bd_b or ())}
        return {p: (cls, {**hyper, **lists, "side": sides[p]}) for p in paths}

    @staticmethod
    def size(out_features: int, in_features: int, r: int = 8, nblocks: int = 2, side: str = "B", **_) -> int:
        """r·(in + out/N), or r·(in/N + out)"""
        return r * (in_features // nblocks + out_features if side == "A" else in_features + out_features // nblocks)

    def blocks(self, x: Tensor, M: Tensor) -> Tensor:  # (..., n), (m, n/N) -> (..., m)
        return torch.einsum("...bn,bmn->...bm", x.unflatten(-1, (self.N, -1)), M.unflatten(0, (self.N, -1))).flatten(-2)

    def delta(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        x, A, B = self.dropout(x), self.lora_A, self.lora_B
        z = self.blocks(x, A) if self.side == "A" else x @ A.T
        return self.scaling * (self.blocks(z, B) if self.side == "B" else z @ B.T)
