"""What LoReFT and its relatives share: a rank, the positions that are edited, and the edit. arXiv:2404.03592."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..prefix import cache_name
from ._blocks import hidden, width_of, with_hidden

MASKS = ("attention_mask", "attn_mask")


def begin(adapter, r: int, first: int | None, last: int) -> int:
    """Note which positions are edited. Returns D, the width of the hidden states; ValueError for an r out of range."""
    D = width_of(adapter.layer)
    if not 1 <= r <= D:
        raise ValueError(f"rank r={r} is not in 1…{D}, the width of the hidden states")
    adapter.first, adapter.last, adapter.mask_at = first, last, mask_place(adapter.layer)
    places = (getattr(module, "layer_idx", None) for module in adapter.layer.modules())
    adapter.slot = next((place for place in places if isinstance(place, int)), 0)  # of the block, in a cache
    return D


def plan(cls, model: nn.Module, paths: Sequence[str], hyper: dict) -> dict:
    """The `plan` of all of them: the blocks that read the prompt, of an encoder–decoder's only the encoder's.

    ValueError for positions that are none, or that a model that writes cannot know.
    """
    first, last = hyper.get("first", 4), hyper.get("last", 0)
    if first is not None and (first < 0 or last < 0 or first + last < 1):
        raise ValueError(f"first={first}, last={last}: choose at least one position, or first=None for all of them")
    if last and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(f"last={last}: a block of {type(model).__name__} cannot tell where the prompt ends and the "
                         "answer begins, so it would edit other positions in training than in use; choose first=…"
                         )  # fmt: skip
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return {path: (cls, hyper) for path in paths if not (both and "decoder" in path.split("."))}


def mask_place(block: nn.Module) -> int:
    """Where the attention mask stands among the arguments of a block, if it is not given by name; −1: nowhere."""
    names = list(inspect.signature(type(block).forward).parameters)[1:]
    return next((i for i, name in enumerate(names) if name in MASKS), -1)


def edited(T: int, past: int, first: int, last: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """(B or 1, T, 1): which of T positions are edited, the first and the last of each row's text.

    past: how many positions, with the padding, came before them and are cached. mask: as a block is given it, (B, S) or
    (B, 1, T, S); a position that no other may look at is padding. A cache of fixed size is longer than the text, one
    with a window shorter.
    """
    real = torch.ones(1, T, dtype=torch.bool, device=device)
    if mask is not None:
        flat = mask.dim() == 2
        seen = mask if mask.dtype == torch.bool else mask > (0 if flat else torch.finfo(mask.dtype).min / 2)
        real = (seen if flat else seen.any(1).any(1))[:, : past + T]
    nth = F.pad(real, (past + T - real.shape[1], 0), value=True).cumsum(-1)[:, -T:]
    return (real[:, -T:] & ((nth <= first) | (nth > nth[:, -1:] - last)))[..., None]


def edit_block(adapter, f, *args, **kwargs):
    """What the block gives, with adapter.edit(h) (B, T, D) added to its hidden states h at the adapter's positions."""
    cache = kwargs.get(cache_name(kwargs))
    past = int(cache.get_seq_length(adapter.slot)) if hasattr(cache, "get_seq_length") else 0
    out = f(*args, **kwargs)
    h = hidden(out)
    change = adapter.edit(h.to(adapter.b.dtype)).to(h.dtype)
    if adapter.first is not None:
        given = args[adapter.mask_at] if 0 <= adapter.mask_at < len(args) else None
        mask = next((kwargs[name] for name in MASKS if name in kwargs), given)
        change = change * edited(h.shape[1], past, adapter.first, adapter.last, mask, h.device)
    return with_hidden(out, h + change)
