"""Trainable tokens: a few rows of the embedding, and nothing else."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import is_linear
from ..sites import at, bare
from ..vocabulary import ties


class TrainableTokens(Adapter):
    """Trainable tokens: the vectors of chosen tokens are trained in place of the embedding's frozen ones.

    y = E′[ids], with E′ = E but for rows[i] as its row tokens[i]; rows (n, d) start at E's. If the output head is tied
    to E, logits = E′·h with the same rows; weights stay tied, so merging is refused. A head of its own is trained only
    if `targets` names it too, and then has its own rows.
    tokens: ids, each once. For new words make room first: `vocabulary.add_tokens(model, tokenizer, ["<call>"])`.
    Trained: n·d, once. Raises ValueError for no tokens, an id twice or outside the table, or a module without a table.
    Source: HF PEFT, docs of TrainableTokensConfig; a new word learnt alone: Gal et al. 2022, arXiv:2208.01618.
    """

    family, hf_type = "selective and sparse", "TRAINABLE_TOKENS"
    hf_hyper, hf_params = {"tokens": "token_indices"}, {"rows": "trainable_tokens_delta"}
    targets = "embeddings"

    def __init__(self, layer: nn.Module, tokens: Sequence[int] = ()):
        super().__init__(layer)
        if not isinstance(layer, nn.Embedding) and not is_linear(layer):
            raise ValueError(f"{type(layer).__name__} holds no vector per token; leave targets out for the embedding")
        if len(tokens) == 0:
            raise ValueError("no tokens to train; give their ids: tokens=[…]")
        if twice := [i for i, times in Counter(tokens).items() if times > 1]:
            raise ValueError(f"token {twice[0]} is named twice; each row is trained once")
        if wrong := [i for i in tokens if not (isinstance(i, int) and 0 <= i < len(layer.weight))]:
            raise ValueError(f"token {wrong[0]!r} is not an id in 0…{len(layer.weight) - 1}; for a new word, "
                             "add_tokens(model, tokenizer, …) first")  # fmt: skip
        self.register_buffer("tokens", torch.tensor(tokens), persistent=False)
        self.rows = nn.Parameter(layer.weight[self.tokens].detach().clone().float())
        self.tied = False  # whether the rows are another site's

    @classmethod
    def plan(cls, model, paths, hyper):
        """The embedding, and every module that shares its weight: the tied head, T5's two other tables."""
        for path in paths:
            site = bare(at(model, path))
            if not isinstance(site, nn.Embedding) and site is not bare(model.get_output_embeddings()):
                raise ValueError(f"{path!r} is a {type(site).__name__}, no table of token vectors; leave targets out")
        return {tied: (cls, hyper) for path in paths for tied in ties(model, path)}

    @classmethod
    def share(cls, made):
        first: dict[int, TrainableTokens] = {}
        for adapter in made.values():
            owner = first.setdefault(id(adapter.layer.weight), adapter)
            adapter.rows, adapter.tied = owner.rows, owner is not adapter

    def expected(self) -> int:
        """n·d, or nothing if the rows are another site's"""
        return 0 if self.tied else len(self.tokens) * self.layer.weight.shape[1]

    def forward(self, f, x: Tensor) -> Tensor:
        y, change = f(x), self.rows - self.layer.weight[self.tokens]
        if is_linear(self.layer):  # head: hidden states (..., d) -> logits (..., V)
            return y.index_add(-1, self.tokens, (x.to(change.dtype) @ change.T).to(y.dtype))
        ordered, order = self.tokens.sort()  # embedding: ids (...) -> vectors (..., d)
        place = torch.searchsorted(ordered, x).clamp(max=len(order) - 1)
        moved = y + change[order[place]] * getattr(self.layer, "embed_scale", 1)  # Gemma's tables scale what they give
        return torch.where((ordered[place] == x)[..., None], moved.to(y.dtype), y)

    def fold(self, layer: nn.Module) -> nn.Module:
        new, change = copy.deepcopy(layer), self.rows.double() - self.layer.weight[self.tokens].double()
        new.weight = nn.Parameter(layer.weight.index_add(0, self.tokens, change), requires_grad=False)
        return new
