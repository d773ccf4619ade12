"""What a model and its tokenizer make of texts: tokens, the filler between them, how long a text may be."""

from __future__ import annotations

import math
from typing import Any

from torch import nn


def tokens_of(tokenizer, text: str, special: bool = True) -> list[int]:
    """The ids of a text; special: with what the tokenizer puts around every text."""
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def filler(tokenizer) -> int:
    """A filler for masked places; the attention mask hides it, so any id does where there is no padding token."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def pad_of(model: nn.Module, tokenizer: Any) -> int:
    """A filler for training: any token will do too, but a classifier looks for its own to find the end of a row."""
    found = [getattr(getattr(model, "config", None), "pad_token_id", None), getattr(tokenizer, "pad_token_id", None), 0]
    return next(token for token in found if token is not None)


def context_of(model: nn.Module) -> float:
    """How many tokens the model can read at once, infinity if it does not say."""
    config = model.config
    return next((n for k in ("max_position_embeddings", "n_positions") if (n := getattr(config, k, None))), math.inf)


def check_decoder_only(model: nn.Module) -> None:
    """ValueError for a model that reads one text and writes another."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder–decoder; this measures decoder-only language models")
