"""Exercises of 03_adapters: the bottleneck, its count, Kronecker products, and attention over adapters.

Shapes: h (n, D) are the outputs of a frozen layer for n tokens; matrices as torch stores them, (out, in).
"""

import torch

from ._frame import exercise, prediction

LESSON = "03_adapters"


def _bottlenecks() -> list[tuple]:
    """(h, W_down, c_down, W_up, c_up), the last with a bottleneck as wide as h, where shapes catch nothing."""
    g = torch.Generator().manual_seed(0)

    def case(n, D, b):
        return tuple(torch.randn(shape, generator=g) for shape in ((n, D), (b, D), (b,), (D, b), (D,)))

    return [case(5, 12, 3), case(2, 8, 1), case(4, 6, 6)]


@exercise(LESSON, "squeeze h to (n, b), bend it with torch.relu, spread it to (n, D), add that to h", _bottlenecks)
def bottleneck_forward(h, W_down, c_down, W_up, c_up):
    """Return h + W_up relu(W_down h + c_down) + c_up for each row of h.

    Shapes: h (n, D), W_down (b, D), c_down (b,), W_up (D, b), c_up (D,); the answer is (n, D).
    """
    return h + torch.relu(h @ W_down.T + c_down) @ W_up.T + c_up


@bottleneck_forward.mistake("the way around is missing: h is added, so that a bottleneck of zeros changes nothing")
def _no_skip(h, W_down, c_down, W_up, c_up):
    return torch.relu(h @ W_down.T + c_down) @ W_up.T + c_up


@bottleneck_forward.mistake("nothing bends here: without relu the two matrices are one of rank b, and could be merged")
def _no_bend(h, W_down, c_down, W_up, c_up):
    return h + (h @ W_down.T + c_down) @ W_up.T + c_up


@bottleneck_forward.mistake("relu comes too late: it stands between the two layers, not behind them")
def _bend_last(h, W_down, c_down, W_up, c_up):
    return h + torch.relu((h @ W_down.T + c_down) @ W_up.T + c_up)


@bottleneck_forward.mistake("relu comes too early: it bends what comes out of W_down, not h")
def _bend_first(h, W_down, c_down, W_up, c_up):
    return h + (torch.relu(h) @ W_down.T + c_down) @ W_up.T + c_up


@bottleneck_forward.mistake("the biases are missing")
def _no_biases(h, W_down, c_down, W_up, c_up):
    return h + torch.relu(h @ W_down.T) @ W_up.T


@bottleneck_forward.mistake("the sum is bent too: h is added behind relu, untouched")
def _bend_all(h, W_down, c_down, W_up, c_up):
    return torch.relu(h + (h @ W_down.T + c_down) @ W_up.T + c_up)


@bottleneck_forward.mistake("the matrices are not transposed: torch stores (out, in), so rows of h give h W_downᵀ")
def _not_transposed(h, W_down, c_down, W_up, c_up):
    return h + torch.relu(h @ W_down + c_down) @ W_up + c_up


def _models() -> list[tuple]:
    return [(768, 64, 12, 2), (768, 64, 12, 1), (1024, 8, 24, 2), (192, 12, 6, 1)]


@exercise(LESSON, "per adapter: W_down (b, D), its bias (b,), W_up (D, b), its bias (D,)", _models)
def adapter_count(D, b, blocks, per_block):
    """Return the number of trained parameters of a model of `blocks` blocks with `per_block` adapters each.

    Each adapter has a bottleneck of width b behind a layer of width D, and a bias in both of its layers.
    """
    return blocks * per_block * (2 * D * b + b + D)


@adapter_count.mistake("the biases are missing: one of width b, one of width D")
def _count_no_biases(D, b, blocks, per_block):
    return blocks * per_block * 2 * D * b


@adapter_count.mistake("there is one adapter a block counted here; Houlsby has two")
def _count_one(D, b, blocks, per_block):
    return blocks * (2 * D * b + b + D)


@adapter_count.mistake("this is one adapter; there are blocks × per_block of them")
def _count_single(D, b, blocks, per_block):
    return 2 * D * b + b + D


@adapter_count.mistake("this is one way only: W_up has as many numbers as W_down")
def _count_down(D, b, blocks, per_block):
    return blocks * per_block * (D * b + b)


@adapter_count.mistake("this counts D × D matrices; that they are thin is the whole idea")
def _count_square(D, b, blocks, per_block):
    return blocks * per_block * (2 * D * D + 2 * D)


@adapter_count.mistake("both biases are counted as wide as D; that of the lower layer has b numbers")
def _count_wide_biases(D, b, blocks, per_block):
    return blocks * per_block * (2 * D * b + 2 * D)


def _factors() -> list[tuple]:
    """(A, s, t): A (n, n, n), s (n, p, 1), t (n, 1, q)."""
    g = torch.Generator().manual_seed(1)
    sizes = (2, 3, 4), (3, 2, 2), (4, 6, 1)
    return [tuple(torch.randn(shape, generator=g) for shape in ((n, n, n), (n, p, 1), (n, 1, q))) for n, p, q in sizes]


