"""Exercises of 06_counting: a Llama's parameters from its config, and the rank that a budget allows."""

from ._frame import exercise

LESSON = "06_counting"


def _llamas() -> list[tuple]:
    """Llama 2 7B; Llama 3.2 1B, which shares keys and values among heads and ties its output; a small one."""
    return [
        (4096, 11008, 32, 4096, 32000, False),
        (2048, 8192, 16, 512, 128256, True),
        (192, 512, 6, 96, 4096, False),
    ]


@exercise(LESSON, "embeddings, blocks of 4 + 3 matrices and 2 norms, a last norm, an output layer unless tied", _llamas)
def llama_parameters(d, m, layers, d_kv, vocabulary, tied):
    """Return the number of parameters of a Llama.

    d is its width, m the width inside the feed-forward net, d_kv that of the keys and of the values. A norm has d
    weights; two are in each block and one after the last. If tied, the output layer is the embedding. No biases.
    """
    attention = 2 * d * d + 2 * d * d_kv
    feed_forward = 3 * d * m
    return (1 if tied else 2) * vocabulary * d + layers * (attention + feed_forward + 2 * d) + d


@llama_parameters.mistake("the output layer is a matrix of its own unless it is tied: count it then")
def _no_head(d, m, layers, d_kv, vocabulary, tied):
    return llama_parameters.reference(d, m, layers, d_kv, vocabulary, True)


@llama_parameters.mistake("a tied output layer is the embedding itself: one tensor, to be counted once")
def _head_always(d, m, layers, d_kv, vocabulary, tied):
    return llama_parameters.reference(d, m, layers, d_kv, vocabulary, False)


@llama_parameters.mistake("keys and values have d_kv outputs, not d: heads may share them")
def _full_keys(d, m, layers, d_kv, vocabulary, tied):
    return llama_parameters.reference(d, m, layers, d, vocabulary, tied)


@llama_parameters.mistake("a Llama's feed-forward net has three matrices: gate, up and down")
def _two_matrices(d, m, layers, d_kv, vocabulary, tied):
    return llama_parameters.reference(d, m, layers, d_kv, vocabulary, tied) - layers * d * m


@llama_parameters.mistake("the norms are missing: two in each block, one after the last, d weights each")
def _no_norms(d, m, layers, d_kv, vocabulary, tied):
    return llama_parameters.reference(d, m, layers, d_kv, vocabulary, tied) - (2 * layers + 1) * d


@llama_parameters.mistake("one norm is missing: that after the last block")
def _no_last_norm(d, m, layers, d_kv, vocabulary, tied):
    return llama_parameters.reference(d, m, layers, d_kv, vocabulary, tied) - d


def _budgets() -> list[tuple]:
    """Q and v of Llama 2 7B; all linear layers of a block of it; a narrow layer that limits the rank."""
    block = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    return [([(4096, 4096)] * 64, 30_000_000), (block * 32, 30_000_000), ([(512, 512), (6, 512)], 1_000_000)]


@exercise(LESSON, "rank r costs r·(out + in) on each layer, and is at most the smaller side of each", _budgets)
def largest_rank(shapes, budget):
    """Return the largest rank r with which LoRA on layers of these shapes trains at most `budget` parameters.

    shapes is a list of (out, in). No rank may be larger than the smaller side of any of the layers.
    """
    affordable = budget // sum(rows + columns for rows, columns in shapes)
    return min([affordable, *(min(shape) for shape in shapes)])


@largest_rank.mistake("a product of rank r has r·(out + in) parameters, not r·out·in: that is what makes it small")
def _area(shapes, budget):
    return min([budget // sum(o * i for o, i in shapes), *(min(s) for s in shapes)])


@largest_rank.mistake("the budget is for all layers together, not for each of them")
def _one_layer(shapes, budget):
    return min([budget // max(o + i for o, i in shapes), *(min(s) for s in shapes)])


@largest_rank.mistake("at most the budget: round down, so that it is kept")
def _round_up(shapes, budget):
    return min([-(-budget // sum(o + i for o, i in shapes)), *(min(s) for s in shapes)])


@largest_rank.mistake("a rank cannot be larger than the smaller side of a layer; one of these is narrow")
def _no_limit(shapes, budget):
    return budget // sum(o + i for o, i in shapes)


@largest_rank.mistake("both factors are trained: A has r·in parameters and B has r·out")
def _one_factor(shapes, budget):
    return min([budget // sum(i for _, i in shapes), *(min(s) for s in shapes)])
