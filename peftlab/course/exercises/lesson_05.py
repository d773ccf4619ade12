"""Exercises of 05_selective: merging a rescaling, a table with new rows, two counts, and how far a gain can move.

Shapes: W (out, in), b and scale (out,), E (V, d), rows (n, d).
"""

import torch

from ._frame import exercise, prediction

LESSON = "05_selective"


def _layers() -> list[tuple]:
    """(W, b, scale): wide, tall, and two square ones, where rows and columns can be confused without an error."""
    g = torch.Generator().manual_seed(0)
    shapes = (5, 3), (3, 6), (4, 4), (7, 7)
    return [tuple(torch.randn(s, generator=g) for s in ((n_out, n_in), (n_out,), (n_out,))) for n_out, n_in in shapes]


@exercise(LESSON, "each row of W times its factor; and what happens to b?", _layers)
def ia3_merge(W, b, scale):
    """Return (weight, bias) of the one linear layer that answers like scale ⊙ (W x + b).

    W (out, in), b (out,), scale (out,), which the paper calls l. W and b themselves stay as they are.
    """
    return scale[:, None] * W, scale * b


@ia3_merge.mistake("the bias is rescaled too: the factor multiplies all that the layer gives out, W x and b")
def _bias_left(W, b, scale):
    return scale[:, None] * W, b


@ia3_merge.mistake("these are the columns of W: that rescales the inputs, W (scale ⊙ x), as on the feed-forward side")
def _columns(W, b, scale):
    return W * scale, scale * b


@ia3_merge.mistake("scale multiplies; adding it would be a new bias, as in BitFit")
def _added(W, b, scale):
    return W, b + scale


@ia3_merge.mistake("this is the change alone; the merged weight holds the frozen one too, scale ⊙ W")
def _change_only(W, b, scale):
    return (scale[:, None] - 1) * W, (scale - 1) * b


@ia3_merge.mistake("scale is the factor itself, it starts at one: scale ⊙ W, not (1 + scale) ⊙ W")
def _one_more(W, b, scale):
    return (1 + scale)[:, None] * W, (1 + scale) * b


@ia3_merge.mistake("W was changed in place: the frozen layer is lost")
def _in_place(W, b, scale):
    W *= scale[:, None]
    return W, scale * b


def _texts() -> list[tuple]:
    """(ids, E, tokens, rows): tokens in any order, ids with and without them, and one token alone."""
    g = torch.Generator().manual_seed(1)

    def case(ids, vocabulary, width, tokens):
        drawn = torch.randn(vocabulary, width, generator=g), torch.randn(len(tokens), width, generator=g)
        return torch.tensor(ids), drawn[0], torch.tensor(tokens), drawn[1]

    return [case([[1, 7, 3], [7, 0, 2]], 8, 4, [7, 2]), case([5, 1, 5, 4], 6, 3, [5]), case([[2, 3]], 9, 5, [8, 1, 0])]


@exercise(LESSON, "copy the table (E.clone()), put the rows where tokens says, then look up", _texts)
def tokens_forward(ids, E, tokens, rows):
    """Return the embeddings of ids when the vectors of some tokens are replaced: E′[ids].

    ids (...) of any shape, E (V, d); row i of rows (n, d) is the vector of token tokens[i]. E stays as it is.
    """
    table = E.clone()
    table[tokens] = rows
    return table[ids]


@tokens_forward.mistake("E was changed in place: the frozen table is lost, and with it every other adapter's base")
def _table_in_place(ids, E, tokens, rows):
    E[tokens] = rows
    return E[ids]


@tokens_forward.mistake("the rows replace the old vectors; you add them")
def _rows_added(ids, E, tokens, rows):
    table = E.clone()
    table[tokens] += rows
    return table[ids]


@tokens_forward.mistake("tokens is not used: the first rows of the table were replaced, whatever their tokens")
def _first_rows(ids, E, tokens, rows):
    table = E.clone()
    table[: len(rows)] = rows
    return table[ids]


@tokens_forward.mistake("the order is lost: row i belongs to tokens[i], also if the tokens are not sorted")
def _sorted_tokens(ids, E, tokens, rows):
    table = E.clone()
    table[tokens.sort().values] = rows
    return table[ids]


