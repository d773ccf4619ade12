"""NF4: weights in four bits, the storage of QLoRA, down to the bits. The layer that computes with them: nf4_layer.py.

A weight matrix is cut into blocks of 64 consecutive weights. A block is scaled by its largest magnitude (absmax) into
−1 … 1, each weight becomes the number of the nearest of 16 levels, and two such codes fill a byte:

    W ≈ level[code] · absmax          4 + 32/64 = 4.5 bits a weight

Double quantisation then packs the absmax values too, after their mean was taken away: 8 bits each, in blocks of 256
with a float32 scale of their own:

    absmax ≈ level₈[code₈] · absmax₂ + mean          4 + 8/64 + 32/(64·256) = 4.127 bits a weight

Codes, scales and values are those of bitsandbytes 0.50 on a CPU, bit for bit.
Source: Dettmers, Pagnoni, Holtzman, Zettlemoyer 2023, QLoRA, arXiv:2305.14314, section 3.
Names: n weights, b blocks, (out, in) the layer's shape.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

OFFSET = 0.9677083  # of the outermost levels: 1 − (1/32 + 1/30)/2, as far as the authors' program writes it out
NESTED = 256  # absmax values in a block of the double quantisation
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STEPS = 65535  # of bitsandbytes' table for 8-bit codes
SMALLEST = 1e-38  # an absmax below it counts as this much, so that its reciprocal is finite
CACHED = 2**17  # weights worked on at a time: float32 copies of them stay in a CPU core's cache
ALONE = 7 * 4096  # the same with more than one thread, see `at_a_time`


# --- the levels -----------------------------------------------------------------------------------------------------


def _nf4() -> Tensor:
    """Quantiles of the normal distribution, eight above zero and seven below it, with zero itself: 16 levels.

    Trained weights look normal, so levels at equal steps of probability are used about equally often. As one code is
    zero, the two sides differ. Float32 steps and float64 quantiles, as the authors' program has them: it is not the
    formula of the paper's equation 4, whose table is another one.
    """
    quantiles = [torch.special.ndtri(torch.linspace(OFFSET, 0.5, n, dtype=torch.float32)[:-1].double()) for n in (9, 8)]
    return torch.cat([quantiles[0], torch.zeros(1), -quantiles[1]]).sort().values.float()


def _fp4() -> Tensor:
    """Sign, two bits of exponent e, one of mantissa m, in this order: ±(2 + m)·2³⁻ᵉ; e = 0 gives 0 and 1/16."""
    half = [0, 1 / 16] + [(2 + m) * 2.0 ** (3 - e) for e in (1, 2, 3) for m in (0, 1)]
    return torch.tensor(half + [-value for value in half], dtype=torch.float32)


def _dynamic() -> Tensor:
    """256 levels that are fine near zero: seven decades, each with twice as many levels as the one below it.

    Source: Dettmers 2015, arXiv:1511.04561, section 2.
    """
    edges = [torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32) for decade in range(7)]
    half = torch.cat([10.0 ** (decade - 6) * ((e[:-1] + e[1:]) / 2) for decade, e in enumerate(edges)])
    return torch.cat([half, -half, half.new_tensor([0.0, 1.0])]).sort().values


with torch.device("cpu"):  # whatever device the import happens under
    LEVELS = {
        "nf4": _nf4(),
        "fp4": _fp4(),
        "int4": torch.arange(-7, 8, dtype=torch.float32),  # even steps, as many below zero as above it
        "int8": torch.arange(-127, 128, dtype=torch.float32),
        "dynamic8": _dynamic(),
    }
for _kind, _values in LEVELS.items():
    LEVELS[_kind] = _values / _values.abs().max()


def levels(kind: str = "nf4") -> Tensor:
    """The values that the codes 0, 1, … stand for, −1 … 1: 16 of "nf4" and "fp4", 15 of "int4", 255 of "int8",
    256 of "dynamic8", the code of the second quantisation. Raises ValueError for another kind."""
    check_kind(kind)
    return LEVELS[kind].clone()


def check_kind(kind: str) -> None:
    """ValueError unless there is such a data type."""
    if kind not in list(LEVELS):
        raise ValueError(f"no data type {kind!r}; there are {', '.join(LEVELS)}")


class Tables(NamedTuple):
    """What packing and unpacking look up, of one kind on one device."""

    levels: Tensor
    bounds: Tensor  # halfway between neighbouring levels
    order: Tensor  # uint8: the code of each level in ascending order, as FP4's bits are in another
    weights: Tensor  # (256, 2) what a byte stands for, two weights side by side: one look-up gives both; int8: (255, 1)


_TABLES: dict[tuple[str, torch.device], Tables] = {}


def tables(kind: str, device: torch.device) -> Tables:
    """Made once. In a plain dict, not by functools.cache: torch.compile shall see tensors, not how they came to be."""
    if (kind, device) not in _TABLES:
        values, byte = LEVELS[kind], torch.arange(256, device="cpu")
        order = torch.argsort(values)
        bounds = (values[order][:-1] + values[order][1:]) / 2
        if (weights := values.unsqueeze(1)).shape[0] <= 16:
            weights = F.pad(values, (0, 16 - len(values)))[torch.stack([byte >> 4, byte & 15], 1)]
        _TABLES[kind, device] = Tables(*[t.to(device) for t in (values, bounds, order.to(torch.uint8), weights)])
    return _TABLES[kind, device]


# --- packing --------------------------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """A weight matrix in few bits: tensors as bitsandbytes stores them, and what it takes to read them."""

    codes: Tensor  # (⌈n/2⌉, 1) uint8: two codes a byte, the first in the high bits; int8: (n, 1), one a byte
    absmax: Tensor  # (b,) float32; with double quantisation its codes, uint8
    nested_absmax: Tensor | None  # (⌈b/256⌉,) float32: scales of the absmax codes; None without double quantisation
    nested_levels: Tensor | None  # (256,) float32: what the absmax codes stand for
    offset: Tensor | None  # () float32: the mean of the absmax values
    shape: tuple[int, ...]
    dtype: torch.dtype  # the weights' own before they were packed
    kind: str
    block: int

    @property
    def bits(self) -> float:
        """Bits a weight takes, with its scales; without the levels and the mean, a few bytes whatever the size."""
        parts = [self.codes, self.absmax] + ([] if self.nested_absmax is None else [self.nested_absmax])
        return 8 * sum(t.nbytes for t in parts) / math.prod(self.shape)


def pack(W: Tensor, block: int = 64, kind: str = "nf4", double: bool = True) -> Packed:
    """Weights of any shape in float32, bfloat16 or float16 -> codes and scales, in blocks along the last dimension.

    block: weights that share a scale, a power of two from 32 to 4096. kind: see `levels`. double: pack the scales too.
    Takes some MiB beside what it returns (double: as much as the codes), and a copy of W if it is not contiguous.
    A tensor on "meta" gives the shapes alone.
    Raises ValueError for a block size, kind or dtype there is not, an empty tensor, or weights NaN or infinite.
    """
    check_pack(W, block, kind)
    flat, per_byte = W.detach().reshape(-1), 1 if kind == "int8" else 2
    count = math.ceil(flat.numel() / block)
    codes = torch.empty(math.ceil(flat.numel() / per_byte), 1, dtype=torch.uint8, device=W.device)
    absmax = torch.empty(count, dtype=torch.float32, device=W.device)
    if not W.is_meta:
        step = max(block, at_a_time() if W.device.type == "cpu" else 2**24)
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step].float()
            scaled = _scale(part, block, absmax[start // block :])
            code = _nearest(scaled, kind)[: len(part) + len(part) % per_byte]
            if per_byte == 2:
                code = code[::2] * 16 + code[1::2]
            codes[start // per_byte :][: len(code), 0] = code
        if not absmax.isfinite().all():
            raise ValueError(not_finite(W))
    whole = Packed(codes, absmax, None, None, None, tuple(W.shape), W.dtype, kind, block)
    return _pack_scales(whole) if double else whole


def at_a_time() -> int:
    """How many weights a CPU works on at a time. torch shares operations on 32,768 numbers and more among its threads;
    on a busy machine these wait for each other at each of thousands, and take a hundred times as long."""
    return CACHED if torch.get_num_threads() == 1 else ALONE


def check_pack(W: Tensor, block: int, kind: str) -> None:
    """ValueError if `pack` cannot take this tensor, whatever its values."""
    if type(block) is not int or block not in BLOCKS:
        raise ValueError(f"block size {block!r} is none of {', '.join(map(str, BLOCKS))}")
    check_kind(kind)
    if kind == "dynamic8":
        raise ValueError(f"'dynamic8' is for scales, not for weights; take {', '.join(k for k in LEVELS if k != kind)}")
    if W.dtype not in FLOATS:
        raise ValueError(f"weights of {W.dtype} cannot be packed; float32, bfloat16 and float16 can")
    if not W.numel():
        raise ValueError(f"there is nothing to pack, its shape is {tuple(W.shape)}")


def not_finite(W: Tensor) -> str:
    """What to say of weights that are NaN or infinite."""
    bad = int((~W.detach().isfinite()).sum())
    return (f"{bad:,} of {W.numel():,} weights are NaN or infinite, so their blocks have no scale; find out where they "
            "come from: the file may be damaged, or a training run diverged")  # fmt: skip


def _scale(part: Tensor, block: int, absmax: Tensor) -> Tensor:
    """Consecutive weights in −1 … 1, a last code's worth of zeros added where they are odd; fills their absmax in.

    bitsandbytes multiplies by the reciprocal, but divides in a block that is not full: the same bits need the same.
    """
    whole = len(part) // block
    blocks = part[: whole * block].view(whole, block)
    torch.amax(blocks.abs(), 1, out=absmax[:whole])
    scaled = (blocks * (1 / absmax[:whole].clamp(min=SMALLEST)).unsqueeze(1)).view(-1)
    if len(rest := part[whole * block :]):
        absmax[whole] = rest.abs().max().clamp(min=SMALLEST)
        scaled = torch.cat([scaled, rest / absmax[whole], rest.new_zeros(len(part) % 2)])
    return scaled


def _nearest(scaled: Tensor, kind: str) -> Tensor:
    """The code of the nearest level, uint8: how many of the bounds between the levels are below the value."""
    _, bounds, order, _ = tables(kind, scaled.device)
    if len(bounds) > 16:
        return torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8)
    below, number = torch.empty_like(scaled), torch.zeros_like(scaled)  # comparing into floats is the fast way
    for bound in bounds.tolist():
        number += torch.gt(scaled, bound, out=below)
    return number.to(torch.uint8) if kind != "fp4" else order[number.int()]


def _pack_scales(p: Packed) -> Packed:
    """Double quantisation: the scales less their mean, as 8-bit codes in blocks of 256.

    bitsandbytes looks its codes up in a table of 65,536 steps from −1 to 1, so a value is rounded to a step before.
    """
    offset = p.absmax.mean()
    if not p.absmax.is_meta and offset.isinf():  # their sum is beyond float32; bitsandbytes would store NaN
        offset = p.absmax.double().mean().float()
    count, (table, bounds, *_) = len(p.absmax), tables("dynamic8", p.absmax.device)
    around = F.pad(p.absmax - offset, (0, -count % NESTED)).view(-1, NESTED)
    nested = around.abs().amax(1)
    scaled = (around * (1 / nested).unsqueeze(1)).clamp(-1, 1)
    step = ((scaled + 1) / 2).double().mul(STEPS).add(0.5).float().floor()  # float64: one rounding, as of a C fma
    code = torch.bucketize(2 * step / STEPS - 1, bounds)
    code = code.masked_fill(scaled.isnan(), 0)  # 0·∞: the mean itself, where all scales are the same or denormal
    return p._replace(absmax=code.view(-1)[:count].to(torch.uint8), nested_absmax=nested, nested_levels=table.clone(),
                      offset=offset)  # fmt: skip


# --- unpacking ------------------------------------------------------------------------------------------------------


def scales(p: Packed) -> Tensor:
    """The absmax of each block, (b,) float32: as stored, or put together again after double quantisation."""
    if p.nested_absmax is None or p.nested_levels is None:
        return p.absmax
    code = F.pad(p.absmax, (0, -len(p.absmax) % NESTED)).int()
    value = p.nested_levels.index_select(0, code).view(-1, NESTED)
    return value.mul_(p.nested_absmax.unsqueeze(1)).add_(p.offset).view(-1)[: len(p.absmax)]


def unpack(p: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """The weights that the codes stand for, level · absmax, in `dtype` (None: their own before they were packed)."""
    dtype, device = dtype or p.dtype, p.codes.device
    if p.codes.is_meta:
        return torch.empty(p.shape, dtype=dtype, device=device)
    if not torch.compiler.is_compiling():
        from . import nf4_fast  # the same bits sooner, where it can

        if (W := nf4_fast.unpack(p, dtype)) is not None:
            return W
    values = tables(p.kind, device).weights[p.codes.view(-1).int()].view(-1)  # level[code]
    return rescale(values, scales(p), p.block)[: math.prod(p.shape)].view(p.shape).to(dtype)


def rescale(values: Tensor, absmax: Tensor, block: int) -> Tensor:
    """Multiply consecutive values by the absmax of their block, in place."""
    whole = len(values) // block
    values[: whole * block].view(whole, block).mul_(absmax[:whole].unsqueeze(1))
    if len(values) % block:
        values[whole * block :].mul_(absmax[whole])
    return values
