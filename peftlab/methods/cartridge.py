"""Cartridges: the keys and values of a long text, shortened by training. Eyuboglu et al. 2025, arXiv:2506.06266."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..prefix import check_prefix, kv_shape, shifts, with_prefix


class Cartridge(Adapter):
    """Cartridge: a prefix of k keys and values that starts as what the model itself made of a text.

    h = Attn(q, [P_k;K], [P_v;V]) with P_k, P_v (k, d_kv) in each layer, as in `PrefixTuning`. `prefill(model, ids)`
    fills them with the first k tokens' own keys and values: the model then answers as if it had read these. Training
    fits more of the text into them. The first `frozen` tokens stay: much attention rests on the first token, and
    training that moves it is unstable. The text's positions begin at k. Without a prefill it starts at N(0, 1).

    The paper trains by self-study: the model asks itself about the text, answers with the text in its context, and the
    cartridge learns these answers' distributions. Several cartridges compose: activate(model, "book", "letters").
    k: length, shorter than the context. frozen: how many of them are never trained.
    Trained: 2·(k − frozen)·d_kv a layer. Never the base, and cannot be merged. Raises ValueError as `PrefixTuning`.
    Source: Eyuboglu et al. 2025, arXiv:2506.06266.
    """

    hf_type, targets, mixes, family = "CARTRIDGE", "all-attention", False, "soft prompt"
    hf_hyper = {"k": "num_virtual_tokens", "frozen": "num_frozen_tokens"}

    def __init__(self, layer: nn.Module, k: int = 16, frozen: int = 1):
        super().__init__(layer)
        if not 0 <= frozen < k:
            raise ValueError(f"k={k}, frozen={frozen}: at least one of the k tokens must be left to train")
        self.heads, self.d_kv = kv_shape(layer)
        self.k, self.frozen = k, frozen
        for name in ("k", "v"):
            self.register_buffer(f"F_{name}", torch.randn(frozen, self.d_kv))
            setattr(self, f"P_{name}", nn.Parameter(torch.randn(k - frozen, self.d_kv)))

    @classmethod
    def plan(cls, model, paths, hyper):
        k = hyper.get("k", 16)
        check_prefix(model, paths, k)
        return shifts(model, paths, k) | {p: (cls, hyper) for p in paths}

    def expected(self) -> int:
        """2·(k − frozen)·d_kv"""
        return 2 * (self.k - self.frozen) * self.d_kv

    def prefix(self) -> Tensor:  # -> (k, 2·d_kv): keys, then values
        return torch.cat([torch.cat([self.F_k, self.P_k]), torch.cat([self.F_v, self.P_v])], -1)

    def forward(self, f, *args, **kwargs):
        x = args[0] if args else kwargs["hidden_states"]  # (B, T, d)
        P_k, P_v = self.prefix().view(self.k, 2, self.heads, -1).permute(1, 2, 0, 3)[:, None]  # (1, heads, k, head)
        return f(*args, **with_prefix(self.layer, P_k, P_v, x, kwargs))


@torch.no_grad()
def prefill(model: nn.Module, ids: Sequence[int], name: str = "default") -> None:
    """Fill the named cartridge with the bare base's keys and values of the first k tokens of a text.

    ids: token ids, at least k; no token sees a later one. Raises ValueError for fewer ids, or no cartridge.
    """
    from ..attach import adapters, using

    found = [a for a in adapters(model).get(name, {}).values() if isinstance(a, Cartridge)]
    if not found or len(ids) < found[0].k:
        raise ValueError(f"{len(ids)} tokens for the adapter {name!r}: attach a Cartridge, and give it k or more")
    tokens = torch.tensor([list(ids)[: found[0].k]], device=found[0].P_k.device)
    with using(model):
        cache = model(input_ids=tokens, use_cache=True).past_key_values
    for adapter, layer in zip(found, cache.layers, strict=True):
        for frozen, trained, made in ((adapter.F_k, adapter.P_k, layer.keys), (adapter.F_v, adapter.P_v, layer.values)):
            rows = made[0].transpose(0, 1).flatten(1)  # (1, heads, k, head) -> (k, d_kv)
            frozen.copy_(rows[: adapter.frozen])
            trained.copy_(rows[adapter.frozen :])
