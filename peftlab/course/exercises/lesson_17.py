"""Exercises of 17_mixtures_and_routing: Arrow's prototypes and weights, the load of experts, and who should decide."""

import torch

from ._frame import exercise, prediction

LESSON = "17_mixtures_and_routing"


def _factors() -> list[tuple]:
    """(A, B): tall, wide, and one whose A has its longest row where B is small."""
    g = torch.Generator().manual_seed(0)
    found = [(torch.randn(2, 5, generator=g), torch.randn(7, 2, generator=g)),
             (torch.randn(3, 6, generator=g), torch.randn(4, 3, generator=g))]  # fmt: skip
    A, B = torch.randn(2, 6, generator=g), torch.randn(6, 2, generator=g)
    return [*found, (A * torch.tensor([[5.0], [1.0]]), B * torch.tensor([0.1, 1.0]))]


@exercise(LESSON, "torch.linalg.svd(B @ A) gives U, S, Vt; the directions of the input are the rows of Vt", _factors)
def arrow_prototype(A, B):
    """Return Arrow's prototype of a LoRA: the unit vector of the input that B·A stretches most.

    A (r, in), B (out, r) -> (in,), the first right singular vector of B·A. Of v and −v, which are equally good, return
    the one whose entry of the largest size is positive.
    """
    v = torch.linalg.svd(B @ A)[2][0]
    return v * v[v.abs().argmax()].sign()


@arrow_prototype.mistake("this looks at A alone: how far B carries what A has read counts, too")
def _of_a(A, B):
    v = torch.linalg.svd(A)[2][0]
    return v * v[v.abs().argmax()].sign()


@arrow_prototype.mistake("this is a direction of the output, a column of U; a router asks for one of the input")
def _left(A, B):
    u = torch.linalg.svd(B @ A)[0][:, 0]
    return u * u[u.abs().argmax()].sign()


@arrow_prototype.mistake("a unit vector, without the singular value: a large adapter is not to be chosen for its size")
def _long(A, B):
    _, S, Vt = torch.linalg.svd(B @ A)
    return S[0] * Vt[0] * Vt[0][Vt[0].abs().argmax()].sign()


@arrow_prototype.mistake("this is the last direction, which B·A does not stretch at all")
def _last(A, B):
    v = torch.linalg.svd(B @ A)[2][-1]
    return v * v[v.abs().argmax()].sign()


@arrow_prototype.mistake("right up to its sign: see the last sentence of the question")
def _any_sign(A, B):
    v = torch.linalg.svd(B @ A)[2][0]
    return -v * v[v.abs().argmax()].sign()


def _tokens() -> list[tuple]:
    """(x, prototypes, k): tokens of one row, a batch, one expert a token, all experts."""
    g = torch.Generator().manual_seed(0)
    found = []
    for shape, n, k in (((4,), 3, 2), ((2, 3), 4, 2), ((5,), 3, 1), ((3,), 3, 3)):
        v = torch.nn.functional.normalize(torch.randn(n, 6, generator=g), dim=-1)
        found.append((torch.randn(*shape, 6, generator=g), v, k))
    return found


@exercise(LESSON, "scores = (x @ prototypes.T).abs(); topk, softmax over those, and scatter them into zeros", _tokens)
def route(x, prototypes, k):
    """Return Arrow's weights: for each token the softmax over its k largest |v·x|, and 0 for the other experts.

    x (..., in), prototypes (n, in), one v a row -> (..., n). The weights of a token sum to 1.
    """
    scores = (x @ prototypes.T).abs()
    best = scores.topk(k, -1)
    return torch.zeros_like(scores).scatter(-1, best.indices, best.values.softmax(-1))


@route.mistake("v has no sign, so v·x and −v·x must count the same: take the absolute value")
def _signed(x, prototypes, k):
    best = (x @ prototypes.T).topk(k, -1)
    return torch.zeros_like(x @ prototypes.T).scatter(-1, best.indices, best.values.softmax(-1))


@route.mistake("a softmax over all experts leaves the chosen ones less than 1 in sum: first choose, then weigh")
def _late(x, prototypes, k):
    scores = (x @ prototypes.T).abs().softmax(-1)
    best = scores.topk(k, -1)
    return torch.zeros_like(scores).scatter(-1, best.indices, best.values)


@route.mistake("every expert has a share, whatever k is")
def _soft(x, prototypes, k):
    return (x @ prototypes.T).abs().softmax(-1)


