"""What all soft prompts share: the call with a prompt before the tokens, and the checks on the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .core import Adapter


def with_prompt(
    layer: nn.Module, f, P: Tensor, input_ids: Tensor | None = None, *,
    attention_mask: Tensor | None = None, position_ids: Tensor | None = None, token_type_ids: Tensor | None = None,
    past_key_values=None, inputs_embeds: Tensor | None = None, **others,
):  # fmt: skip
    """f([P; E(x)]) without its first k positions; `layer` is the frozen decoder and f the same, perhaps adapted.

    P: (k, d), or (B, k, d) with one prompt a row. The mask gets k ones in front, also before left padding; positions
    move by k. A cache that is not empty holds the prompt already: then only mask and positions change. An encoder's
    output keeps its k positions, for the cross-attention of its decoder; so do `hidden_states` and `attentions`.
    Raises ValueError for a mask that is not (B, T).
    """
    k = P.shape[-2]
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    cached = past_key_values is not None and past_key_values.get_seq_length() > 0
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
            raise ValueError("a prompt needs an attention mask of shape (batch, tokens), of ones and zeros, or none; "
                             "a static cache makes another: generate with the default cache")  # fmt: skip
        others["attention_mask"] = F.pad(attention_mask, (k, 0), value=1)
    if past_key_values is not None:
        others["past_key_values"] = past_key_values
    if cached or tokens is None:
        kinds = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "token_type_ids": token_type_ids}
        others |= {name: tensor for name, tensor in kinds.items() if tensor is not None}
        return f(**others) if position_ids is None else f(position_ids=position_ids + k, **others)
    if input_ids is not None and inputs_embeds is not None:
        raise ValueError("give either input_ids or inputs_embeds, not both")
    x = embedding_of(layer)(input_ids) if inputs_embeds is None else inputs_embeds
    if not hasattr(layer, "rotary_emb") and (limit := context(layer)) and k + x.shape[1] > limit:
        raise ValueError(f"a prompt of {k} and {x.shape[1]} tokens need {k + x.shape[1]} positions, "
                         f"the model has {limit}: shorten one of them")  # fmt: skip
    if position_ids is not None:
        front = torch.arange(k, device=position_ids.device).expand(len(position_ids), k)
        others["position_ids"] = torch.cat([front, position_ids + k], dim=1)
    if token_type_ids is not None:
        others["token_type_ids"] = F.pad(token_type_ids, (k, 0))
    y = f(inputs_embeds=torch.cat([P.to(x).expand(len(x), -1, -1), x], dim=1), **others)
    if is_encoder(layer):
        return y
    if isinstance(y, tuple):
        return y[0][:, k:], *y[1:]
    y.last_hidden_state = y.last_hidden_state[:, k:]
    return y


def embedding_of(layer: nn.Module) -> nn.Module:
    """The input embedding of a decoder; a ValueError names any other kind of layer."""
    find = getattr(layer, "get_input_embeddings", None)
    if find is None:
        raise ValueError(f"a prompt sits on the module that turns token ids into hidden states, not on a "
                         f"{type(layer).__name__}; use targets='decoder'")  # fmt: skip
    return find()


def context(layer: nn.Module) -> int | None:
    """How many positions the model has; None where that is not limited (T5's relative positions)."""
    return getattr(getattr(layer, "config", None), "max_position_embeddings", None)


def is_encoder(layer: nn.Module) -> bool:
    """Whether the layer is the encoder of an encoder–decoder model."""
    return layer.config.is_encoder_decoder and not layer.config.is_decoder


class LongerMask(Adapter):
    """The second part of a prompt in an encoder–decoder model: the decoder is told of the encoder's k more positions.

    The model gives its decoder the mask of the tokens alone. Nothing is trained.
    """

    part_of = "PromptTuning"

    def expected(self) -> int:
        return 0

    def forward(self, f, *args, encoder_hidden_states=None, encoder_attention_mask=None, **others):
        if encoder_attention_mask is not None:
            missing = encoder_hidden_states.shape[1] - encoder_attention_mask.shape[1]
            others["encoder_attention_mask"] = F.pad(encoder_attention_mask, (missing, 0), value=1)
        return f(*args, encoder_hidden_states=encoder_hidden_states, **others)


def plan_prompt(method: type[Adapter], model: nn.Module, paths: Sequence[str], hyper: dict) -> dict:
    """{path: (method, hyper)} of a prompt. In an encoder–decoder model it is the encoder's; see `LongerMask`.

    Raises ValueError for k < 1 or a prompt that leaves no position of the context to a token.
    """
    k, limit = hyper.get("k", signature(method).parameters["k"].default), context(model)
    if k < 1:
        raise ValueError(f"k={k} is no prompt; take at least one vector")
    if limit and k >= limit:
        raise ValueError(f"a prompt of k={k} leaves no room for a token: the model's context is {limit} positions; "
                         "take a smaller k")  # fmt: skip
    two = getattr(model.config, "is_encoder_decoder", False)
    return {p: (LongerMask, {}) if two and p.endswith("decoder") else (method, hyper) for p in paths}
