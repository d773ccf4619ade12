"""Models without numbers: a copy of any model on torch's meta device, or one that is made there from its shape."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..shapes import meta_model


def ghost(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device: adapters, what trains, modes and packed weights as they are, no numbers.

    The model itself is not copied and not changed, so that this takes no memory. Works with models of peft and with
    bitsandbytes' 4-bit layers.
    """
    with _deepcopied_as(_ghost):
        return copy.deepcopy(model, {id(tensor): _ghost(tensor) for tensor in _tensors(model)})


def puppet(model: nn.Module) -> nn.Module:
    """A copy of a model without numbers on the CPU that has some: each weight is a single nil, repeated.

    For adapters that look at random numbers of the size of a weight when they are made. It takes no memory either.
    """
    with _deepcopied_as(_puppet):
        return copy.deepcopy(model, {id(tensor): _puppet(tensor) for tensor in _tensors(model)})


def _puppet(tensor: Tensor) -> Tensor:
    new = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _ghost(tensor: Tensor) -> Tensor:
    repeated = any(stride == 0 for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    if repeated:  # a puppet's: it stands for a whole one
        new = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    if (state := getattr(tensor, "quant_state", None)) is not None:
        return _packed(tensor, new, state)
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def _packed(tensor: Tensor, new: Tensor, state: Any) -> Tensor:
    """bitsandbytes' Params4bit, with its scales."""
    facts = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    return type(tensor)(new, requires_grad=False, quant_state=_state(state), bnb_quantized=True,
                        **{name: getattr(tensor, name) for name in facts})  # fmt: skip


def _state(state: Any) -> Any:
    """Its QuantState, with every tensor in it a ghost; the nested one too."""
    new = copy.copy(state)
    for name, value in vars(state).items():
        if isinstance(value, Tensor):
            setattr(new, name, _ghost(value))
        elif name == "state2" and value is not None:
            setattr(new, name, _state(value))
    return new


@contextmanager
def _deepcopied_as(other: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Tensors that are neither parameters nor buffers (a cached mask, say) become others too when they are copied."""
    plain = Tensor.__deepcopy__

    def changed(self: Tensor, seen: dict[int, Any]) -> Tensor:
        if id(self) not in seen:
            seen[id(self)] = other(self.detach())
        return seen[id(self)]

    Tensor.__deepcopy__ = changed
    try:
        yield
    finally:
        Tensor.__deepcopy__ = plain


def build(source: Any, dtype: torch.dtype, **config: Any) -> nn.Module:
    """The model that a name, file or config stands for (see `shapes.meta_model`), its weights in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return meta_model(source, **config)
    finally:
        torch.set_default_dtype(before)
