"""LISA: full fine-tuning of a few blocks at a time, drawn at random. Pan et al. 2024, arXiv:2403.17919."""

from __future__ import annotations

import random

import torch
from torch import nn

from ..hyper import checks
from ._blocks import BlockAdamW, blocks_of
from ._pairs import Maker


@checks
def lisa(model: nn.Module, lr: float, blocks: int = 2, every: int = 10, weight_decay: float = 0.0,
         seed: int = 0) -> Maker:  # fmt: skip
    """Train embeddings, final norm and head always, and of the blocks between them γ, drawn anew every K steps.

    For a model whose parameters are all trained (`pl.full_finetuning`). In LoRA's runs the first and the last layer
    moved by far the most; training them always and the others in turn imitates that with all of a weight's freedom.
    Gradients and moments: of γ blocks and what is outside, instead of all. The backward pass stops at the lowest block
    that is trained, unless the embeddings are, as they are here.

    blocks: γ. every: K. seed: of the draws; a resumed run draws the same. ValueError for γ out of range.
    Source: Pan et al. 2024, arXiv:2403.17919, "LISA: Layerwise importance sampling for memory-efficient large language
    model fine-tuning", algorithm 1, with the same probability for each block.
    """

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        outside, inside = blocks_of(model, parameters)
        if not 1 <= blocks <= len(inside):
            raise ValueError(f"blocks={blocks} is not in 1…{len(inside)}, the number of trained blocks")

        def pick(period: int) -> list[int]:
            return sorted(random.Random(f"{seed} {period}").sample(range(len(inside)), blocks))

        return BlockAdamW(outside, inside, pick, every, lr, weight_decay)

    return make
