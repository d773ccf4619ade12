"""Unpacking four-bit weights fast: the values of `nf4.unpack`, bit for bit, sooner and in less memory.

On a CPU fresh memory costs more than the arithmetic. So weights are unpacked by parts that stay in the cache of a core,
and a layer multiplies with a few rows of W at a time, each time in the same piece of memory. On a GPU Triton's kernels
of nf4_triton.py do it, where they run. benchmarks/nf4.py and nf4_gpu.py measure it.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from . import nf4
from .nf4 import Packed, at_a_time, rescale, scales, tables

DENSE = 2**21  # weights of a layer that are dense at a time on a CPU: 8 MiB
TRITON = {"cuda"}  # kinds of devices on which Triton's kernels unpack, where they run; empty: plain tensor code does


def unpack(p: Packed, dtype: torch.dtype) -> Tensor | None:
    """W, dense; None where the plain formula is as good."""
    if triton := kernels(p):
        return triton.dequantize(p, dtype)
    if p.codes.device.type != "cpu":
        return None
    return _fill(_room(math.prod(p.shape), dtype), p.codes.view(-1), scales(p), p.kind, p.block).view(p.shape)


def unpack_rows(p: Packed, dtype: torch.dtype, beside: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """(which rows, those rows of W) of an (out, in) matrix, one small dense part after the other; a GPU takes it whole.

    All parts take the same memory, so use one before you ask for the next: fresh memory for a whole dense layer costs
    a CPU more time than to unpack. beside: numbers that the parts are multiplied with; a part may be as many, because
    a large product loses more by being cut than is gained.
    """
    out_features, in_features = p.shape
    least = p.block // math.gcd(p.block, in_features)  # rows that are whole blocks together
    rows = math.ceil(max(1, DENSE // in_features, beside // in_features) / least) * least
    if rows >= out_features or p.codes.device.type != "cpu":
        yield slice(0, out_features), nf4.unpack(p, dtype)
        return
    codes, absmax, per_byte = p.codes.view(-1), scales(p), 1 if p.kind == "int8" else 2
    room = _room(rows * in_features, dtype)
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        first, last = start * in_features, stop * in_features
        W = _fill(room[: last - first], codes[first // per_byte : -(-last // per_byte)], absmax[first // p.block :],
                  p.kind, p.block)  # fmt: skip
        yield slice(start, stop), W.view(-1, in_features)


def kernels(p: Packed) -> ModuleType | None:
    """nf4_triton, where it can unpack this; None: plain tensor code does, which torch.compile fuses by itself."""
    if torch.compiler.is_compiling() or p.codes.device.type not in TRITON or p.kind == "int8":
        return None
    return _tried(p.codes.device)


@functools.cache
def _tried(device: torch.device) -> ModuleType | None:
    """nf4_triton, if Triton is there and gives the right bits on this device."""
    try:
        from . import nf4_triton
    except ImportError:
        return None
    try:
        nf4_triton.try_out(device)
    except Exception as error:  # no C compiler for what starts the kernels, a GPU that is too old for them, …
        warnings.warn(f"Triton's kernels do not run on {device} ({error}); plain tensor code unpacks weights there, "
                      "which is slower and takes more memory", stacklevel=2)  # fmt: skip
        return None
    return nf4_triton


def _room(n: int, dtype: torch.dtype) -> Tensor:
    """(n,) fresh memory on a CPU, from numpy: where n is large it asks Linux for huge pages. To get 64 MiB in pages of
    4 KiB, each cleared when it is first touched, takes longer than to unpack a matrix into them."""
    return torch.from_numpy(np.empty(n * dtype.itemsize, np.uint8)).view(dtype)


def _fill(out: Tensor, codes: Tensor, absmax: Tensor, kind: str, block: int) -> Tensor:
    """`out` (n,) with level[code] · absmax of weights that begin with a block, by parts that fit a CPU core's cache.

    The two weights of a byte move as one complex number: that is 8 bytes for torch, whatever they mean.
    """
    table = tables(kind, out.device).weights
    per_byte, one = table.shape[1], torch.float32 if kind == "int8" else torch.complex64
    for start in range(0, len(out), step := max(at_a_time(), block)):
        here = out[start : start + step]
        code = codes[start // per_byte : (start + step) // per_byte].int()
        values = here
        if here.dtype != torch.float32 or len(here) % per_byte:
            values = here.new_empty(len(code) * per_byte, dtype=torch.float32)
        torch.index_select(table.view(one).view(-1), 0, code, out=values.view(one))
        rescale(values, absmax[start // block :], block)
        if values is not here:
            here.copy_(values[: len(here)])
    return out
