"""Exercises of 14_take_it_home: the order of rotary rows, the alpha that a file needs, what does not travel."""

import torch

from ._frame import exercise, prediction

LESSON = "14_take_it_home"


def _rotary() -> list[tuple]:
    """(W, heads): two heads of four rows, one head, many heads."""
    return [(torch.arange(16.0).reshape(8, 2), 2), (torch.arange(18.0).reshape(6, 3), 1),
            (torch.arange(24.0).reshape(24, 1), 4)]  # fmt: skip


@exercise(LESSON, "W.reshape(heads, 2, d // 2, in): now the two halves are a dimension; swap it with the next", _rotary)
def interleaved(W, heads):
    """Return W with the rows of each head in llama.cpp's order.

    W (heads·d, in) of a query or key projection. transformers turns row j of a head together with row j + d/2 (two
    halves); llama.cpp turns rows 2j and 2j + 1 (neighbours). So within each head the order becomes
    0, d/2, 1, d/2 + 1, 2, …
    """
    return W.reshape(heads, 2, W.shape[0] // heads // 2, W.shape[1]).transpose(1, 2).reshape(W.shape)


@interleaved.mistake("this is the way back: from neighbours to halves")
def _back(W, heads):
    return W.reshape(heads, W.shape[0] // heads // 2, 2, W.shape[1]).transpose(1, 2).reshape(W.shape)


@interleaved.mistake("the halves are those of the whole matrix; each head has its own two halves")
def _one_head(W, heads):
    return W.reshape(2, W.shape[0] // 2, W.shape[1]).transpose(0, 1).reshape(W.shape)


@interleaved.mistake("nothing has moved: a reshape alone keeps the order, the dimensions have to be swapped")
def _same_order(W, heads):
    return W.reshape(heads, 2, -1, W.shape[1]).reshape(W.shape)


@interleaved.mistake("each head stays in its place; here rows of different heads are mixed")
def _heads_moved(W, heads):
    return W.reshape(heads, -1, W.shape[1]).transpose(0, 1).reshape(W.shape)


@exercise(LESSON, "llama.cpp computes alpha_in_the_file / r; set that equal to the scale of training",
          lambda: [(16, 8, False), (16, 16, True), (32, 64, True), (8, 4, True), (10, 5, False)])  # fmt: skip
def alpha_of_file(alpha, r, rslora):
    """Return the number to write as adapter.lora.alpha, so that llama.cpp scales as the training did.

    Training scaled B·A by alpha/r, or with rslora by alpha/√r. llama.cpp divides the number in the file by r, always.
    """
    return alpha * r**0.5 if rslora else alpha


@alpha_of_file.mistake("right for plain LoRA; with rslora the scale was alpha/√r, and llama.cpp will divide by r")
def _plain(alpha, r, rslora):
    return alpha


@alpha_of_file.mistake("this is the scale itself; llama.cpp divides what is in the file by r once more")
def _scale(alpha, r, rslora):
    return alpha / (r**0.5 if rslora else r)


@alpha_of_file.mistake("times r is too much: x / r = alpha/√r gives x = alpha·√r")
def _times_r(alpha, r, rslora):
    return alpha * r if rslora else alpha


@alpha_of_file.mistake("divided instead of multiplied: x / r = alpha/√r gives x = alpha·√r")
def _divided(alpha, r, rslora):
    return alpha / r**0.5 if rslora else alpha


def _ranks() -> list[tuple]:
    return [(8, 64), (4, 16), (100, 256), (64, 32), (17, 64), (16, 16)]


@exercise(LESSON, "the first of 8, 16, 32, … that is at least r; 0 if it is above the server's limit", _ranks)
def slot(r, largest):
    """Return the smallest limit with which a server takes an adapter of rank r, or 0 if that is above `largest`.

    The limit is one of 8, 16, 32, 64, 128, 256. All slots for adapters have its size, and smaller factors are filled up
    with zeros: one adapter of a high rank makes every slot large.
    """
    size = 8
    while size < r:
        size *= 2
    return size if size <= largest else 0


@slot.mistake("a rank that is exactly the limit fits: r = 16 needs no limit of 32")
def _next(r, largest):
    size = 8
    while size <= r:
        size *= 2
    return size if size <= largest else 0


@slot.mistake("above the largest the adapter is refused: 0")
def _no_limit(r, largest):
    size = 8
    while size < r:
        size *= 2
    return size


@slot.mistake("the limit must be at least the rank: cutting an adapter down would change it")
def _too_small(r, largest):
    size = 8
    while size * 2 <= r:
        size *= 2
    return size if r <= largest else 0


travels = prediction(
    "travels",
    LESSON,
    "You send a friend the folder of your LoRA adapter. What else does your friend need to get the same answers?",
    right="the same base and tokenizer",
    why="An adapter is a difference. On another base, even one fine-tuned a little, it means something else.",
    wrong={
        "nothing, it is a model": "adapter_model.safetensors holds A and B; the weights they change are not in it",
        "the training data": "it was needed to make the adapter, not to use it",
        "the same GPU": "the file holds numbers; any device can add them",
    },
)
