"""What prefix tuning needs around it: which attention can have a prefix, the cache that shows it, masks, positions."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .core import Adapter
from .layers import is_linear
from .prompts import context
from .sites import at, bare, group

LAYER_PAST = ("BloomAttention", "GPTNeoXAttention")  # their argument for the cache has its old name


def kv_shape(attention: nn.Module) -> tuple[int, int]:
    """(heads, width) of the keys and values that the attention caches; ValueError if a prefix has no place there."""
    kind = type(attention).__name__
    takes = inspect.signature(type(attention).forward).parameters
    if not any(is_linear(bare(m)) for m in attention.children()):
        raise ValueError(f"{kind} has no projections of its own, so it is no attention; leave targets out")
    if "past_key_values" not in takes and kind not in LAYER_PAST:
        raise ValueError(f"{kind} takes no past_key_values, which a prefix stands in for; if it is the model's "
                         "attention (see targets='all-attention'), take PromptTuning")  # fmt: skip
    if hasattr(attention, "kv_lora_rank"):
        raise ValueError(f"{kind} has keys and values of different widths (latent attention); take PromptTuning")
    if "position_bias" in takes or getattr(attention, "is_cross_attention", False):
        raise ValueError(f"{kind} adds a bias for each pair of tokens or reads another text, so a prefix has no place "
                         "in it; PromptTuning works there")  # fmt: skip
    config = getattr(attention, "config", None)
    if config is None:  # BLOOM's
        return attention.num_heads, attention.hidden_size
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, heads * (getattr(attention, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def check_prefix(model: nn.Module, paths: Sequence[str], k: int) -> None:
    """ValueError if no prefix of length k fits into the attention modules at these paths."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} reads two texts, a prefix has no one place; take PromptTuning")
    limit = context(model)
    if limit and k >= limit:
        raise ValueError(f"a prefix of k={k} leaves no room in a context of {limit} tokens; take a smaller k")
    for path in paths:
        kv_shape(bare(at(model, path)))


def shifts(model: nn.Module, paths: Sequence[str], k: int) -> dict:
    """{path: (PositionShift, …)}; none in BLOOM, whose positions are a bias, see `shift_bias`."""
    if all(type(bare(at(model, path))).__name__ == "BloomAttention" for path in paths):
        return {}
    return {path: (PositionShift, {"k": k}) for path in group(model, "positions")}


class PrefixedCache:
    """Stands in for the attention's key/value cache and puts the prefix in front of what that gives.

    The real cache, if there is one, holds the text's tokens only. This view is made anew in each call of the layer, so
    gradient checkpointing, which takes the caller's cache away, does not take the prefix.
    """

    def __init__(self, cache, P_k: Tensor, P_v: Tensor, length: int | None):
        self.cache, self.P_k, self.P_v, self.length = cache, P_k, P_v, length

    def update(self, key: Tensor, value: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """(B, heads, T, head width) twice -> (B, heads, k + T with what was cached, head width) twice."""
        if self.cache is not None:
            key, value = self.cache.update(key, value, *args, **kwargs)
        rows = (len(key), -1, -1, -1)
        return (torch.cat([self.P_k.to(key).expand(rows), key[:, :, : self.length]], 2),
                torch.cat([self.P_v.to(value).expand(rows), value[:, :, : self.length]], 2))  # fmt: skip


def cache_name(kwargs: dict) -> str:
    """What the attention that gets these keyword arguments calls its cache."""
    return "layer_past" if "layer_past" in kwargs else "past_key_values"


def attention_kind(layer: nn.Module) -> str:
    """ "sdpa", "eager", …; BLOOM has only "eager", and no config in its attention."""
    return layer.config._attn_implementation if hasattr(layer, "config") else "eager"


def see_prefix(layer: nn.Module, mask: Tensor | None, k: int, x: Tensor) -> tuple[Tensor | None, int | None]:
    """(mask with k more keys that all see, how many of the text's keys it covers: None for all) for inputs x (B, T, d).

    Without a mask, sdpa counts its causal triangle from the first key, which would now be the prefix's: write it out.
    """
    length = None
    if mask is None:
        sdpa, causal = attention_kind(layer) == "sdpa", getattr(layer, "is_causal", True)
        if x.shape[1] == 1 or not (sdpa and causal):
            return None, None
        length = x.shape[1]  # an empty static cache is longer than the text
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=x.device).tril()
    if not isinstance(mask, Tensor):
        raise ValueError(f"prefix tuning cannot extend a {type(mask).__name__}; load the model with "
                         "attn_implementation='sdpa' or 'eager'")  # fmt: skip
    additive = mask.is_floating_point() and mask.ndim == 4  # 0 is seen; in the other kinds True or 1 is
    seen = mask.new_full((*mask.shape[:-1], k), 0 if additive else 1)
    return torch.cat([seen, mask], -1), length


