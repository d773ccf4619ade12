"""Exercises of 12_merging: two products in one, TIES' election, and what bfloat16 keeps of a small change."""

import torch

from ._frame import exercise, prediction

LESSON = "12_merging"


def _factors() -> list[tuple]:
    """(A1, B1, A2, B2, w1, w2): equal ranks, different ranks, a negative weight."""
    g = torch.Generator().manual_seed(0)

    def pair(r: int, out: int = 5, wide: int = 7) -> tuple:
        return torch.randn(r, wide, generator=g), torch.randn(out, r, generator=g)

    return [(*pair(2), *pair(2), 0.7, 0.3), (*pair(3), *pair(1), 1.0, 0.5), (*pair(2), *pair(2), 1.0, -1.0)]


@exercise(LESSON, "torch.cat: A has one row per rank, B one column per rank; put the weights into B", _factors)
def one_product(A1, B1, A2, B2, w1, w2):
    """Return (A, B) of one LoRA whose change B·A is w1·B1·A1 + w2·B2·A2.

    A1 (r1, in), B1 (out, r1), A2 (r2, in), B2 (out, r2) -> A (r1 + r2, in), B (out, r1 + r2). Leave A1 and A2 as they
    are, the first on top; the weights go into B.
    """
    return torch.cat([A1, A2]), torch.cat([w1 * B1, w2 * B2], dim=1)


@one_product.mistake("the weights stand in both factors, so they count twice: B·A is w1²·B1·A1 + w2²·B2·A2")
def _both(A1, B1, A2, B2, w1, w2):
    return torch.cat([w1 * A1, w2 * A2]), torch.cat([w1 * B1, w2 * B2], dim=1)


@one_product.mistake("the weights are missing")
def _unweighted(A1, B1, A2, B2, w1, w2):
    return torch.cat([A1, A2]), torch.cat([B1, B2], dim=1)


@one_product.mistake("the product is right, but the weights are in A; they were to go into B")
def _in_a(A1, B1, A2, B2, w1, w2):
    return torch.cat([w1 * A1, w2 * A2]), torch.cat([B1, B2], dim=1)


@one_product.mistake("the factors are added, and (B1 + B2)·(A1 + A2) has two terms too many: put them side by side")
def _added(A1, B1, A2, B2, w1, w2):
    return A1 + A2, w1 * B1 + w2 * B2


@one_product.mistake("A and B must have their ranks in the same order: on top in A is on the left in B")
def _crossed(A1, B1, A2, B2, w1, w2):
    return torch.cat([A1, A2]), torch.cat([w2 * B2, w1 * B1], dim=1)


def _changes() -> list[tuple]:
    """Stacks of trimmed changes: the paper's situation in small, a tie of numbers, three of a kind, all zero."""
    return [
        (torch.tensor([[0.6, 0.0, -0.2], [-0.1, 0.3, -0.4], [0.2, 0.0, 0.1]]),),
        (torch.tensor([[0.1, 0.1], [0.2, -0.5], [-0.9, 0.1]]),),
        (torch.tensor([[1.0, 0.0, 0.0], [3.0, 0.0, -2.0]]),),
    ]


@exercise(LESSON, "sign = changes.sum(0).sign(); agreeing = (changes.sign() == sign) & (sign != 0)", _changes)
def elect_and_average(changes):
    """Return TIES' merged change: per entry, the mean of the changes that have the elected sign.

    changes (n, entries): one row per adapter, trimmed already, so 0 means "no opinion". The elected sign of an entry is
    that of the sum over the adapters. Average only entries that are not zero and have that sign; 0 where there is none.
    """
    sign = changes.sum(0).sign()
    agreeing = (changes.sign() == sign) & (sign != 0)
    return (changes * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


@elect_and_average.mistake("this is the plain mean: entries that pull the other way, and zeros, weaken it")
def _mean(changes):
    return changes.mean(0)


@elect_and_average.mistake("divide by how many agree, not by how many adapters there are: a disjoint mean")
def _all(changes):
    sign = changes.sum(0).sign()
    return (changes * (changes.sign() == sign)).sum(0) / len(changes)


@elect_and_average.mistake("the sign is elected by weight, not by heads: one −0.9 outvotes 0.1 and 0.2")
def _heads(changes):
    sign = changes.sign().sum(0).sign()
    agreeing = (changes.sign() == sign) & (sign != 0)
    return (changes * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


@elect_and_average.mistake("this adds those that agree; TIES takes their mean")
def _sum(changes):
    sign = changes.sum(0).sign()
    return (changes * (changes.sign() == sign)).sum(0)


@elect_and_average.mistake("a zero was trimmed away and has no opinion: leave it out of the mean")
def _zeros(changes):
    sign = changes.sum(0).sign()
    agreeing = changes.sign() * sign >= 0
    return (changes * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


into_bfloat16 = prediction(
    "into_bfloat16",
    LESSON,
    "An adapter is merged into weights stored in bfloat16, which has 8 significant bits. A weight is 0.02, its change "
    "0.00001. What happens to most such weights?",
    right="nothing",
    why="Beside 0.02 the next number of bfloat16 is 0.00012 away, and the change is less than half of that: the sum "
    "rounds back to where it was.",
    wrong={
        "the exact sum": "a number with 8 significant bits has two or three decimal digits",
        "half of the change": "a number is rounded to the nearest that can be written, not halfway there",
        "infinity": "bfloat16 has the range of float32; what it lacks is digits",
    },
)

two_voices = prediction(
    "two_voices",
    LESSON,
    "One adapter makes the model speak like a pirate, another like a telegram. Each answers the same questions. Merged "
    "with equal weights, the best of a few, how will the model answer most questions?",
    right="in one voice or in neither",
    why="The same question cannot have two answers. A merge has to choose, or garbles; it cannot know who asks.",
    wrong={
        "in both voices": "an answer is one text: it ends in “Stop.” or in “matey!”",
        "each user in their own voice": "the two ask the same questions, so how should the weights tell them apart?",
        "as the base did": "with weights of 0 it would; with any that are worth their name, both adapters show",
    },
)