@tokens_forward.mistake("these are the frozen vectors; the rows are not used")
def _frozen(ids, E, tokens, rows):
    return E[ids]


@tokens_forward.mistake("this is the whole new table; look the ids up in it")
def _whole_table(ids, E, tokens, rows):
    table = E.clone()
    table[tokens] = rows
    return table


def _llamas() -> list[tuple]:
    """(layers, d, d_kv, d_ff) of Llama 2 7B, Llama 3 8B (with grouped keys and values) and a small one."""
    return [(32, 4096, 4096, 11008), (32, 4096, 1024, 14336), (6, 192, 192, 512), (3, 64, 16, 128)]


@exercise(LESSON, "two norms of d weights in a block, and a last one; (IA)³: keys, values, inner activations", _llamas)
def llama_counts(layers, d, d_kv, d_ff):
    """Return (LN tuning's, (IA)³'s) number of trained parameters in a Llama.

    Its RMSNorms have d weights and no bias. d_kv is the width of keys and of values, d_ff that of the feed-forward
    network's inner activations.
    """
    return (2 * layers + 1) * d, layers * (2 * d_kv + d_ff)


@llama_counts.mistake("LN tuning: the last norm, behind all blocks, is missing")
def _no_last_norm(layers, d, d_kv, d_ff):
    return 2 * layers * d, layers * (2 * d_kv + d_ff)


@llama_counts.mistake("LN tuning: an RMSNorm has no bias, so it is d numbers a norm and not 2d")
def _with_biases(layers, d, d_kv, d_ff):
    return 2 * (2 * layers + 1) * d, layers * (2 * d_kv + d_ff)


@llama_counts.mistake("LN tuning: there are two norms in a block, one before each half")
def _one_norm(layers, d, d_kv, d_ff):
    return (layers + 1) * d, layers * (2 * d_kv + d_ff)


@llama_counts.mistake("(IA)³: keys and values have width d_kv, which is less than d when heads share them")
def _full_width(layers, d, d_kv, d_ff):
    return (2 * layers + 1) * d, layers * (2 * d + d_ff)


@llama_counts.mistake("(IA)³: the feed-forward vector rescales the inner activations, d_ff of them, not its output")
def _outer(layers, d, d_kv, d_ff):
    return (2 * layers + 1) * d, layers * (2 * d_kv + d)


@llama_counts.mistake("(IA)³: both keys and values are rescaled, each by its own vector")
def _one_of_two(layers, d, d_kv, d_ff):
    return (2 * layers + 1) * d, layers * (d_kv + d_ff)


@llama_counts.mistake("the two are in the wrong order: first LN tuning, then (IA)³")
def _swapped(layers, d, d_kv, d_ff):
    return layers * (2 * d_kv + d_ff), (2 * layers + 1) * d


how_far = prediction(
    "how_far",
    LESSON,
    "A gain starts at 1, and Adam moves each number by about the learning rate per step, at most. With a rate of "
    "0.0001, already high for full fine-tuning of a large model, by how much can a gain have changed after 100 steps?",
    right="1 %",
    why="100 steps of 0.0001 are 0.01. A gain that has to be halved or doubled needs a rate that is far larger.",
    wrong={
        "0.01 %": "that is one step",
        "10 %": "that is a hundred steps with a rate of 0.001",
        "100 %": "one step is about 0.0001 at most; how far do a hundred of them lead?",
    },
)

twice_as_wide = prediction(
    "twice_as_wide",
    LESSON,
    "A model is made twice as wide, d and d_ff both, with as many layers. Leave the embeddings aside. What happens to "
    "the share of parameters that BitFit, LN tuning and (IA)³ train?",
    right="halves",
    why="The vectors grow like d, the matrices like d². So the share goes like 1/d: the larger, the smaller.",
    wrong={
        "doubles": "the number of trained parameters doubles; what does the number of all parameters do?",
        "stays": "vectors have d entries, matrices d · d of them: do both grow alike?",
        "quarters": "the matrices become four times as large, but the vectors grow too",
    },
)
