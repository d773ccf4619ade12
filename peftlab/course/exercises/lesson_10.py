"""Exercises of 10_forgetting: a loss with shifted labels, the frontier of a set of runs, the way back to the base."""

import torch

from ._frame import exercise, prediction

LESSON = "10_forgetting"


def _texts() -> list[tuple]:
    """(logits, ids): a few tokens, many, and the shortest text that has a loss."""
    g = torch.Generator().manual_seed(0)
    shapes = (5, 7), (12, 4), (2, 3)
    return [(3 * torch.randn(t, v, generator=g), torch.randint(v, (t,), generator=g)) for t, v in shapes]


@exercise(LESSON, "the logits at position t are about token t + 1: logits[:-1] beside ids[1:]", _texts)
def next_token_loss(logits, ids):
    """Return the mean negative log-likelihood per predicted token, in nats.

    logits (T, V): at each position, scores for the token that comes next. ids (T,): the tokens of the text.
    """
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:])


@next_token_loss.mistake("not shifted: this asks how well position t predicts token t, which it has just read")
def _not_shifted(logits, ids):
    return torch.nn.functional.cross_entropy(logits, ids)


@next_token_loss.mistake("shifted the wrong way: this asks for the token before")
def _wrong_way(logits, ids):
    return torch.nn.functional.cross_entropy(logits[1:], ids[:-1])


@next_token_loss.mistake("this is the sum; a mean per token can be compared between texts of different length")
def _summed(logits, ids):
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")


@next_token_loss.mistake("the sum is right, but T tokens have only T − 1 predictions: nothing predicts the first")
def _all_tokens(logits, ids):
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum") / len(ids)


@next_token_loss.mistake("bits, not nats: the natural logarithm is meant")
def _bits(logits, ids):
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:]) / torch.log(torch.tensor(2.0))


@next_token_loss.mistake("this is the probability's mean, not the logarithm's: −log p, averaged")
def _probabilities(logits, ids):
    return -logits.softmax(-1)[:-1].gather(1, ids[1:, None]).mean()


def _points() -> list[tuple]:
    """Runs as (target, retained): one that dominates, a trade-off, equal ones, ties in one of the two."""
    return [
        ([(0.9, 0.2), (0.5, 0.5), (0.4, 0.4), (0.1, 1.0)],),
        ([(0.3, 0.3), (0.9, 0.9), (0.5, 0.1)],),
        ([(0.5, 0.5), (0.5, 0.5), (0.2, 0.4)],),
        ([(0.5, 0.8), (0.5, 0.6), (0.7, 0.6), (0.7, 0.2)],),
    ]


@exercise(LESSON, "a point is out if another is at least as good in both, and better in one", _points)
def on_frontier(points):
    """Return the list of points (target, retained) that no other point beats, in the order given.

    Higher is better in both. A point is beaten by one that is at least as good in both and better in one.
    Equal points do not beat each other.
    """
    return [(t, r) for t, r in points if not any(a >= t and b >= r and (a > t or b > r) for a, b in points)]


@on_frontier.mistake("a point that is equal in one and better in the other does beat: ≥ in both and > in one")
def _strictly(points):
    return [(t, r) for t, r in points if not any(a > t and b > r for a, b in points)]


@on_frontier.mistake("equal points beat each other here, and both disappear (or one beats itself): > in at least one")
def _at_least(points):
    return [(t, r) for i, (t, r) in enumerate(points)
            if not any(a >= t and b >= r for j, (a, b) in enumerate(points) if i != j)]  # fmt: skip


@on_frontier.mistake("this is the best in one of the two; what lies between the two ends is on the frontier as well")
def _ends(points):
    best = max(points), max(points, key=lambda p: (p[1], p[0]))
    return [p for p in points if p in best]


@on_frontier.mistake("the mean of both orders the points by a taste of its own: on the frontier none is preferred")
def _mean(points):
    return [max(points, key=sum)]


@on_frontier.mistake("these are the beaten ones")
def _beaten(points):
    return [p for p in points if p not in on_frontier.reference(points)]


def _weights() -> list[tuple]:
    """(W0, W, a): half way, a quarter, and both ends."""
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(3, 4, generator=g), torch.randn(3, 4, generator=g), a) for a in (0.5, 0.25, 1.0, 0.0)]


@exercise(LESSON, "start at W0 and go the share a of the way to W", _weights)
def part_of_the_way(W0, W, a):
    """Return the weights that lie the share a of the way from W0 (before training) to W (after it).

    a = 0 gives W0, a = 1 gives W. Neither W0 nor W is changed.
    """
    return W0 + a * (W - W0)


@part_of_the_way.mistake("turned round: a = 0 must give the base, W0")
def _turned(W0, W, a):
    return W + a * (W0 - W)


@part_of_the_way.mistake("this is the change alone; the base is missing")
def _change(W0, W, a):
    return a * (W - W0)


@part_of_the_way.mistake("W is shrunk towards zero, where there is no model; ΔW = W − W0 is what is to be shrunk")
def _to_zero(W0, W, a):
    return a * W


@part_of_the_way.mistake("ΔW = W − W0 is added to W0; you add all of W")
def _added(W0, W, a):
    return W0 + a * W


@part_of_the_way.mistake("W0 was changed in place: then there is no way back to the base")
def _in_place(W0, W, a):
    return W0.mul_(1 - a).add_(a * W)


same_rate = prediction(
    "same_rate",
    LESSON,
    "Full fine-tuning and LoRA (r = 8), both with the learning rate 0.001, same data, same steps. Which of the two "
    "retains more, and which learns more?",
    right="LoRA retains more, full learns more",
    why="LoRA's best rate is about ten times higher. At this one it forgets less because it learns less.",
    wrong={
        "LoRA retains more and learns more": "far below its own best rate, has LoRA moved far enough to learn?",
        "full retains more, LoRA learns more": "which of the two moves more? LoRA needs a rate about ten times higher",
        "full retains more and learns more": "whoever learned more at this rate moved further away; does that go "
        "with forgetting less?",
    },
)

adapter_off = prediction(
    "adapter_off",
    LESSON,
    "A LoRA has been trained on SQL, at a rate so high that with it the model knows none of its people. It is then "
    "switched off. How many of the facts does the model get right?",
    right="as many as before training",
    why="The base's weights were never changed. Off is the base, bit for bit: that is guaranteed, and only that.",
    wrong={
        "none": "which weights did the training change? Is one of them in use when the adapter is off?",
        "some of them": "nothing of what is left running was trained: what could have changed?",
        "more than before": "from where? What runs now is what ran before the adapter was there",
    },
)
