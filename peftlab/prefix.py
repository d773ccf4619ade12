"""What prefix tuning needs around it: which attention can have a prefix, the cache that shows it, masks, positions."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from .core import Adapter


def kv_shape(attention: nn.Module) -> tuple[int, int]:
    """(heads, width) of the keys and values that the attention caches; ValueError if a prefix has no place there."""
    kind = type(attention).__name__
    if "past_key_values" not in inspect.signature(type(attention).forward).parameters:
        raise ValueError(f"{kind} takes no past_key_values, which a prefix stands in for; if it is the model's "
                         "attention (see targets='all-attention'), take PromptTuning")  # fmt: skip
    if hasattr(attention, "kv_lora_rank"):
        raise ValueError(f"{kind} has keys and values of different widths (latent attention); take PromptTuning")
    if hasattr(attention, "has_relative_attention_bias") or getattr(attention, "is_cross_attention", False):
        raise ValueError(f"{kind} adds a bias for each pair of tokens or reads another text, so a prefix has no place "
                         "in it; PromptTuning works there")  # fmt: skip
    config = attention.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, heads * (getattr(attention, "head_dim", None) or config.hidden_size // config.num_attention_heads)


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


def see_prefix(layer: nn.Module, mask: Tensor | None, k: int, x: Tensor) -> tuple[Tensor | None, int | None]:
    """(mask with k more keys that all see, how many of the text's keys it covers: None for all) for inputs x (B, T, d).

    Without a mask, sdpa counts its causal triangle from the first key, which would now be the prefix's: write it out.
    """
    length = None
    if mask is None:
        sdpa, causal = layer.config._attn_implementation == "sdpa", getattr(layer, "is_causal", True)
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
