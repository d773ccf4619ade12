"""Exercises of 15_the_lora_family: PiSSA's two parts, DoRA's product, AdaLoRA's budget, and what learns at first."""

import torch

from ._frame import exercise, prediction

LESSON = "15_the_lora_family"


def _weights() -> list[tuple]:
    """(W, r): tall, wide, square."""
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(*shape, generator=g), r) for *shape, r in ((6, 4, 2), (3, 5, 1), (5, 5, 3))]


@exercise(LESSON, "U, S, Vt = torch.linalg.svd(W, full_matrices=False); keep the first r of each", _weights)
def pissa_parts(W, r):
    """Return (trained, frozen): the best approximation of W of rank r, and what it leaves of W.

    W (out, in) -> both (out, in). The first is what PiSSA trains, as a product B·A; their sum is W.
    """
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    trained = U[:, :r] * S[:r] @ Vt[:r]
    return trained, W - trained


@pissa_parts.mistake("the two are swapped: the large singular values are trained, the small ones stay frozen")
def _swapped(W, r):
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    trained = U[:, :r] * S[:r] @ Vt[:r]
    return W - trained, trained


@pissa_parts.mistake("this trains the smallest singular values, which is MiLoRA")
def _smallest(W, r):
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    trained = U[:, -r:] * S[-r:] @ Vt[-r:]
    return trained, W - trained


@pissa_parts.mistake("the frozen part must be what is left, or the model is another one before it learns anything")
def _whole(W, r):
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    return U[:, :r] * S[:r] @ Vt[:r], W


@pissa_parts.mistake("the singular values are missing: U·Vᵀ has all directions alike")
def _no_values(W, r):
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    trained = U[:, :r] @ Vt[:r]
    return trained, W - trained


def _layers() -> list[tuple]:
    """(x, W, A, B, m, s): untrained, so that m is the lengths of W's rows; trained; another scale."""
    g = torch.Generator().manual_seed(1)
    found = []
    for trained, s in ((False, 2.0), (True, 2.0), (True, 0.5)):
        x, W, A, B = (torch.randn(*shape, generator=g) for shape in ((3, 4), (5, 4), (2, 4), (5, 2)))
        m = W.norm(dim=1)
        found.append((x, W, A, B if trained else 0 * B, m * 1.5 if trained else m, s))
    return found


@exercise(LESSON, "V = W + s * B @ A, then m / V.norm(dim=1) for each row; the output is x @ (…).T", _layers)
def dora_forward(x, W, A, B, m, s):
    """Return DoRA's output: the rows of W + s·B·A, each brought to the length that m says, times x.

    x (tokens, in), W (out, in), A (r, in), B (out, r), m (out,), a number s -> (tokens, out).
    """
    V = W + s * B @ A
    return x @ (m / V.norm(dim=1) * V.T)


@dora_forward.mistake("each output has a row of W (out, in) and a length of its own; these are the lengths of columns")
def _columns(x, W, A, B, m, s):
    V = W + s * B @ A
    return m * (x @ (V / V.norm(dim=0)).T)


@dora_forward.mistake("the directions are not brought to length 1 first: m would scale the lengths that are there")
def _unnormalised(x, W, A, B, m, s):
    return m * (x @ (W + s * B @ A).T)


@dora_forward.mistake("only W is normalised: the length of W + s·B·A is another one as soon as B is not zero")
def _old_length(x, W, A, B, m, s):
    return m / W.norm(dim=1) * (x @ (W + s * B @ A).T)


@dora_forward.mistake("the scale s of B·A is missing")
def _unscaled(x, W, A, B, m, s):
    V = W + B @ A
    return x @ (m / V.norm(dim=1) * V.T)


def _schedules() -> list[tuple]:
    """(step, first, last, start, target): before, at the edges, inside and after the schedule."""
    return [(step, 10, 50, 12.0, 4.0) for step in (0, 10, 20, 30, 49, 50, 80)]


@exercise(LESSON, "progress = (step - first) / (last - first), and target + (start - target) * (1 - progress) ** 3",
          _schedules)  # fmt: skip
def adalora_budget(step, first, last, start, target):
    """Return how many ranks a layer has on average after a step: AdaLoRA's cubic schedule.

    `start` until step `first`, `target` from step `last` on. Between them the distance from the target shrinks with the
    third power of what is left of the way: fast at first, then slowly.
    """
    left = 1 - min(max((step - first) / (last - first), 0.0), 1.0)
    return target + (start - target) * left**3


@adalora_budget.mistake("this falls in a straight line; the third power is missing")
def _linear(step, first, last, start, target):
    left = 1 - min(max((step - first) / (last - first), 0.0), 1.0)
    return target + (start - target) * left


@adalora_budget.mistake("the power is on the way that is done, not on what is left: slow at first and fast at the end")
def _late(step, first, last, start, target):
    done = min(max((step - first) / (last - first), 0.0), 1.0)
    return start + (target - start) * done**3


@adalora_budget.mistake("before `first` and after `last` the budget stays: bring the progress into 0…1")
def _unbounded(step, first, last, start, target):
    return target + (start - target) * (1 - (step - first) / (last - first)) ** 3


@adalora_budget.mistake("the whole budget falls to zero; it is the distance from the target that shrinks")
def _to_zero(step, first, last, start, target):
    left = 1 - min(max((step - first) / (last - first), 0.0), 1.0)
    return start * left**3


who_learns_first = prediction(
    "who_learns_first",
    LESSON,
    "LoRA begins with a random A and B = 0. Which of the two has a gradient that is not zero in the very first step?",
    right="only B",
    why="h changes by s·B·A·x, so A's gradient has the factor B, which is zero; B's has the factor A·x, which is not.",
    wrong={
        "only A": "A's gradient is s·Bᵀ·(…), and B is zero",
        "both": "a product's derivative with respect to one factor has the other factor in it, and one of them is zero",
        "none": "then LoRA could never leave its start; with both factors zero it would be so",
    },
)

frozen_a = prediction(
    "frozen_a",
    LESSON,
    "LoRA-FA freezes A and trains B alone. What does a layer of 4096 × 4096 with rank 16 train, beside LoRA?",
    right="half",
    why="LoRA trains r·(in + out), LoRA-FA r·out: half, where in = out.",
    wrong={
        "a quarter": "A and B have the same size here, and one of them is left",
        "the same": "A does not learn, so it has neither gradients nor moments",
        "none": "B still learns: it is what maps the r frozen directions to outputs",
    },
)
