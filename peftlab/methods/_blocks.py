"""What the methods share that edit what a transformer block gives out. arXiv:2404.03592."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._bottleneck import site_shape

MASKS = ("attention_mask", "attn_mask")


def width_of(block: nn.Module) -> int:
    """D, the width of the hidden states: what a block's first linear layer reads."""
    return site_shape(block)[1]


def hidden(out) -> Tensor:
    """The hidden states (B, T, D) among what a block gives: some families give them alone, others first in a tuple."""
    return out[0] if isinstance(out, tuple) else out


def with_hidden(out, h: Tensor):
    """What a block gives, with other hidden states."""
    return (h, *out[1:]) if isinstance(out, tuple) else h


def reading_blocks(model: nn.Module, paths: Sequence[str], first: int | None, last: int) -> list[str]:
    """The blocks that read the prompt: of an encoder–decoder's only the encoder's.

    ValueError for positions that are none, or that a model that writes cannot know.
    """
    if first is not None and (first < 0 or last < 0 or first + last < 1):
        raise ValueError(f"first={first}, last={last}: choose at least one position, or first=None for all of them")
    if last and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(f"last={last}: a block of {type(model).__name__} cannot tell where the prompt ends and the "
                         "answer begins, so it would edit other positions in training than in use; choose first=…"
                         )  # fmt: skip
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return [path for path in paths if not (both and "decoder" in path.split("."))]


def mask_place(block: nn.Module) -> int:
    """Where the attention mask stands among the arguments of a block, if it is not given by name; −1: nowhere."""
    names = list(inspect.signature(type(block).forward).parameters)[1:]
    return next((i for i, name in enumerate(names) if name in MASKS), -1)


def edited(T: int, first: int, last: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """(B or 1, T, 1): which positions are edited, the first and the last of each row's text.

    mask: as a block is given it, (B, T) or (B, 1, T, T); a position that no other may look at is padding.
    """
    if T == 1:  # a step of generation: the prompt, the only thing that is edited, has gone by
        return torch.zeros(1, 1, 1, dtype=torch.bool, device=device)
    real = torch.ones(1, T, dtype=torch.bool, device=device)
    if mask is not None:
        flat = mask.dim() == 2
        seen = mask if mask.dtype == torch.bool else mask > (0 if flat else torch.finfo(mask.dtype).min / 2)
        real = (seen if flat else seen.any(1).any(1))[:, -T:]
    nth = real.cumsum(-1)
    return (real & ((nth <= first) | (nth > nth[:, -1:] - last)))[..., None]


def edit_block(adapter, f, args: tuple, kwargs: dict):
    """What the block gives, with adapter.edit(h) (B, T, D) added to its hidden states h at the adapter's positions."""
    out = f(*args, **kwargs)
    h = hidden(out)
    change = adapter.edit(h.to(adapter.b.dtype)).to(h.dtype)
    if adapter.first is not None:
        given = args[adapter.mask_at] if 0 <= adapter.mask_at < len(args) else None
        mask = next((kwargs[name] for name in MASKS if name in kwargs), given)
        change = change * edited(h.shape[1], adapter.first, adapter.last, mask, h.device)
    return with_hidden(out, h + change)
