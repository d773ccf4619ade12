"""BAdam: full fine-tuning, one block after the other. Luo, Yu and Li 2024, arXiv:2404.02827."""

from __future__ import annotations

import random

import torch
from torch import nn

from ..hyper import checks
from ._blocks import BlockAdamW, blocks_of
from ._pairs import Maker

ORDERS = ("random", "ascending", "descending")


@checks
def badam(model: nn.Module, lr: float, every: int = 50, order: str = "random", weight_decay: float = 0.0,
          seed: int = 0) -> Maker:  # fmt: skip
    """Block coordinate descent with Adam: K steps on one block, all else frozen, then the next; Adam begins anew.

    For a model whose parameters are all trained (`pl.full_finetuning`). The blocks are the model's own, and one more
    for what is outside of them (embeddings, final norm, head) if that is trained. Gradients and moments are those of
    one block, so that full fine-tuning fits where its weights and little more do; each of D blocks gets a D-th of the
    steps.

    every: K. order: each round's, "random", or "descending" from the output to the input, or "ascending".
    ValueError for an unknown order, or if no block is trained.
    Source: Luo, Yu and Li 2024, arXiv:2404.02827, "BAdam: A memory efficient full parameter optimization method for
    large language models", algorithm 1.
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r} must be one of {', '.join(ORDERS)}")

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        outside, inside = blocks_of(model, parameters)
        blocks = [*inside, outside] if outside else inside

        def pick(period: int) -> list[int]:
            turn, place = divmod(period, len(blocks))
            if order == "random":
                return [random.Random(f"{seed} {turn}").sample(range(len(blocks)), len(blocks))[place]]
            return [place if order == "ascending" else len(blocks) - 1 - place]

        return BlockAdamW([], blocks, pick, every, lr, weight_decay)

    return make
