"""Exercises of 07_four_bits: weights in blocks, two codes a byte, bits per weight, and what an outlier does.

Shapes: w (n,) weights, level (k,) in ascending order, codes (n,) and packed (n/2,) uint8.
"""

import torch

from ...nf4 import levels
from ._frame import exercise, prediction

LESSON = "07_four_bits"


def _weights() -> list[tuple]:
    """(w, level, block): blocks of very different size; the largest magnitude above zero in some, below in others."""
    g = torch.Generator().manual_seed(0)
    cases = []
    for kind, blocks, block in (("nf4", 4, 8), ("int4", 6, 4), ("nf4", 3, 64)):
        w = torch.randn(blocks, block, generator=g) * 10.0 ** torch.arange(-1, blocks - 1).unsqueeze(1)
        cases.append((w.view(-1), levels(kind), block))
    return cases


@exercise(LESSON, "w.view(-1, block), then the absmax of each row, then the nearest level of each quotient", _weights)
def quantize_blocks(w, level, block):
    """Return what comes back of w (n,) after it was quantised in blocks: level[code] · absmax, (n,).

    A block is `block` consecutive weights; n is a multiple of it. Its absmax is its largest magnitude. Each weight,
    divided by the absmax of its block, becomes the nearest level. level (k,) goes from −1 to 1 in ascending order.
    """
    blocks = w.view(-1, block)
    absmax = blocks.abs().amax(1, keepdim=True)
    code = (blocks / absmax).unsqueeze(-1).sub(level).abs().argmin(-1)
    return (level[code] * absmax).view(-1)


@quantize_blocks.mistake("there is one absmax for all weights: each block has its own")
def _one_scale(w, level, block):
    absmax = w.abs().max()
    return level[(w / absmax).unsqueeze(-1).sub(level).abs().argmin(-1)] * absmax


@quantize_blocks.mistake("this is the largest weight of each block, not the largest magnitude: a negative weight "
                         "that is larger is cut off")  # fmt: skip
def _signed(w, level, block):
    blocks = w.view(-1, block)
    largest = blocks.amax(1, keepdim=True)
    return (level[(blocks / largest).unsqueeze(-1).sub(level).abs().argmin(-1)] * largest).view(-1)


@quantize_blocks.mistake("each weight is rounded down to the level below it; take the nearest one")
def _down(w, level, block):
    blocks = w.view(-1, block)
    absmax = blocks.abs().amax(1, keepdim=True)
    below = torch.searchsorted(level, (blocks / absmax).contiguous(), right=True) - 1
    return (level[below.clamp(min=0)] * absmax).view(-1)


@quantize_blocks.mistake("these are the levels, −1 … 1; times the absmax of each block they are weights")
def _not_scaled_back(w, level, block):
    blocks = w.view(-1, block)
    absmax = blocks.abs().amax(1, keepdim=True)
    return level[(blocks / absmax).unsqueeze(-1).sub(level).abs().argmin(-1)].view(-1)


@quantize_blocks.mistake("these are the codes; look them up in level, and multiply by absmax")
def _codes(w, level, block):
    blocks = w.view(-1, block)
    return (blocks / blocks.abs().amax(1, keepdim=True)).unsqueeze(-1).sub(level).abs().argmin(-1).view(-1)


@quantize_blocks.mistake("a block is `block` weights that follow each other; this takes weights that lie far apart")
def _strided(w, level, block):
    blocks = w.view(block, -1)
    absmax = blocks.abs().amax(0, keepdim=True)
    return (level[(blocks / absmax).unsqueeze(-1).sub(level).abs().argmin(-1)] * absmax).view(-1)


def _codes_cases() -> list[tuple]:
    g = torch.Generator().manual_seed(1)
    drawn = (torch.randint(16, (n,), generator=g, dtype=torch.uint8) for n in (8, 2, 64))
    return [(codes,) for codes in drawn]


@exercise(LESSON, "codes[::2] are the first of each pair, codes[1::2] the second; the first counts 16", _codes_cases)
def pack_codes(codes):
    """Return the bytes (n/2,) that hold codes (n,), 0 … 15, two each: the first of a pair in the high four bits."""
    return codes[::2] * 16 + codes[1::2]


@pack_codes.mistake("the two are swapped: the first code of a pair goes into the high bits, times 16")
def _low_first(codes):
    return codes[::2] + codes[1::2] * 16