@exercise(LESSON, "torch.kron(A[i], s[i] @ t[i]) for each i, and the sum of these", _factors)
def kronecker_weight(A, s, t):
    """Return W = Σᵢ Aᵢ ⊗ (sᵢ tᵢ), of shape (n·p, n·q).

    Shapes: A (n, n, n) holds n matrices (n, n); s (n, p, 1) and t (n, 1, q) hold n thin factors each.
    """
    return sum(torch.kron(A[i], s[i] @ t[i]) for i in range(len(A)))


@kronecker_weight.mistake("the order is swapped: A ⊗ B has a copy of B for each entry of A, and A is the outer one")
def _kron_swapped(A, s, t):
    return sum(torch.kron(s[i] @ t[i], A[i]) for i in range(len(A)))


@kronecker_weight.mistake("this is the first term alone: sum over all n of them")
def _kron_first(A, s, t):
    return torch.kron(A[0], s[0] @ t[0])


@kronecker_weight.mistake("the sums are taken first: the Kronecker product of two sums is not the sum of the products")
def _kron_of_sums(A, s, t):
    return torch.kron(A.sum(0), (s @ t).sum(0))


@kronecker_weight.mistake("the mean is taken; the formula has a sum")
def _kron_mean(A, s, t):
    return sum(torch.kron(A[i], s[i] @ t[i]) for i in range(len(A))) / len(A)


@kronecker_weight.mistake("it is transposed: W is (n·p, n·q), rows of s and columns of t")
def _kron_transposed(A, s, t):
    return sum(torch.kron(A[i], s[i] @ t[i]) for i in range(len(A))).T


def _fusions() -> list[tuple]:
    """(h, z, Q, K, V): D = 6 and N = 2, 3 adapters; in the last, all adapters say the same."""
    g = torch.Generator().manual_seed(2)

    def case(N, n, D):
        return [torch.randn(shape, generator=g) for shape in ((n, D), (N, n, D), (D, D), (D, D), (D, D))]

    same = case(2, 3, 4)
    same[1][1] = same[1][0]
    return [tuple(case(2, 5, 6)), tuple(case(3, 4, 6)), tuple(same)]


@exercise(LESSON, "scores (N, n): sum over D of (h Qᵀ) · (z Kᵀ); softmax over the N adapters, dim=0", _fusions)
def fuse(h, z, Q, K, V):
    """Return h + Σᵢ αᵢ V zᵢ, where αᵢ is the softmax over the adapters i of (Q h)·(K zᵢ), for each token.

    Shapes: h (n, D), z (N, n, D) with what each of N adapters adds to h, Q, K, V (D, D); the answer is (n, D).
    """
    alpha = torch.softmax(((h @ Q.T) * (z @ K.T)).sum(-1), dim=0)
    return h + (alpha[..., None] * (z @ V.T)).sum(0)


@fuse.mistake("the softmax runs over the tokens; for each token, the shares of the adapters add up to one: dim=0")
def _fuse_over_tokens(h, z, Q, K, V):
    alpha = torch.softmax(((h @ Q.T) * (z @ K.T)).sum(-1), dim=1)
    return h + (alpha[..., None] * (z @ V.T)).sum(0)


@fuse.mistake("there is no softmax: these scores are no shares")
def _fuse_no_softmax(h, z, Q, K, V):
    score = ((h @ Q.T) * (z @ K.T)).sum(-1)
    return h + (score[..., None] * (z @ V.T)).sum(0)


@fuse.mistake("this is the average: Q and K have no say")
def _fuse_average(h, z, Q, K, V):
    return h + (z @ V.T).mean(0)


@fuse.mistake("h is missing: the mixture is added to it")
def _fuse_no_skip(h, z, Q, K, V):
    return fuse.reference(h, z, Q, K, V) - h


@fuse.mistake("V is missing: it is applied to what each adapter says")
def _fuse_no_value(h, z, Q, K, V):
    return fuse.reference(h, z, Q, K, torch.eye(len(V)))


@fuse.mistake("Q and K are swapped: the query comes from h, the keys from the adapters")
def _fuse_swapped(h, z, Q, K, V):
    return fuse.reference(h, z, K, Q, V)


folds = prediction(
    "folds",
    LESSON,
    "Which of these can be folded into the weights after training, so that it costs nothing at inference?",
    right="LoRA",
    why="Its change B A x is linear in x, so W + B A is a weight. A relu between two matrices is no matrix.",
    wrong={
        "Houlsby": "it reads h = W x and adds W_up relu(W_down h): is there a matrix that does the same to every x?",
        "parallel": "it stands beside the layer, as LoRA does, but what stands between its two matrices?",
        "all": "two of them bend their input with relu. Can one matrix bend?",
        "none": "one of them is linear in x, so it is a matrix, and matrices can be added",
    },
)
