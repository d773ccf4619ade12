"""Exercises of 02_lora: forward, count, merge, gradients, and the best low-rank approximation.

Shapes: x (..., in), W (out, in), A (r, in), B (out, r), as in torch and in the files of HF PEFT.
"""

import torch

from ._frame import exercise, prediction

LESSON = "02_lora"


def _layers() -> list[tuple]:
    """(x, W, A, B, alpha) with all sizes different, a square layer, and a square layer of full rank.

    The square ones are where a transposed matrix is not caught by its shape.
    """
    g = torch.Generator().manual_seed(0)

    def layer(batch, n_in, n_out, r, alpha):
        shapes = (*batch, n_in), (n_out, n_in), (r, n_in), (n_out, r)
        return *(torch.randn(shape, generator=g) for shape in shapes), alpha

    return [layer((2, 5), 16, 12, 4, 6), layer((3,), 8, 8, 2, 16), layer((5,), 6, 6, 6, 3), layer((), 10, 7, 1, 3)]


@exercise(LESSON, "h = x Wᵀ + (alpha / r) · (x Aᵀ) Bᵀ: follow the shapes (…, in) → (…, r) → (…, out)", _layers)
def lora_forward(x, W, A, B, alpha):
    """Return h = W x + (alpha / r) B A x for each row of x.

    Shapes: x (..., in), W (out, in), A (r, in), B (out, r); the answer is (..., out).
    """
    r = A.shape[0]
    return x @ W.T + (alpha / r) * (x @ A.T @ B.T)


@lora_forward.mistake("the scaling is missing: B A x is multiplied by alpha / r")
def _unscaled(x, W, A, B, alpha):
    return x @ W.T + x @ A.T @ B.T


@lora_forward.mistake("you scale by alpha; the scaling is alpha / r, so that a change of r needs no new learning rate")
def _alpha_not_over_r(x, W, A, B, alpha):
    return x @ W.T + alpha * (x @ A.T @ B.T)


@lora_forward.mistake("the scaling is upside down: alpha / r, not r / alpha")
def _inverse_scaling(x, W, A, B, alpha):
    return x @ W.T + (A.shape[0] / alpha) * (x @ A.T @ B.T)


@lora_forward.mistake("this divides alpha by the wrong size of A: r is its number of rows, A.shape[0]")
def _alpha_over_in(x, W, A, B, alpha):
    return x @ W.T + (alpha / A.shape[1]) * (x @ A.T @ B.T)


@lora_forward.mistake("W is not used: the frozen layer answers too, and the update is added to its answer")
def _no_base(x, W, A, B, alpha):
    return (alpha / A.shape[0]) * (x @ A.T @ B.T)


@lora_forward.mistake("the update is missing: this is the frozen layer alone")
def _base_alone(x, W, A, B, alpha):
    return x @ W.T


@lora_forward.mistake("the update is added to x; it belongs to the layer's answer x Wᵀ, which may have another width")
def _added_to_x(x, W, A, B, alpha):
    return x + (alpha / A.shape[0]) * (x @ A.T @ B.T)


@lora_forward.mistake("A and B are used in the wrong order, and not transposed: x meets A first, as x Aᵀ (…, r)")
def _b_before_a(x, W, A, B, alpha):
    return x @ W.T + (alpha / A.shape[0]) * (x @ B @ A)


@lora_forward.mistake("A and B are not transposed: rows of x times A (r, in) is x Aᵀ, as it is x Wᵀ for W")
def _not_transposed(x, W, A, B, alpha):
    return x @ W.T + (alpha / A.shape[0]) * (x @ A @ B)


@lora_forward.mistake("A and B are swapped: this is x (A B)ᵀ; with ΔW = B A (out, in), x passes A first, then B")
def _swapped(x, W, A, B, alpha):
    return x @ W.T + (alpha / A.shape[0]) * (x @ B.T @ A.T)


@lora_forward.mistake("W is not transposed: torch stores it as (out, in), so rows of x give x Wᵀ")
def _w_not_transposed(x, W, A, B, alpha):
    return x @ W + (alpha / A.shape[0]) * (x @ A.T @ B.T)


def _sizes() -> list[tuple]:
    return [(4096, 4096, 8), (192, 512, 4), (512, 192, 4), (1024, 4096, 1)]


@exercise(LESSON, "A is (r, in) and B is (out, r)", _sizes)
def lora_count(in_features, out_features, r):
    """Return the number of trained parameters that LoRA of rank r adds to one linear layer."""
    return r * (in_features + out_features)


@lora_count.mistake("this is the layer itself, in × out; LoRA trains two thin matrices beside it")
def _whole_layer(in_features, out_features, r):
    return in_features * out_features


