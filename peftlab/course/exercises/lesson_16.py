"""Exercises of 16_beyond_low_rank: Kronecker and circulant products that are never built, and Cayley's rotation."""

import torch

from ._frame import exercise, prediction

LESSON = "16_beyond_low_rank"


def _factors() -> list[tuple]:
    """(W1, W2, x): one vector, a batch of texts, and square factors, where a swap goes unnoticed by the shapes."""
    g = torch.Generator().manual_seed(0)
    sizes = [((2, 3), (4, 5), (15,)), ((3, 2), (2, 4), (2, 3, 8)), ((3, 3), (3, 3), (4, 9))]
    return [tuple(torch.randn(size, generator=g) for size in case) for case in sizes]


@exercise(LESSON, "X = x.unflatten(-1, (m, n)), then W1 @ X @ W2.T, and flatten the last two", _factors)
def kron_apply(W1, W2, x):
    """Return (W1 ⊗ W2) x for each row of x, without building the Kronecker product.

    W1 (l, m), W2 (k, n), x (..., m·n) -> (..., l·k). With a row of x as a matrix X (m, n), filled row by row, the
    answer is W1 X W2ᵀ, read row by row.
    """
    X = x.unflatten(-1, (W1.shape[1], W2.shape[1]))
    return (W1 @ X @ W2.T).flatten(-2)


@kron_apply.mistake("this is W2 ⊗ W1: the first factor says how the blocks are scaled, the second what is in them")
def _swapped(W1, W2, x):
    X = x.unflatten(-1, (W2.shape[1], W1.shape[1]))
    return (W2 @ X @ W1.T).flatten(-2)


@kron_apply.mistake("W2 must be transposed: it acts on the columns of X, from the right")
def _untransposed(W1, W2, x):
    X = x.unflatten(-1, (W1.shape[1], W2.shape[1]))
    return (W1 @ X @ W2).flatten(-2)


@kron_apply.mistake("the numbers are right and their order is not: read the result row by row")
def _by_columns(W1, W2, x):
    X = x.unflatten(-1, (W1.shape[1], W2.shape[1]))
    return (W1 @ X @ W2.T).mT.flatten(-2)


@kron_apply.mistake("the result is still a matrix for each row of x: flatten its last two dimensions")
def _unflattened(W1, W2, x):
    X = x.unflatten(-1, (W1.shape[1], W2.shape[1]))
    return W1 @ X @ W2.T


def _circles() -> list[tuple]:
    g = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(size, generator=g) for size in case) for case in [((6,), (6,)), ((5,), (2, 3, 5))]]


@exercise(LESSON, "torch.fft.rfft of both, a product with one of them conjugated, and irfft with n=len(w)", _circles)
def circulant_apply(w, x):
    """Return C x for each row of x, C circulant with C[i, j] = w[(j − i) mod b], by Fourier transforms.

    w (b,), x (..., b) -> (..., b). Row i of C is w, rolled i places to the right. In frequencies such a product is one
    number by one number: F(C x) = F(x) · conj F(w). F is torch.fft.rfft; b may be odd, so its inverse needs n=b.
    """
    return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(w).conj(), n=len(w))


@circulant_apply.mistake("without the conjugate this is Cᵀ x, a convolution: C's first column is w instead of its row")
def _convolved(w, x):
    return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(w), n=len(w))


@circulant_apply.mistake("the wrong one is conjugated: that reverses the answer. Conjugate F(w)")
def _reversed(w, x):
    return torch.fft.irfft(torch.fft.rfft(x).conj() * torch.fft.rfft(w), n=len(w))


@circulant_apply.mistake("that is x · w entry by entry; the product is of the transforms")
def _plain(w, x):
    return x * w


@circulant_apply.mistake("nothing is to be divided here: irfft has its 1/b already")
def _divided(w, x):
    return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(w).conj(), n=len(w)) / len(w)


def _squares() -> list[tuple]:
    g = torch.Generator().manual_seed(2)
    return [(0.5 * torch.randn(*size, generator=g),) for size in [(3, 3), (4, 5, 5)]] + [(torch.zeros(2, 2),)]


@exercise(LESSON, "S = A − A.mT; torch.linalg.solve(I − S, I + S): the two commute, so their order is free", _squares)
def cayley(A):
    """Return Cayley's rotation (I + S)(I − S)⁻¹ with S = A − Aᵀ.

    A (..., b, b) has any entries and may be a stack of matrices: Aᵀ is A.mT. S is skew-symmetric, Sᵀ = −S, and so the
    answer is orthogonal, to rounding.
    """
    S = A - A.mT
    eye = torch.eye(A.shape[-1])
    return torch.linalg.solve(eye - S, eye + S)


@cayley.mistake("S must be skew-symmetric, A − Aᵀ: with A itself the result is not orthogonal")
def _any(A):
    eye = torch.eye(A.shape[-1])
    return torch.linalg.solve(eye - A, eye + A)


@cayley.mistake("a rotation, but the other way round: I + S is to stand above, and I − S is inverted")
def _backwards(A):
    S = A - A.mT
    eye = torch.eye(A.shape[-1])
    return torch.linalg.solve(eye + S, eye - S)


@cayley.mistake("I − S is to be inverted; (I + S)(I − S) is I − S²")
def _uninverted(A):
    S = A - A.mT
    eye = torch.eye(A.shape[-1])
    return (eye + S) @ (eye - S)


@cayley.mistake("I + 2S is only the beginning of the series: orthogonal for small S alone")
def _first_terms(A):
    S = A - A.mT
    return torch.eye(A.shape[-1]) + 2 * S


hadamard_rank = prediction(
    "hadamard_rank",
    LESSON,
    "B₁A₁ and B₂A₂ are 192 × 192 and have rank 4 each. They are multiplied entry by entry. Which rank does the result "
    "have at most?",
    right="16",
    why="Each is a sum of four products b·aᵀ, and (b·aᵀ) ⊙ (d·cᵀ) = (b ⊙ d)·(a ⊙ c)ᵀ has rank one: 4 × 4 such terms.",
    wrong={
        "4": "so it would be for the matrix product; entry by entry, the terms of one meet those of the other",
        "8": "that is the bound for the sum of the two",
        "192": "not from so few terms: write each matrix as a sum of four products b·aᵀ and multiply out",
    },
)

blind_share = prediction(
    "blind_share",
    LESSON,
    "A method trains 3,072 of 36,864 numbers, at places drawn by chance, and leaves zero elsewhere. At its very best, "
    "which share of ‖ΔW‖² can it hold, on average?",
    right="1/12",
    why="It holds what lies at its places: 3,072 / 36,864. Places known beforehand would be another matter.",
    wrong={
        "1/2": "about what the eight strongest directions hold; but these were chosen with the change in view",
        "1/24": "that is the share of 8 among 192 directions; here count numbers",
        "1": "zeros stay zero: what the change has at the other places is lost",
    },
)
