"""What "preparing a model for k-bit training" costs, a step that other libraries ask for and this one does without.

peft's `prepare_model_for_kbit_training` does four things to a model whose linear layers are packed:
1. it freezes the base: `attach` does that;
2. it makes the embedding's output require a gradient, so that gradient checkpointing of the reentrant kind finds one to
   keep: transformers' `gradient_checkpointing_enable()` does that itself, and its default kind needs none;
3. it turns gradient checkpointing on: worth a line of your own, for it trades a second forward pass for memory;
4. it casts all that is not packed from 16 to 32 bits: embeddings, norms and the output head. Norms and the loss compute
   in float32 anyway, and what trains, the adapter, is float32 without it. This is the expensive one; see `cost`.

So QLoRA is `quantize(model)`, `attach(model, LoRA, …)`, `model.gradient_checkpointing_enable()`, and training.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from .attach import adapters
from .nf4_layer import NF4Linear, quantize
from .shapes import meta_model

MORE = 2  # bytes of float32 beyond those of bfloat16 or float16


class Cost(NamedTuple):
    """Bytes that casting the unpacked parts of a model to float32 adds to the peak of a training step."""

    weights: int  # embeddings, head, norms and biases, kept in float32
    head: int  # the 16-bit copy of the head that autocast makes in each step, as the head is float32 now
    stream: int  # what gradient checkpointing keeps, one hidden state a layer, in float32

    @property
    def total(self) -> int:
        return sum(self)

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in zip(self._fields, self, strict=True))
        return f"+{self.total / 2**30:.2f} GiB ({parts})"


def cost(model: Any, tokens: int = 2048) -> Cost:
    """What the k-bit preparation of peft adds to the memory of a model, for `tokens` (batch · length) a step.

    model: a language model that `quantize` has packed, on any device, or what `shapes.meta_model` takes: the name of a
    built-in shape ("llama-3-8b"), a Hub id, a config; that is taken as `quantize` would pack it, the rest in bfloat16.
    With V words, width d and L layers, weights: 2 bytes for each unpacked number, mostly 2·V·d or, tied, V·d of them;
    head: 2·V·d bytes; stream: 2·tokens·d·L bytes. Computed in bfloat16 by autocast, with gradient checkpointing.
    Raises ValueError for a dense model: it would be cast whole.
    """
    if not isinstance(model, nn.Module):
        model = quantize(meta_model(model).to(torch.bfloat16))
    elif not any(isinstance(module, NF4Linear) for module in model.modules()):
        raise ValueError(f"this {type(model).__name__} has no packed layer, so there is no k-bit training to prepare; "
                         "quantize(model) first, or give the name of a shape")  # fmt: skip
    own = {id(p) for found in adapters(model).values() for a in found.values() for p in a.parameters()}
    half = [p for p in model.parameters() if id(p) not in own and p.dtype in (torch.bfloat16, torch.float16)]
    table = getattr(model, "get_output_embeddings", lambda: None)()
    head = getattr(table, "weight", None)
    config = model.config.get_text_config()
    return Cost(
        weights=MORE * sum(p.numel() for p in half),
        head=2 * sum(p.numel() for p in half if id(p) == id(head)),
        stream=MORE * tokens * config.hidden_size * config.num_hidden_layers if half else 0,
    )