def shift_bias(alibi: Tensor, heads: int, k: int) -> Tensor:
    """BLOOM's bias, slope of the head times position, (B·heads, 1, T) -> (B·heads, 1, k + T): the text begins at k."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    ones = torch.ones(len(alibi) // heads, k + 1, dtype=torch.long, device=alibi.device)
    front = build_alibi_tensor(ones, heads, alibi.dtype)  # positions 0…k
    return torch.cat([front[..., :k], alibi + front[..., k:]], -1)


def with_prefix(layer: nn.Module, P_k: Tensor, P_v: Tensor, x: Tensor, kwargs: dict) -> dict:
    """The attention's keyword arguments with P_k, P_v (1, heads, k, head width) in its cache, mask and ALiBi bias."""
    name, k = cache_name(kwargs), P_k.shape[2]
    mask, length = see_prefix(layer, kwargs.get("attention_mask"), k, x)
    changed = {name: PrefixedCache(kwargs.get(name), P_k, P_v, length), "attention_mask": mask}
    if kwargs.get("alibi") is not None:
        changed["alibi"] = shift_bias(kwargs["alibi"], layer.num_heads, k)
    return kwargs | changed


def weigh_prefix(layer: nn.Module, mask: Tensor | None, g: Tensor, x: Tensor, prefixed: PrefixedCache) -> Tensor:
    """`see_prefix`'s mask with log g on the part of the prefix's keys, so that they weigh g (B, T, 1) times as much."""
    if (kind := attention_kind(layer)) not in ("sdpa", "eager"):
        raise ValueError(f"a gate on a prefix needs a mask of numbers, which attention {kind!r} does not take; load "
                         "the model with attn_implementation='sdpa' or 'eager'")  # fmt: skip
    k, cache = prefixed.P_k.shape[2], prefixed.cache
    if mask is None:  # all is seen: of the prefix, of what is cached, and of x
        cached = 0 if cache is None else cache.get_seq_length(layer.layer_idx)
        mask = x.new_zeros(len(x), 1, x.shape[1], k + cached + x.shape[1])
    elif mask.dtype == torch.bool:
        mask = x.new_zeros(()).masked_fill(~mask, torch.finfo(x.dtype).min)
    own = torch.zeros_like(mask[..., :1]) + g.log().to(x.dtype)[:, None]  # (B, 1, T, 1)
    return torch.cat([own.expand(-1, -1, -1, k), mask[..., k:].expand(len(own), -1, -1, -1)], -1)


class PrefixMLP(nn.Module):
    """P = W₂·tanh(W₁·E + b₁) + b₂: the prefixes of all layers from one table E (k, d).

    Source: Li & Liang 2021, arXiv:2101.00190, section 4.3.
    """

    def __init__(self, k: int, d: int, hidden: int, layers: int, init: str):
        super().__init__()
        self.E = nn.Parameter(torch.randn(k, d))
        self.first, self.second = nn.Linear(d, hidden), nn.Linear(hidden, 2 * layers * d)
        if init == "zero":
            nn.init.zeros_(self.second.weight)
            nn.init.zeros_(self.second.bias)

    def forward(self, slot: int) -> Tensor:
        """(k, 2·d): keys and values of one layer."""
        own = slice(2 * slot * self.E.shape[1], 2 * (slot + 1) * self.E.shape[1])
        return torch.tanh(self.first(self.E)) @ self.second.weight[own].T + self.second.bias[own]


class PositionShift(Adapter):
    """Moves the text's positions on by k, behind the prefix. Nothing is trained; a part of prefix tuning."""

    targets, mixes, part_of = "positions", False, "PrefixTuning"

    def __init__(self, layer: nn.Module, k: int):
        super().__init__(layer)
        self.k = k

    def expected(self) -> int:
        return 0

    def moved(self, positions: Tensor) -> Tensor:
        positions = positions + self.k
        table = getattr(self.layer, "num_embeddings", None)  # a learned one ends; OPT's has `offset` more rows
        if table and not torch.compiler.is_compiling() and not positions.is_meta:
            longest, room = int(positions.max()) + 1, table - getattr(self.layer, "offset", 0)
            if longest > room:
                raise ValueError(f"a prefix of k={self.k} and {longest - self.k} tokens are longer than the context of "
                                 f"{room}; shorten the text or the prefix")  # fmt: skip
        return positions

    def forward(self, f, *args, **kwargs):
        if kwargs.get("position_ids") is not None:
            return f(*args, **{**kwargs, "position_ids": self.moved(kwargs["position_ids"])})
        at = max(i for i, argument in enumerate(args) if isinstance(argument, Tensor))  # rotary: (x, positions)
        return f(*args[:at], self.moved(args[at]), *args[at + 1 :], **kwargs)
