"""Exercises of 08_qlora: the forward pass through packed weights, the way back, the bytes, and which merge to take.

Shapes: x (..., in), gy (..., out), W and codes (out, in), A (r, in), B (out, r).
"""

import torch

from ...nf4 import levels
from ._frame import exercise, prediction

LESSON = "08_qlora"


def _packed() -> list[tuple]:
    """(x, codes, absmax, level, A, B, s). Blocks run on from row to row; one matrix is square, one has whole rows."""
    g = torch.Generator().manual_seed(0)
    cases = []
    for n_out, n_in, r, block, s in ((12, 16, 4, 32, 2.0), (8, 8, 2, 4, 0.5), (6, 4, 1, 8, 3.0)):
        codes = torch.randint(0, 16, (n_out, n_in), generator=g).to(torch.uint8)
        absmax = torch.rand(n_out * n_in // block, generator=g) + 0.1
        x, A, B = (torch.randn(shape, generator=g) for shape in ((2, 5, n_in), (r, n_in), (n_out, r)))
        cases.append((x, codes, absmax, levels(), A, B, s))
    return cases


@exercise(
    LESSON,
    "level[codes.long()] gives one level a weight; cut them into len(absmax) blocks, scale, and put the shape back",
    _packed,
)
def qlora_forward(x, codes, absmax, level, A, B, s):
    """Return y = x Wᵀ + s · x Aᵀ Bᵀ for each row of x, where W is given by codes.

    codes (out, in) holds the number of each weight's level, absmax (b,) the scale of each block, in the order of
    the weights, row after row. All blocks have the same size. Shapes: x (..., in), level (16,), A (r, in), B (out, r).
    """
    W = (level[codes.long()].view(len(absmax), -1) * absmax.unsqueeze(1)).view(codes.shape)
    return x @ W.T + s * (x @ A.T @ B.T)


@qlora_forward.mistake("the levels are −1 to 1 in each block: multiply each block by its absmax")
def _no_absmax(x, codes, absmax, level, A, B, s):
    return x @ level[codes.long()].T + s * (x @ A.T @ B.T)


@qlora_forward.mistake("a code is not a value: it is the number of a level, so look it up, level[codes.long()]")
def _codes_as_values(x, codes, absmax, level, A, B, s):
    W = (codes.float().view(len(absmax), -1) * absmax.unsqueeze(1)).view(codes.shape)
    return x @ W.T + s * (x @ A.T @ B.T)


@qlora_forward.mistake("a block is a stretch of consecutive weights; here each scale is spread over every b-th weight")
def _strided(x, codes, absmax, level, A, B, s):
    W = (level[codes.long()].view(-1, len(absmax)) * absmax).view(codes.shape)
    return x @ W.T + s * (x @ A.T @ B.T)


@qlora_forward.mistake("the adapter is missing: this is the quantised base alone")
def _base_alone(x, codes, absmax, level, A, B, s):
    return x @ (level[codes.long()].view(len(absmax), -1) * absmax.unsqueeze(1)).view(codes.shape).T


@qlora_forward.mistake("the base is missing: it is frozen and packed, but it still answers")
def _adapter_alone(x, codes, absmax, level, A, B, s):
    return s * (x @ A.T @ B.T)


@qlora_forward.mistake("the scale s belongs to the adapter's part, s · x Aᵀ Bᵀ")
def _unscaled(x, codes, absmax, level, A, B, s):
    W = (level[codes.long()].view(len(absmax), -1) * absmax.unsqueeze(1)).view(codes.shape)
    return x @ W.T + x @ A.T @ B.T


@qlora_forward.mistake("W is (out, in), as torch stores it: rows of x meet Wᵀ")
def _w_not_transposed(x, codes, absmax, level, A, B, s):
    W = (level[codes.long()].view(len(absmax), -1) * absmax.unsqueeze(1)).view(codes.shape)
    return x @ W + s * (x @ A.T @ B.T)


def _gradients() -> list[tuple]:
    """(gy, W, A, B, s), one of them square, where a transposed matrix is not caught by its shape."""
    g = torch.Generator().manual_seed(1)
    sizes = ((5, 12, 16, 4, 2.0), (3, 8, 8, 2, 0.5), (4, 6, 10, 3, 1.5))
    return [
        (*(torch.randn(shape, generator=g) for shape in ((n, out), (out, n_in), (r, n_in), (out, r))), s)
        for n, out, n_in, r, s in sizes
    ]


@exercise(LESSON, "y = x (W + s B A)ᵀ, so ∂L/∂x = gy (W + s B A); compute the second part as (gy B) A", _gradients)
def input_gradient(gy, W, A, B, s):
    """Return ∂L/∂x for y = x Wᵀ + s · x Aᵀ Bᵀ, given gy = ∂L/∂y.

    W is frozen. Shapes: gy (n, out), W (out, in), A (r, in), B (out, r); the answer is (n, in).
    """
    return gy @ W + s * (gy @ B @ A)


@input_gradient.mistake(
    "W is frozen, so it gets no gradient; but the gradient passes through it to the layers below: gy W is missing"
)
def _frozen_blocks(gy, W, A, B, s):
    return s * (gy @ B @ A)


@input_gradient.mistake("x reaches y in two ways: this is the one through W, and the one through A and B is missing")
def _base_way(gy, W, A, B, s):
    return gy @ W


@input_gradient.mistake("the scale s is on the adapter's way in the forward pass, so it is on its way back too")
def _way_back_unscaled(gy, W, A, B, s):
    return gy @ W + gy @ B @ A


@input_gradient.mistake("s is the adapter's alone: gy W is not multiplied by it")
def _all_scaled(gy, W, A, B, s):
    return s * (gy @ W + gy @ B @ A)


@input_gradient.mistake("forward is x Wᵀ, so the way back is gy W, without the transpose")
def _transposed(gy, W, A, B, s):
    return gy @ W.T + s * (gy @ B @ A)


@input_gradient.mistake("forward goes through A and then B; the way back goes through B first: gy B is (n, r)")
def _order(gy, W, A, B, s):
    return gy @ W + s * (gy @ A.T @ B.T)


def _models() -> list[tuple]:
    return [(6_476_005_376, 262_410_240, 159_907_840), (2_752_512, 690_624, 175_104), (1000, 0, 10), (0, 100, 50)]


@exercise(
    LESSON,
    "three sums: packed · bits / 8 with bits = 4 + 8/64 + the second scale's share, dense · 2, trained · (4 + 4 + 8)",
    _models,
)
def qlora_bytes(packed, dense, trained):
    """Return the bytes of weights, gradients and optimizer states while QLoRA trains.

    packed: weights in NF4, blocks of 64, whose scales are quantised again: 8 bits each, and a float32 scale for each
    256 of them. dense: parameters that stay in bfloat16, and frozen. trained: the adapter's numbers, in float32,
    with Adam. No other copies are kept.
    """
    bits = 4 + 8 / 64 + 32 / (64 * 256)
    return packed * bits / 8 + 2 * dense + (4 + 4 + 8) * trained


@qlora_bytes.mistake("4 bits is the code alone: each block of 64 has a scale beside it")
def _no_scales(packed, dense, trained):
    return packed * 4 / 8 + 2 * dense + 16 * trained


@qlora_bytes.mistake("4.127 bits is rounded, and over billions of weights it shows: write 4 + 8 / 64 + 32 / (64 * 256)")
def _rounded_bits(packed, dense, trained):
    return packed * 4.127 / 8 + 2 * dense + (4 + 4 + 8) * trained


@qlora_bytes.mistake("4.5 bits is NF4 with float32 scales; here the scales are quantised too")
def _single(packed, dense, trained):
    return packed * 4.5 / 8 + 2 * dense + 16 * trained


@qlora_bytes.mistake("embeddings and norms are not packed: they are there, at 2 bytes each")
def _all_packed(packed, dense, trained):
    return packed * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + 16 * trained


@qlora_bytes.mistake("this is the adapter as a file; in training, gradients and two Adam states are beside its weights")
def _adapter_file(packed, dense, trained):
    return packed * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + 2 * dense + 4 * trained


@qlora_bytes.mistake("the frozen base gets no gradient and no optimizer states: only what is trained has them")
def _base_trains(packed, dense, trained):
    return packed * ((4 + 8 / 64 + 32 / (64 * 256)) / 8 + 12) + 14 * dense + 16 * trained


@qlora_bytes.mistake("these are bits: divide by 8")
def _bits(packed, dense, trained):
    return packed * (4 + 8 / 64 + 32 / (64 * 256)) + 2 * dense + 16 * trained


which_merge = prediction(
    "which_merge",
    LESSON,
    "LoRA was trained on an NF4 base, and is merged. Which merged model says what the trained one said, up to rounding "
    "in the dtype of its weights: the adapter added to the 'dequantised' weights, the same and then 'requantised', or "
    "added to the 'original' weights, from before they were packed?",
    right="dequantised",
    why="The adapter was trained beside the dequantised weights, so this sum is what it knows. It is dense, though: "
    "the 4 bits are gone.",
    wrong={
        "requantised": "packing rounds every weight of the sum to one of 16 levels, and ΔW is often smaller than the "
        "step between two",
        "original": "more precise weights, but other ones: the adapter has learnt to live with the rounded base, and "
        "part of it corrects just these errors",
        "all": "they are three different weight matrices. To which of them was the adapter fitted?",
    },
)
