"""Packed weights on a GPU: Triton kernels that unpack a matrix, or multiply by it without ever writing it out.

A GPU computes far faster than it reads its memory, so what a step reads and writes is what it costs. For a weight in
bfloat16, plain tensor code writes and reads float32 copies on its way; `dequantize` reads half a byte and writes the
two of the finished weight. `matmul` reads the half byte alone: W is only ever in registers, a few numbers at a time.
That wins while x has few rows, as in generation; with many, a dense W and the GPU's matrix units are faster.

Imported by `nf4_fast.kernels`, where there is a GPU, since it needs Triton. The kernels also run on a CPU in Triton's
interpreter (TRITON_INTERPRET=1), slowly: that is how they are tested without a GPU.
Source: Tillet, Kung, Cox 2019, Triton: an intermediate language and compiler for tiled neural network computations.
Names: n weights, (out, in) the layer's shape.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import nf4
from .nf4 import NESTED, Packed

ROWS = 16  # of x, up to which `matmul` is worth it
TILE = 4096  # weights that a program of `dequantize` unpacks: the largest block
WIDE = 512  # weights of a row of W that a program of `matmul` unpacks at a time
OUT = 4  # rows of W that a program of `matmul` has, one for each of its four warps
# level · absmax₂ + mean is a product that is rounded, then a sum. One fused instruction would round once: other bits.
ROUND_TWICE = {"enable_fp_fusion": False}


@triton.jit
def _scales(block, inside, absmax, nested_absmax, nested_levels, offset, NESTED: tl.constexpr):
    """The absmax of these blocks; with double quantisation put together from its code. NESTED = 0: there is none."""
    value = tl.load(absmax + block, mask=inside, other=0)
    if NESTED:
        level = tl.load(nested_levels + value.to(tl.int32))
        value = level * tl.load(nested_absmax + block // NESTED, mask=inside, other=0) + tl.load(offset)
    return value


@triton.jit
def _values(codes, inside, levels, scale):
    """Bytes (…, m) -> float32 weights (…, 2m), the high four bits of a byte first. scale: of each run, (…, 1)."""
    byte = tl.load(codes, mask=inside, other=0).to(tl.int32)
    return tl.interleave(tl.load(levels + (byte >> 4)) * scale, tl.load(levels + (byte & 15)) * scale)


@triton.jit
def _dequantize(
    out, codes, levels, absmax, nested_absmax, nested_levels, offset, n, n_bytes,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """Each program unpacks BLOCKS blocks of W, which is taken as one long row."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    scale = _scales(block, block * BLOCK < n, absmax, nested_absmax, nested_levels, offset, NESTED)
    byte = (block * (BLOCK // 2))[:, None] + tl.arange(0, BLOCK // 2)[None, :]
    W = _values(codes + byte, byte < n_bytes, levels, scale[:, None])
    weight = (block * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    tl.store(out + weight, W.to(out.dtype.element_ty), mask=weight < n)


@triton.jit
def _matmul(
    y, x, codes, levels, absmax, nested_absmax, nested_levels, offset, rows, out_features, in_features,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """y[row, o] = Σₖ x[row, k]·W[o, k]: each program has OUT rows of W and goes along them, RUNS runs at a time.

    A run is RUN weights of one row and of one block.
    """
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    column = tl.arange(0, ROWS)
    total = tl.zeros((OUT, ROWS), tl.float32)
    for start in range(0, in_features, RUNS * RUN):
        first = start + tl.arange(0, RUNS) * RUN
        inside = (o < out_features)[:, None] & (first < in_features)[None, :]
        weight = o.to(tl.int64)[:, None] * in_features + first[None, :]  # where the run begins in the one long row
        scale = _scales(weight // BLOCK, inside, absmax, nested_absmax, nested_levels, offset, NESTED)
        byte = (weight // 2)[:, :, None] + tl.arange(0, RUN // 2)[None, None, :]
        W = _values(codes + byte, inside[:, :, None], levels, scale[:, :, None])
        k = first[:, None] + tl.arange(0, RUN)[None, :]
        for row in range(rows):
            z = tl.load(x + row * in_features + k, mask=(first < in_features)[:, None], other=0).to(tl.float32)
            part = tl.sum(tl.reshape(W * z[None, :, :], (OUT, RUNS * RUN)), 1)
            total += tl.where(column[None, :] == row, part[:, None], 0.0)
    where = column[None, :] * out_features + o[:, None]
    tl.store(y + where, total.to(y.dtype.element_ty), mask=(column < rows)[None, :] & (o < out_features)[:, None])


def dequantize(p: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """What `nf4.unpack` gives, bit for bit. Not for "int8", whose codes take a byte."""
    out = torch.empty(p.shape, dtype=dtype or p.dtype, device=p.codes.device)
    n = out.numel()
    with torch.cuda.device_of(out):
        _dequantize[(triton.cdiv(n, TILE),)](
            out, *_read(p), n, len(p.codes), BLOCK=p.block, BLOCKS=TILE // p.block, NESTED=_nested(p), **ROUND_TWICE
        )
    return out


def multiplies(p: Packed, x: Tensor) -> bool:
    """Whether `matmul` does x·Wᵀ: few rows, and rows of W that begin with a whole byte."""
    fits = x.shape[-1] == p.shape[1] and 0 < x.numel() <= ROWS * p.shape[1]
    return fits and p.shape[1] % 2 == 0 and x.dtype in nf4.FLOATS


def matmul(x: Tensor, p: Packed) -> Tensor:
    """x·Wᵀ, (..., in) -> (..., out), for an x that it `multiplies`, in its dtype. Unlike in F.linear with an unpacked
    matrix, W is never rounded to that dtype. No gradient."""
    out_features, in_features = p.shape
    rows = x.numel() // in_features
    y = torch.empty(*x.shape[:-1], out_features, dtype=x.dtype, device=x.device)
    run = min(math.gcd(p.block, in_features), WIDE)
    runs = min(WIDE, triton.next_power_of_2(in_features)) // run
    with torch.cuda.device_of(x):
        _matmul[(triton.cdiv(out_features, OUT),)](
            y, x.contiguous(), *_read(p), rows, out_features, in_features, BLOCK=p.block, NESTED=_nested(p),
            RUN=run, RUNS=runs, OUT=OUT, ROWS=triton.next_power_of_2(rows),
        )  # fmt: skip
    return y


def try_out(device: torch.device) -> None:
    """RuntimeError, or what the compiler raises, if the kernels do not give a CPU's numbers on this device."""
    p = nf4.pack(torch.arange(4096, dtype=torch.float32).sin().view(32, 128))
    there = p._replace(**{name: t.to(device) for name, t in p._asdict().items() if isinstance(t, Tensor)})
    for dtype in nf4.FLOATS:
        W = nf4.unpack(p, dtype)
        y = matmul(torch.ones(1, 128, dtype=dtype, device=device), there).cpu()
        if not torch.equal(dequantize(there, dtype).cpu(), W) or (y - W.float().sum(1)).abs().max() > 1:
            raise RuntimeError(f"they unpack other values in {dtype}")


def _read(p: Packed) -> tuple[Tensor, ...]:
    """What the kernels read; without double quantisation any tensor stands in for its three, which they leave alone."""
    nested = [p.absmax if t is None else t for t in p[2:5]]
    return p.codes, _levels(p.kind, p.codes.device), p.absmax, *nested


def _nested(p: Packed) -> int:
    return 0 if p.nested_absmax is None else NESTED


@functools.cache
def _levels(kind: str, device: torch.device) -> Tensor:
    levels = nf4.levels(kind)
    return F.pad(levels, (0, 16 - len(levels))).to(device)  # four bits can name 16, and "int4" has 15
