"""Prefix tuning. Li & Liang 2021, arXiv:2101.00190."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..layers import device_of
from ..prefix import PrefixMLP, check_prefix, kv_shape, shifts, with_prefix


class PrefixTuning(Adapter):
    """Prefix tuning: every attention layer sees k trained keys and values in front of those of the text.

    Attn(q, K, V) becomes Attn(q, [P_k; K], [P_v; V]), with P_k, P_v (k, d_kv) and d_kv = key/value heads · head width.
    The text's positions begin at k. With `projection`, the prefixes of all layers come from one MLP of width `hidden`
    (0: d_kv), P = W₂·tanh(W₁·E + b₁) + b₂ with E (k, d_kv); the file holds only what it gives, the plain P.

    k: prefix length, shorter than the context. init: "random" is N(0, 1); "zero" is not the base either, because a key
    of zeros still takes its share of the softmax: each token listens less to the text.
    Trained: 2·k·d_kv a layer; with `projection` k·d + (d·h + h) + (h + 1)·2·L·d once, d = d_kv, h = `hidden`.
    Raises ValueError where attention has no cache argument, or a bias for each pair of tokens (T5).
    Source: Li & Liang 2021, arXiv:2101.00190, sections 4.2, 4.3; in each layer: Liu et al. 2021, arXiv:2110.07602.
    """

    family = "soft prompt"
    hf_type, targets, mixes = "PREFIX_TUNING", "all-attention", False
    hf_hyper = {"k": "num_virtual_tokens"}

    def __init__(self, layer: nn.Module, k: int = 10, projection: bool = False, hidden: int = 0, init: str = "random"):
        super().__init__(layer)
        if k < 1 or hidden < 0 or init not in ("random", "zero"):
            raise ValueError(f"k={k}, hidden={hidden}, init={init!r}: take k ≥ 1, hidden ≥ 0, init 'random' or 'zero'")
        self.heads, self.d_kv = kv_shape(layer)
        self.k, self.width, self.projection, self.init = k, hidden or self.d_kv, projection, init
        if projection:
            self.share({"": self})
        else:
            start = torch.randn if init == "random" else torch.zeros
            self.P_k, self.P_v = nn.Parameter(start(k, self.d_kv)), nn.Parameter(start(k, self.d_kv))

    @classmethod
    def plan(cls, model: nn.Module, paths, hyper: dict) -> dict:
        k = hyper.get("k", 10)
        check_prefix(model, paths, k)
        return shifts(model, paths, k) | {p: (cls, hyper) for p in paths}

    @classmethod
    def share(cls, made: dict[str, Adapter]) -> None:
        """With `projection`, one MLP for all layers: a submodule of the first adapter, a reference in the others."""
        users = [a for a in made.values() if isinstance(a, PrefixTuning) and a.projection]
        if len({a.d_kv for a in users}) > 1:
            raise ValueError("the layers' keys have different widths, so no one MLP fits them; take projection=False")
        for slot, user in enumerate(users):
            if slot == 0:
                with torch.device(device_of(user.layer)):
                    user.mlp = PrefixMLP(user.k, user.d_kv, user.width, len(users), user.init)
            else:
                user._modules.pop("mlp", None)
                user.__dict__["mlp"] = users[0].mlp
            user.slot = slot

    def expected(self) -> int:
        """2·k·d_kv, or what the one MLP has, in the first layer"""
        k, d, h = self.k, self.d_kv, self.width
        if not self.projection:
            return 2 * k * d
        return (k * d + (d * h + h) + (h + 1) * len(self.mlp.second.bias)) * ("mlp" in self._modules)

    def prefix(self) -> Tensor:  # -> (k, 2·d_kv): keys, then values
        return self.mlp(self.slot) if self.projection else torch.cat([self.P_k, self.P_v], -1)

    def forward(self, f, *args, **kwargs):
        x = args[0] if args else kwargs["hidden_states"]  # (B, T, d)
        P_k, P_v = self.prefix().view(self.k, 2, self.heads, -1).permute(1, 2, 0, 3)[:, None]  # (1, heads, k, head)
        return f(*args, **with_prefix(self.layer, P_k, P_v, x, kwargs))
