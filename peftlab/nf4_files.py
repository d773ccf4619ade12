"""Packed weights in files: the four-bit serialisation of bitsandbytes and transformers, read and written.

    weight                                     (⌈n/2⌉, 1) uint8   two codes a byte
    weight.absmax                              (b,)               float32, or uint8 with double quantisation
    weight.quant_map                           (16,) float32      the levels
    weight.nested_absmax, .nested_quant_map    (⌈b/256⌉,), (256,) float32, with double quantisation
    weight.quant_state.bitsandbytes__nf4       uint8              JSON: block size, shape, dtype, the mean, …
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from .nf4 import BLOCKS, KINDS, NESTED, Packed, levels

STATE = ".quant_state.bitsandbytes__"


def to_state(p: Packed) -> dict[str, Tensor]:
    """Suffix after "weight" -> tensor, in bitsandbytes' names and layout."""
    facts = {"quant_type": p.kind, "blocksize": p.block, "dtype": str(p.dtype).removeprefix("torch."),
             "shape": list(p.shape)}  # fmt: skip
    tensors = {"": p.codes, ".absmax": p.absmax, ".quant_map": levels(p.kind).to(p.codes.device)}
    if p.nested_absmax is not None:
        facts |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": p.offset.item()}
        tensors |= {".nested_absmax": p.nested_absmax, ".nested_quant_map": p.nested_levels}
    return tensors | {STATE + p.kind: torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)}


def from_state(tensors: Mapping[str, Tensor], name: str = "weight") -> Packed:
    """What `to_state` gave, read back. Raises ValueError, naming the weight, for parts that are missing or do not fit."""
    (key,) = [key for key in tensors if key.startswith(STATE)] or [None]
    facts = json.loads(bytes(tensors[key].tolist()))
    double = ".nested_absmax" in tensors
    return Packed(tensors[""], tensors[".absmax"], tensors[".nested_absmax"] if double else None,
                  tensors[".nested_quant_map"] if double else None,
                  torch.tensor(facts["nested_offset"]) if double else None,
                  tuple(facts["shape"]), getattr(torch, facts["dtype"]), facts["quant_type"], facts["blocksize"])  # fmt: skip