@pack_codes.mistake("a byte holds two codes that follow each other, not one of the first half and one of the second")
def _halves(codes):
    first, second = codes.chunk(2)
    return first * 16 + second


@pack_codes.mistake("four bits are a factor of 2⁴ = 16; with 10 or 15, two different pairs give the same byte")
def _fifteen(codes):
    return codes[::2] * 15 + codes[1::2]


@pack_codes.mistake("the sum alone cannot be taken apart again; the first code has to be moved up by four bits")
def _sum(codes):
    return codes[::2] + codes[1::2]


def _packed_cases() -> list[tuple]:
    return [(pack_codes.reference(codes),) for (codes,) in _codes_cases()]


@exercise(LESSON, "the high bits are packed >> 4, the low ones packed & 15; put them side by side again", _packed_cases)
def unpack_codes(packed):
    """Return the codes (n,), 0 … 15, that the bytes (n/2,) hold: the first of each pair in the high four bits."""
    return torch.stack([packed >> 4, packed & 15], 1).view(-1)


@unpack_codes.mistake("the two of each pair are swapped: the first one is in the high bits")
def _swapped(packed):
    return torch.stack([packed & 15, packed >> 4], 1).view(-1)


@unpack_codes.mistake("all first ones come before all second ones: the order is lost; stack, do not concatenate")
def _concatenated(packed):
    return torch.cat([packed >> 4, packed & 15])


@unpack_codes.mistake("the second code still has the first one above it: packed & 15 keeps the low four bits")
def _unmasked(packed):
    return torch.stack([packed >> 4, packed], 1).view(-1)


@unpack_codes.mistake("the first code still stands in the high bits, 16 times too large: packed >> 4 moves it down")
def _unshifted(packed):
    return torch.stack([packed & 240, packed & 15], 1).view(-1)


def _formats() -> list[tuple]:
    """(bits, block, double): NF4 as bitsandbytes and the QLoRA paper have it, other blocks, and 8 bits."""
    four = [(4, 64, False), (4, 64, True), (4, 32, True), (4, 4096, False), (4, 256, True)]
    return [*four, (8, 64, False), (8, 128, True)]


@exercise(LESSON, "how many weights share a scale of 32 bits, and how many share one of 8 bits?", _formats)
def bits_per_weight(bits, block, double):
    """Return how many bits a weight takes, its share of the scales included.

    A code has `bits` bits. Each block of `block` weights has a scale: a float32, or, with double quantisation, a code
    of 8 bits, and 256 of those codes share a float32 of their own.
    """
    if double:
        return bits + 8 / block + 32 / (256 * block)
    return bits + 32 / block


@bits_per_weight.mistake("without the scales nobody knows how large the weights were: add their share")
def _no_scales(bits, block, double):
    return bits


@bits_per_weight.mistake("the 8-bit codes of the scales share a float32 too: 32/(256 · block) bits a weight")
def _no_nested(bits, block, double):
    return bits + (8 if double else 32) / block


@bits_per_weight.mistake("256 scales share a float32, and each serves a block: 256 · block weights share it")
def _nested_per_weight(bits, block, double):
    return bits + (8 / block + 32 / 256 if double else 32 / block)


@bits_per_weight.mistake("the 8-bit codes replace the float32 scales; you count both")
def _both(bits, block, double):
    return bits + 32 / block + (8 / block + 32 / (256 * block) if double else 0)


@bits_per_weight.mistake("the scales are float32 here, 32 bits and not 16")
def _sixteen(bits, block, double):
    return bits + (8 / block + 16 / (256 * block) if double else 16 / block)


@bits_per_weight.mistake("this does not look at double: with it, a scale has 8 bits and a share of a float32")
def _never_double(bits, block, double):
    return bits + 32 / block


after_outlier = prediction(
    "after_outlier",
    LESSON,
    "One weight of a block is made 100 times as large as the largest of the 63 others. NF4's levels next to zero are "
    "-0.09 and 0.08. What do the 63 others come back as?",
    right="all zero",
    why="Divided by the new absmax, each is within 0.01 of zero, and the nearest level of all of them is zero itself.",
    wrong={
        "as before": "their scale is that of the block, and the block's absmax has changed",
        "a little coarser": "divide the others by the new absmax: how far from zero is the largest of them?",
        "100 times too large": "a larger absmax is divided out first and multiplied back in later",
    },
)
