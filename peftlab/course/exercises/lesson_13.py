"""Exercises of 13_many_adapters: rows with adapters of their own, what a cache must load, how many users fit."""

import torch

from ._frame import exercise, prediction

LESSON = "13_many_adapters"


def _batches() -> list[tuple]:
    """(x, A, B, rows): every adapter once, one of them often, a single row."""
    g = torch.Generator().manual_seed(0)

    def case(rows: list[int], adapters: int, r: int = 2, wide: int = 5, out: int = 4) -> tuple:
        A, B = torch.randn(adapters, r, wide, generator=g), torch.randn(adapters, out, r, generator=g)
        return torch.randn(len(rows), wide, generator=g), A, B, torch.tensor(rows)

    return [case([2, 0, 1], 3), case([1, 1, 0, 1], 2), case([2], 4)]


@exercise(LESSON, "A[rows] has each row's own A, (n, r, in); then x[:, None] @ A[rows].mT is (n, 1, r)", _batches)
def rows_of_their_own(x, A, B, rows):
    """Return for each row i of x the change of its own adapter: B[rows[i]]·A[rows[i]]·x[i], without a loop.

    x (n, in), A (adapters, r, in), B (adapters, out, r), rows (n,) numbers of adapters -> (n, out).
    """
    return (x[:, None] @ A[rows].mT @ B[rows].mT)[:, 0]


@rows_of_their_own.mistake("every row gets the first adapter: use rows to pick")
def _first(x, A, B, rows):
    return x @ A[0].T @ B[0].T


@rows_of_their_own.mistake("row i gets adapter i modulo their number; rows says which one it asked for")
def _in_order(x, A, B, rows):
    own = torch.arange(len(x)) % len(A)
    return (x[:, None] @ A[own].mT @ B[own].mT)[:, 0]


@rows_of_their_own.mistake("every row gets the sum of all adapters: that is several active at once, not one each")
def _all(x, A, B, rows):
    return torch.einsum("ni,ari,aor->no", x, A, B)


@rows_of_their_own.mistake("A is the row's own, B is not")
def _half(x, A, B, rows):
    return (x[:, None] @ A[rows].mT)[:, 0] @ B[0].T


@rows_of_their_own.mistake("the result has a dimension too many, (n, 1, out): take it away again")
def _wide(x, A, B, rows):
    return x[:, None] @ A[rows].mT @ B[rows].mT


def _requests() -> list[tuple]:
    """(requests, capacity): a hit that saves one, first in first out does worse, room for all, room for one."""
    return [(list("abacb"), 2), (list("abacabad"), 3), (list("abcab"), 3), (list("aabba"), 1), (list("abcdabcd"), 3)]


@exercise(LESSON, "keep a list, the last used at its end; a hit moves there, a miss drops the first if full", _requests)
def loads(requests, capacity):
    """Return how many adapters must be loaded from disk, if memory holds `capacity` of them.

    requests: names, in their order. At the start nothing is loaded. When there is no room, the one that has not been
    used for the longest time goes (least recently used).
    """
    held, count = [], 0
    for name in requests:
        if name in held:
            held.remove(name)
        else:
            count += 1
            if len(held) == capacity:
                held.pop(0)
        held.append(name)
    return count


@loads.mistake("first in, first out: a hit must count as use, or the one that everybody asks for is thrown out")
def _fifo(requests, capacity):
    held, count = [], 0
    for name in requests:
        if name not in held:
            count += 1
            if len(held) == capacity:
                held.pop(0)
            held.append(name)
    return count


@loads.mistake("these are the hits; asked for is how often something has to be loaded")
def _hits(requests, capacity):
    return len(requests) - loads.reference(requests, capacity)


@loads.mistake("this is the number of different names: it forgets that what was thrown out is loaded again")
def _names(requests, capacity):
    return len(set(requests))


@loads.mistake("the most recently used one is thrown out; it is the one most likely to be asked for again")
def _mru(requests, capacity):
    held, count = [], 0
    for name in requests:
        if name in held:
            held.remove(name)
        else:
            count += 1
            if len(held) == capacity:
                held.pop()
        held.append(name)
    return count


def _sizes() -> list[tuple]:
    """(base, memory, adapter): many fit, only the base fits, a remainder, not even the base fits."""
    return [(16_000, 24_000, 20), (13_772_544, 13_772_544, 700_416), (100, 450, 100), (5_000, 4_000, 10)]


@exercise(LESSON, "the base is there once; what is left is divided among the adapters; round down", _sizes)
def users(base, memory, adapter):
    """Return how many users' adapters fit into memory beside one base; 0 if the base alone does not fit.

    All three are bytes: of the base, of the memory, of one adapter.
    """
    return max(memory - base, 0) // adapter


@users.mistake("this gives every user a base of their own")
def _copies(base, memory, adapter):
    return memory // (base + adapter)


@users.mistake("the base has to be in memory too")
def _no_base(base, memory, adapter):
    return memory // adapter


@users.mistake("a negative number of users: if the base does not fit, nobody can be served")
def _negative(base, memory, adapter):
    return (memory - base) // adapter


@users.mistake("a part of an adapter is no use: round down")
def _fraction(base, memory, adapter):
    return max(memory - base, 0) / adapter


many_or_merged = prediction(
    "many_or_merged",
    LESSON,
    "64 users ask at the same moment, each with an adapter of their own. Which way reads the base's weights "
    "from memory the fewest times?",
    right="one mixed batch",
    why="The base computes all 64 rows in one pass; only the small factors differ from row to row.",
    wrong={
        "merge each adapter in turn": "that is 64 batches of one row, and the weights are written 64 times as well",
        "switch adapters, one batch per user": "nothing is written, but the base is still gone through 64 times",
        "64 copies of the model": "64 times the weights: they have to be read too",
    },
)