@route.mistake("the k chosen ones have equal shares: weigh them by a softmax of their scores")
def _equal(x, prototypes, k):
    scores = (x @ prototypes.T).abs()
    best = scores.topk(k, -1)
    return torch.zeros_like(scores).scatter(-1, best.indices, torch.full_like(best.values, 1 / k))


@route.mistake("the shares are the scores divided by their sum, not their softmax")
def _shares(x, prototypes, k):
    scores = (x @ prototypes.T).abs()
    best = scores.topk(k, -1)
    return torch.zeros_like(scores).scatter(-1, best.indices, best.values / best.values.sum(-1, keepdim=True))


def _probabilities() -> list[tuple]:
    """(p,): drawn; everything to one expert; two experts in turns."""
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(9, 4, generator=g).softmax(-1),),
            (torch.tensor([[0.7, 0.2, 0.1]]).repeat(5, 1),),
            (torch.tensor([[0.6, 0.4], [0.4, 0.6]]).repeat(3, 1),)]  # fmt: skip


@exercise(LESSON, "F: one-hot of p.argmax(-1), mean over the tokens; P: p.mean(0); then n·(F·P).sum()", _probabilities)
def load_balance(p):
    """Return n·Σᵢ Fᵢ·Pᵢ, the load-balance loss of a router.

    p (N, n): each token's probabilities of the n experts. Fᵢ is the share of tokens whose most likely expert is i, Pᵢ
    the mean of pᵢ over the tokens. -> a number: 1 if all is even, up to n if one expert has everything.
    """
    first = torch.zeros_like(p).scatter(-1, p.argmax(-1, keepdim=True), 1.0)
    return p.shape[-1] * (first.mean(0) * p.mean(0)).sum()


@load_balance.mistake("times n, the number of experts, so that an even load gives 1 whatever n is")
def _no_n(p):
    first = torch.zeros_like(p).scatter(-1, p.argmax(-1, keepdim=True), 1.0)
    return (first.mean(0) * p.mean(0)).sum()


@load_balance.mistake("F counts first choices: each token gives 1 to one expert, not its probabilities to all")
def _no_choice(p):
    return p.shape[-1] * p.mean(0).square().sum()


@load_balance.mistake("this is made of choices alone, which have no gradient: one of the two factors is P")
def _no_gradient(p):
    first = torch.zeros_like(p).scatter(-1, p.argmax(-1, keepdim=True), 1.0)
    return p.shape[-1] * first.mean(0).square().sum()


@load_balance.mistake("F and P are means over the tokens, not sums")
def _sums(p):
    first = torch.zeros_like(p).scatter(-1, p.argmax(-1, keepdim=True), 1.0)
    return p.shape[-1] * (first.sum(0) * p.sum(0)).sum()


@load_balance.mistake("first the two means, then their product: the load is a property of all tokens together")
def _token_by_token(p):
    first = torch.zeros_like(p).scatter(-1, p.argmax(-1, keepdim=True), 1.0)
    return p.shape[-1] * (first * p).mean(0).sum()


who_decides = prediction(
    "who_decides",
    LESSON,
    "The same scores can be used in two ways: each token chooses an adapter in each layer, or all tokens and layers of "
    "a question vote, and the winner alone speaks, everywhere. Which answers more of our questions right?",
    right="one vote",
    why="An adapter's layers were trained together. The finer the choice, the more strangers meet in each text.",
    wrong={
        "each token": "it is the finer choice; but who is then together in one pass was never trained together",
        "no difference": "the scores are the same, but in a vote the minority has no say",
        "neither is right at all": "for two of the three tasks, one of them is as good as being told",
    },
)

five_voices = prediction(
    "five_voices",
    LESSON,
    "Five users ask the same questions, each wants another voice, and a router sees the question alone. It may be as "
    "good as you like. How many of all answers can be right at most?",
    right="one in five",
    why="Whatever it chooses for a question, four of the five who ask it wanted another voice.",
    wrong={
        "all": "that would take a router that knows who asks; it sees five times the same text",
        "one in two": "of five different answers to the same question only one can be given",
        "none": "one of the five voices can always be right",
    },
)

minus_one = prediction(
    "minus_one",
    LESSON,
    "LoraHub adds up factors: ΔW = (Σ wᵢBᵢ)·(Σ wᵢAᵢ). For a single adapter, what does w = −1 do?",
    right="the same as w = 1",
    why="The weight stands in both factors, so it is squared; flipping all the signs of a mixture changes nothing.",
    wrong={
        "the opposite": "that is −B·A, as in task arithmetic; here the sign is in both factors",
        "nothing": "w = 0 does nothing",
        "half of it": "−1 times −1 is 1",
    },
)
