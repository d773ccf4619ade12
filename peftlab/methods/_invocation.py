"""Where an invocation stands among the tokens: the part of aLoRA where the tokens come in. arXiv:2504.12397."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core import Adapter


class Invoked:
    """Which tokens (B, T) of the pass are adapted: one object for all parts of an adapter."""

    tokens: Tensor | None = None


class Watch(Adapter):
    """Looks for the invocation among the tokens, for the layers below. Nothing is trained; a part of aLoRA."""

    targets, mixes, part_of = "decoder", False, "ALoRA"

    def __init__(self, layer: nn.Module, invocation: Sequence[int] = ()):
        super().__init__(layer)
        self.register_buffer("invocation", torch.tensor(invocation, dtype=torch.long), persistent=False)
        self.__dict__["now"] = Invoked()

    def expected(self) -> int:
        return 0

    def invoked(self, ids: Tensor) -> Tensor:
        """(B, T): from the start of the last invocation in each row on."""
        n = len(self.invocation)
        found = (ids.unfold(1, n, 1) == self.invocation).all(-1) if n <= ids.shape[1] else ids[:, :0].bool()
        at = torch.arange(1, found.shape[1] + 1, device=ids.device)
        last = (found * at).amax(1, keepdim=True) if found.shape[1] else at.new_zeros(len(ids), 1)
        return (torch.arange(1, ids.shape[1] + 1, device=ids.device) >= last) & (last > 0)

    def forward(self, f, input_ids: Tensor | None = None, *args, past_key_values=None, **inputs):
        if input_ids is None:
            raise ValueError("aLoRA looks for its invocation in input_ids; call the model with them")
        on = self.invoked(input_ids)
        before = getattr(past_key_values, "invoked", None)  # (B, 1): how the rows of this cache stood
        self.now.tokens = on = on if before is None else on | before
        y = f(input_ids, *args, past_key_values=past_key_values, **inputs)
        cache = getattr(y, "past_key_values", None)
        if cache is not None and not torch.compiler.is_compiling():
            cache.invoked = on[:, -1:]
        return y