@lora_count.mistake("the sizes of A and B are added, not multiplied")
def _product(in_features, out_features, r):
    return r * in_features * out_features


@lora_count.mistake("the whole product (r·in)·(out·r) is no count: add the sizes of A and B")
def _product_of_both(in_features, out_features, r):
    return r * in_features * out_features * r


@lora_count.mistake("this is A alone; B has r × out more")
def _a_only(in_features, out_features, r):
    return r * in_features


@lora_count.mistake("this is B alone; A has r × in more")
def _b_only(in_features, out_features, r):
    return r * out_features


@lora_count.mistake("2·r·in holds for square layers only")
def _square_only(in_features, out_features, r):
    return 2 * r * in_features


@lora_count.mistake("the frozen weight is counted too; only A and B are trained")
def _with_the_base(in_features, out_features, r):
    return in_features * out_features + r * (in_features + out_features)


def _merges() -> list[tuple]:
    return [case[1:] for case in _layers()]


@exercise(LESSON, "x Wᵀ + s·x Aᵀ Bᵀ = x (W + s·B A)ᵀ; return a new tensor", _merges)
def lora_merge(W, A, B, alpha):
    """Return the weight (out, in) of the one linear layer that answers like W with the adapter (A, B) on it.

    W (out, in), A (r, in), B (out, r). W itself stays as it is.
    """
    return W + (alpha / A.shape[0]) * (B @ A)


@lora_merge.mistake("the scaling is missing: alpha / r goes into the merged weight, for nobody multiplies later")
def _merge_unscaled(W, A, B, alpha):
    return W + B @ A


@lora_merge.mistake("you scale by alpha; it is alpha / r")
def _merge_alpha(W, A, B, alpha):
    return W + alpha * (B @ A)


@lora_merge.mistake("the update is transposed: for W (out, in) it is B A; Aᵀ Bᵀ is (in, out)")
def _merge_transposed(W, A, B, alpha):
    return W + (alpha / A.shape[0]) * (A.T @ B.T)


@lora_merge.mistake("this product is A B; the update of W is B A, of shape (out, in)")
def _merge_a_times_b(W, A, B, alpha):
    return W + (alpha / A.shape[0]) * (A @ B)


@lora_merge.mistake("W was changed in place: the base is lost, and a second merge would add the update twice")
def _merge_in_place(W, A, B, alpha):
    W += (alpha / A.shape[0]) * (B @ A)
    return W


@lora_merge.mistake("this is the update alone; the merged weight is W plus it")
def _merge_update_only(W, A, B, alpha):
    return (alpha / A.shape[0]) * (B @ A)


@lora_merge.mistake("the update is subtracted: that is how one would take a merged adapter out again")
def _merge_subtracted(W, A, B, alpha):
    return W - (alpha / A.shape[0]) * (B @ A)


def _updates() -> list[tuple]:
    """(D, r): tall, wide and square matrices; r = 1, in between, and full."""
    g = torch.Generator().manual_seed(1)
    shapes = (12, 8, 3), (7, 11, 2), (6, 6, 1), (6, 6, 3), (9, 4, 4)
    return [(torch.randn(m, n, generator=g), r) for m, n, r in shapes]


@exercise(LESSON, "U, S, Vh = torch.linalg.svd(D, full_matrices=False), then keep r of each and multiply", _updates)
def best_low_rank(D, r):
    """Return the matrix of rank r that is closest to D (m, n) in the sum of squares (Eckart and Young 1936)."""
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    return U[:, :r] * S[:r] @ Vh[:r]


def _svd(D):
    return torch.linalg.svd(D, full_matrices=False)


@best_low_rank.mistake("the singular values are missing: each pair of vectors counts as much as its S says")
def _no_singular_values(D, r):
    U, _, Vh = _svd(D)
    return U[:, :r] @ Vh[:r]


@best_low_rank.mistake("these are the smallest singular values; torch sorts them from large to small: keep the first")
def _smallest(D, r):
    U, S, Vh = _svd(D)
    return U[:, -r:] * S[-r:] @ Vh[-r:]


@best_low_rank.mistake("one direction too many: S[:r] holds exactly r of them")
def _one_too_many(D, r):
    U, S, Vh = _svd(D)
    return U[:, : r + 1] * S[: r + 1] @ Vh[: r + 1]


@best_low_rank.mistake("nothing was cut off: this is D again")
def _everything(D, r):
    return D.clone()


@best_low_rank.mistake("the left vectors are the columns of U: U[:, :r], not rows")
def _rows_of_u(D, r):
    U, S, Vh = _svd(D)
    return U[:r].T * S[:r] @ Vh[:r]


