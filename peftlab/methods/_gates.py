"""X-LoRA's parts: gates on the layers that carry experts, and the first reading. arXiv:2402.07148."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import Adapter
from ..sites import group, sites
from ._peers import carriers, peer


class Gate(Adapter):
    """The experts of a layer, each token's weighted as the classifier says. Nothing is trained; a part of XLoRA."""

    mixes, part_of = False, "XLoRA"

    def __init__(self, layer: nn.Module, of: tuple[str, ...], slot: int):
        super().__init__(layer)
        self.needs, self.slot = tuple(of), slot
        self.__dict__["head"] = None  # the XLoRA, set by its `share`

    def expected(self) -> int:
        return 0

    def forward(self, f, x: Tensor) -> Tensor:  # (B, T, in) -> (B, T, out)
        y, s = f(x), self.head.scalings(self.slot)
        for i, name in enumerate(self.needs if s is not None else ()):
            y = y + (s[..., i, None] * peer(self, name).change(x)).to(y.dtype)
        return y


def plan_gates(method: type[Adapter], model: nn.Module, paths: Sequence[str], hyper: dict) -> dict[str, Any]:
    """{path: (method, hyper)} and a gate on each layer that carries the experts, in model order."""
    from ..attach import adapters

    of = tuple(hyper.get("of", ()))
    if len(of) < 2:
        raise ValueError(f"of={of!r}: name two or more attached adapters, such as of=('sql', 'reviews')")
    if len(paths) != 1:
        raise ValueError(f"{type(model).__name__} reads two texts, and the classifier is for one; take Arrow")
    if list(paths) != group(model, "decoder"):
        raise ValueError(f"{paths[0]!r} does not turn input_ids into hidden states; leave targets out")
    found = carriers(model, list(sites(model)), of)
    for name in of:
        if odd := next((a for a in adapters(model)[name].values() if not a.adds), None):
            raise ValueError(f"{name!r} is {type(odd).__name__}, no added term: no share of it can be taken")
    gates = {path: (Gate, {"of": of, "slot": slot}) for slot, path in enumerate(found)}
    return {path: (method, hyper | {"of": of, "layers": len(found)}) for path in paths} | gates


def share_head(method: type[Adapter], made: Mapping[str, Any]) -> None:
    """The gates ask the one classifier."""
    (head,) = (adapter for adapter in made.values() if isinstance(adapter, method))
    for gate in made.values():
        if gate is not head:
            gate.__dict__["head"] = head


@torch.no_grad()
def hidden_of(f, *args, past_key_values=None, **inputs) -> Tensor:
    """The last hidden state (B, T, d) of a decoder; ValueError if it would have only the end of the text to read."""
    if past_key_values is not None and past_key_values.get_seq_length() > 0:
        raise ValueError("it reads the whole text for each word, without a cache: generate(use_cache=False)")
    y = f(*args, **inputs)
    return y[0] if isinstance(y, tuple) else y.last_hidden_state
