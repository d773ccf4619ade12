"""The program whose memory is asked for: one optimizer step, or writing some tokens. Predicted and measured alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..rows import kind_of

Mark = Callable[[str], None]


def batch_of(
    model: nn.Module, rows: int, tokens: int, padding: bool = False, device: str = "meta"
) -> dict[str, Tensor]:
    """A batch (B, T) as `peftlab.train` makes one of rows of equal length; with padding, it has a mask that is needed.

    A language model predicts each of its tokens, an encoder–decoder writes T tokens to T tokens, a classifier gives
    one label a row.
    """
    ids = torch.zeros(rows, tokens, dtype=torch.long, device=device)
    kind = kind_of(model)
    batch = {"input_ids": ids, "labels": torch.zeros_like(ids)}
    if kind == "other" and _classifies(model):
        batch["labels"] = torch.zeros(rows, dtype=torch.long, device=device)
    if padding:
        batch["attention_mask"] = torch.ones_like(ids)
        if device != "meta":
            batch["attention_mask"][:, -1] = 0
    return batch


def _classifies(model: nn.Module) -> bool:
    """Whether it gives one answer a row: a masked language model has one for each token."""
    return getattr(model, "get_output_embeddings", lambda: None)() is None


def without_labels(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch for running a model only; a decoder reads what it would have learned to write."""
    rest = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if kind_of(model) == "seq2seq" and "labels" in batch:
        rest.setdefault("decoder_input_ids", batch["labels"])
    return rest


def own_loss(out: Any) -> Tensor:
    """The loss that a transformers model gives out with the labels it got."""
    loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    if loss is None:
        raise ValueError("the model gives out no loss; give loss=, a function from its output to the loss")
    return loss


class TrainingStep:
    """A batch through the model, back, and an optimizer step: phases "forward", "backward", "step".

    micro_batches: how many batches add up their gradients before the step. clip: longest gradient, None: not clipped.
    Called with a function that is told of each phase as it begins. Frees the gradients at its end.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, *,
                 autocast: AbstractContextManager | None = None, micro_batches: int = 1, clip: float | None = 1.0,
                 loss: Callable[[Any], Tensor] | None = None):  # fmt: skip
        self.model, self.batch, self.optimizer = model, dict(batch), optimizer
        self.autocast, self.micro_batches, self.clip = autocast or nullcontext(), micro_batches, clip
        self.loss = loss or own_loss
        self.trained = [p for p in model.parameters() if p.requires_grad]
        if kind_of(model) != "other":
            self.batch["use_cache"] = False  # keys and values for generation: dead weight in training

    def __call__(self, mark: Mark) -> None:
        for _ in range(self.micro_batches):
            mark("forward")
            with self.autocast:
                loss = self.loss(self.model(**self.batch))
            mark("backward")
            loss.backward()
            del loss
        mark("step")
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Generation:
    """A prompt through the model, then one token after the other with a cache: phases "prompt" and "tokens"."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor], new_tokens: int,
                 autocast: AbstractContextManager | None = None):  # fmt: skip
        self.model, self.new_tokens, self.autocast = model, new_tokens, autocast or nullcontext()
        self.batch = without_labels(model, batch)
        self.cache: Any = None

    @torch.no_grad()
    def __call__(self, mark: Mark) -> None:
        self.cache = None  # of the call before
        mark("prompt")
        with self.autocast:
            if not self.new_tokens or kind_of(self.model) != "causal":
                self.model(**self.batch)
                return
            out = self.model(**self.batch, use_cache=True, logits_to_keep=1)
            self.cache = out.past_key_values
            mask = self.batch.get("attention_mask")
            for step in range(1, self.new_tokens):
                if step == 2 < self.new_tokens - 1:
                    step = self._skip(step)
                mark("tokens")
                token = out.logits[:, -1:].argmax(-1)
                if mask is not None:
                    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                out = self.model(input_ids=token, attention_mask=mask, past_key_values=self.cache, use_cache=True)
                if step == self.new_tokens - 1:  # on meta tensors, after a jump
                    break

    def _skip(self, step: int) -> int:
        """On meta tensors: to the last tokens at once, with a cache as long as it would be."""
        if not self.batch["input_ids"].is_meta:
            return step
        missing = self.new_tokens - 1 - step
        for layer in self.cache.layers:
            length = layer.keys.shape[2] + missing
            if hasattr(layer, "cumulative_length"):  # of a sliding window, which keeps the last tokens only
                layer.cumulative_length += missing
                length = min(length, layer.sliding_window - 1)
            layer.keys, layer.values = (
                t.new_empty(*t.shape[:2], length, t.shape[3]) for t in (layer.keys, layer.values)
            )
        return self.new_tokens - 1


# --------------------------------------------------------------------------------------------------------- optimizers


class EightBit(torch.optim.Optimizer):
    """The memory of bitsandbytes' 8-bit and paged AdamW; it updates nothing.

    Two states of one byte a number with a float32 scale for each 256, of parameters of 4,096 numbers and more; of
    smaller ones in float32. Paged states of more than 100,000 numbers lie in CPU memory and move to the card when used.
    Source: bitsandbytes/optim/optimizer.py, init_state and get_state_buffer.
    """

    BLOCK, LEAST, PAGED = 256, 4096, 100_000

    def __init__(self, params: Any, eight: bool, paged: bool):
        super().__init__(params, {})
        self.eight, self.paged, self.paged_bytes = eight, paged, 0

    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if not self.state[p]:
                packed = self.eight and p.numel() >= self.LEAST
                dtype, scales = torch.uint8 if packed else torch.float32, math.ceil(p.numel() / self.BLOCK)
                state = {name: p.new_zeros(scales * packed, dtype=torch.float32) for name in ("absmax1", "absmax2")}
                if self.paged and p.numel() >= self.PAGED:
                    self.paged_bytes += 2 * p.numel() * dtype.itemsize
                else:
                    state |= {name: torch.zeros_like(p, dtype=dtype) for name in ("state1", "state2")}
                self.state[p] = {"step": 1, **state}


def _adamw(**how: bool) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda params: torch.optim.AdamW(params, lr=1e-4, **how)


def _sgd(momentum: float) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, lr=1e-4, momentum=momentum, foreach=True)


def _packed(eight: bool, paged: bool) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda params: EightBit(params, eight, paged)


# The names of `peftlab.train`, and the ways in which torch runs AdamW: fused, one kernel; foreach, over all tensors at
# once with a temporary copy of them, which is torch's own default on a GPU; and one tensor after the other.
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": _adamw(fused=True),
    "adamw_foreach": _adamw(foreach=True),
    "adamw_loop": _adamw(foreach=False, fused=False),
    "sgd": _sgd(0.0),
    "sgd_momentum": _sgd(0.9),
    "adamw8bit": _packed(True, False),
    "paged_adamw": _packed(False, True),
    "paged_adamw8bit": _packed(True, True),
}