@best_low_rank.mistake("the right vectors are the rows of Vh (it is transposed already): Vh[:r]")
def _columns_of_vh(D, r):
    U, S, Vh = _svd(D)
    return U[:, :r] * S[:r] @ Vh[:, :r].T


@best_low_rank.mistake("these are the first r columns of D and zeros; the best r directions are rarely along the axes")
def _first_columns(D, r):
    kept = torch.zeros_like(D)
    kept[:, :r] = D[:, :r]
    return kept


@best_low_rank.mistake("S is applied twice: once to U or to Vh is enough")
def _values_twice(D, r):
    U, S, Vh = _svd(D)
    return U[:, :r] * S[:r] ** 2 @ Vh[:r]


def _backwards() -> list[tuple]:
    """(x, G, A, B, alpha), the second with B = 0 as at the start of training, the third with both zero."""
    g = torch.Generator().manual_seed(2)

    def case(n, n_in, n_out, r, alpha):
        return [torch.randn(s, generator=g) for s in ((n, n_in), (n, n_out), (r, n_in), (n_out, r))] + [alpha]

    usual, start, zero = case(5, 9, 7, 2, 3), case(4, 6, 6, 3, 12), case(3, 8, 5, 2, 4)
    start[3].zero_(), zero[2].zero_(), zero[3].zero_()
    return [tuple(usual), tuple(start), tuple(zero), tuple(case(6, 4, 4, 4, 2))]


@exercise(LESSON, "with s = alpha / r and z = x Aᵀ (n, r): h = s z Bᵀ, so ∂L/∂B = s Gᵀ z and ∂L/∂z = s G B", _backwards)
def lora_gradients(x, G, A, B, alpha):
    """Return the gradients (of A, of B) of the loss, by hand.

    x (n, in) went into the layer, h = W x + (alpha / r) B A x came out, and G (n, out) is the gradient of the loss
    with respect to h. A (r, in), B (out, r); a gradient has the shape of its matrix.
    """
    s = alpha / A.shape[0]
    return s * B.T @ G.T @ x, s * G.T @ x @ A.T


@lora_gradients.mistake("the scaling alpha / r is missing: it multiplies both gradients")
def _gradients_unscaled(x, G, A, B, alpha):
    return B.T @ G.T @ x, G.T @ x @ A.T


@lora_gradients.mistake("the two are in the wrong order: first the gradient of A, then that of B")
def _gradients_swapped(x, G, A, B, alpha):
    return lora_gradients.reference(x, G, A, B, alpha)[::-1]


@lora_gradients.mistake("they are transposed: a gradient has the shape of its matrix, A (r, in) and B (out, r)")
def _gradients_transposed(x, G, A, B, alpha):
    of_a, of_b = lora_gradients.reference(x, G, A, B, alpha)
    return of_a.T, of_b.T


@lora_gradients.mistake("this averages over the rows; G already holds whatever average the loss takes, so sum")
def _gradients_averaged(x, G, A, B, alpha):
    of_a, of_b = lora_gradients.reference(x, G, A, B, alpha)
    return of_a / len(x), of_b / len(x)


@lora_gradients.mistake("these lead downhill: they are the step with its minus sign, not the gradient")
def _gradients_negative(x, G, A, B, alpha):
    of_a, of_b = lora_gradients.reference(x, G, A, B, alpha)
    return -of_a, -of_b


first_gradient = prediction(
    "first_gradient",
    LESSON,
    "LoRA starts with A random and B = 0. Which of them gets a gradient other than zero in the first step?",
    right="B",
    why="∂L/∂B = s Gᵀ (x Aᵀ) has A as its factor, ∂L/∂A = s Bᵀ Gᵀ x has B, and B is zero. A follows one step later.",
    wrong={
        "A": "the gradient reaches A through B (∂L/∂A = s Bᵀ Gᵀ x), and B is zero. What about B's own?",
        "both": "the gradient of A has Bᵀ as a factor. What is B at the first step?",
        "neither": "the gradient of B has x Aᵀ as a factor, and A is random, not zero",
    },
)

both_zero = prediction(
    "both_zero",
    LESSON,
    "Suppose A = 0 and B = 0 at the start. Which of them gets a gradient other than zero in the first step?",
    right="neither",
    why="Each one's gradient has the other as a factor, so both stay zero for ever: nothing is learnt.",
    wrong={
        "A": "the gradient of A has Bᵀ as a factor, and B is zero",
        "B": "the gradient of B has x Aᵀ as a factor, and now A is zero as well",
        "both": "each one's gradient has the other as a factor. What are both of them here?",
    },
)
