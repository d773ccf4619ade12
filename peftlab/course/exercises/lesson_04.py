"""Exercises of 04_prompts_and_prefixes: a prompt before the tokens, attention with a prefix, and what they cost.

Shapes: B batch, T tokens, d width, k prompt length; K and V (T, h) are the keys and values of one head.
"""

import torch

from ._frame import exercise, prediction

LESSON = "04_prompts_and_prefixes"


def _prompts() -> list[tuple]:
    """(P, x, mask): several rows with padding on the left and on the right, one row, and k = T."""
    g = torch.Generator().manual_seed(0)

    def case(batch, k, tokens, d):
        P, x = torch.randn(k, d, generator=g), torch.randn(batch, tokens, d, generator=g)
        return P, x, torch.ones(batch, tokens, dtype=torch.long)

    padded, one, square = case(3, 2, 5, 4), case(1, 3, 4, 6), case(2, 4, 4, 4)
    padded[2][0, :2] = 0
    padded[2][1, 4:] = 0
    return [padded, one, square]


@exercise(LESSON, "P.expand(B, k, d) gives each row the same prompt; torch.cat joins along dim=1, the tokens", _prompts)
def prepend_prompt(P, x, mask):
    """Return (x, mask) with the prompt in front of every row, ready for model(inputs_embeds=x, attention_mask=mask).

    P (k, d) is the prompt, x (B, T, d) the embedded tokens, mask (B, T) is 1 for a token and 0 for padding.
    The answers are (B, k + T, d) and (B, k + T).
    """
    rows, k = len(x), len(P)
    longer = torch.cat([P.expand(rows, -1, -1), x], dim=1)
    return longer, torch.cat([torch.ones(rows, k, dtype=mask.dtype), mask], dim=1)


@prepend_prompt.mistake("the prompt stands behind the tokens: a decoder reads from the left, so nothing would see it")
def _appended(P, x, mask):
    rows, k = len(x), len(P)
    return torch.cat([x, P.expand(rows, -1, -1)], 1), torch.cat([mask, torch.ones(rows, k, dtype=mask.dtype)], 1)


@prepend_prompt.mistake("the mask is 0 at the prompt, so that no token attends to it")
def _masked_out(P, x, mask):
    longer, seen = prepend_prompt.reference(P, x, mask)
    seen[:, : len(P)] = 0
    return longer, seen


@prepend_prompt.mistake("the mask did not grow: it must be as long as the prompt and the tokens together")
def _old_mask(P, x, mask):
    return prepend_prompt.reference(P, x, mask)[0], mask


@prepend_prompt.mistake("the mask is 1 everywhere: where it was 0 there is padding, and it must stay 0")
def _all_ones(P, x, mask):
    longer, seen = prepend_prompt.reference(P, x, mask)
    return longer, torch.ones_like(seen)


@prepend_prompt.mistake("the mask's ones are at the end; they belong where the prompt is, in front")
def _ones_behind(P, x, mask):
    ones = torch.ones(len(x), len(P), dtype=mask.dtype)
    return prepend_prompt.reference(P, x, mask)[0], torch.cat([mask, ones], 1)


@prepend_prompt.mistake("the first tokens were replaced; the prompt comes in addition to them")
def _replaced(P, x, mask):
    longer, seen = prepend_prompt.reference(P, x, mask)
    return longer[:, : x.shape[1]], seen[:, : x.shape[1]]


def _heads() -> list[tuple]:
    g = torch.Generator().manual_seed(1)

    def case(tokens, k, h):
        return tuple(torch.randn(n, h, generator=g) for n in (tokens, tokens, tokens, k, k))

    return [case(5, 3, 4), case(4, 4, 4), case(6, 1, 8)]


def _softmax_over(q, K, V, masked):
    scores = (q @ K.T / q.shape[-1] ** 0.5).masked_fill(masked, -torch.inf)
    return torch.softmax(scores, -1) @ V


@exercise(LESSON, "join P_k with K and P_v with V; every token sees all of the prefix and no later token", _heads)
def prefix_attention(q, K, V, P_k, P_v):
    """Return the output (T, h) of one causal attention head with a prefix.

    q, K, V (T, h) belong to the text's tokens, P_k, P_v (k, h) are the trained keys and values in front of them.
    Scores are q·K/√h; token t sees the whole prefix and the tokens 0…t.
    """
    later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    masked = torch.cat([torch.zeros(len(q), len(P_k), dtype=torch.bool), later], dim=1)
    scores = q @ torch.cat([P_k, K]).T / q.shape[-1] ** 0.5
    return torch.softmax(scores.masked_fill(masked, -torch.inf), dim=-1) @ torch.cat([P_v, V])


@prefix_attention.mistake("this is attention without a prefix: P_k and P_v are not used")
def _no_prefix(q, K, V, P_k, P_v):
    return _softmax_over(q, K, V, torch.ones(len(q), len(q), dtype=torch.bool).triu(1))


@prefix_attention.mistake("tokens see later tokens: the causal mask is missing")
def _not_causal(q, K, V, P_k, P_v):
    return _softmax_over(q, torch.cat([P_k, K]), torch.cat([P_v, V]), torch.zeros(len(q), len(q) + len(P_k)).bool())


@prefix_attention.mistake("the causal triangle begins at the first key, which is now the prefix's: move it right by k")
def _triangle_at_the_prefix(q, K, V, P_k, P_v):
    masked = torch.ones(len(q), len(q) + len(P_k), dtype=torch.bool).triu(1)
    return _softmax_over(q, torch.cat([P_k, K]), torch.cat([P_v, V]), masked)


@prefix_attention.mistake("the scores are not divided by √h")
def _unscaled_scores(q, K, V, P_k, P_v):
    return prefix_attention.reference(q * q.shape[-1] ** 0.5, K, V, P_k, P_v)


@prefix_attention.mistake("two softmaxes were added: prefix and text share one (apart they are LLaMA-Adapter's)")
def _two_softmaxes(q, K, V, P_k, P_v):
    return _no_prefix(q, K, V, P_k, P_v) + torch.softmax(q @ P_k.T / q.shape[-1] ** 0.5, -1) @ P_v


@prefix_attention.mistake("P_k and P_v are swapped: keys are compared with q, values are summed")
def _keys_for_values(q, K, V, P_k, P_v):
    return prefix_attention.reference(q, K, V, P_v, P_k)


def _shapes() -> list[tuple]:
    return [(200, 28, 8, 128), (10, 6, 6, 32), (1, 80, 8, 128), (20, 12, 3, 64)]


@exercise(LESSON, "each layer has k keys and k values, as wide as its key/value heads together", _shapes)
def prefix_count(k, layers, kv_heads, head_width):
    """Return the number of parameters that prefix tuning trains, without an MLP.

    The model has `layers` attention layers with `kv_heads` key/value heads of width `head_width`.
    """
    return 2 * k * layers * kv_heads * head_width


@prefix_count.mistake("this is the keys alone; the values are as many")
def _keys_only(k, layers, kv_heads, head_width):
    return k * layers * kv_heads * head_width


@prefix_count.mistake("this is one layer's; every layer has a prefix of its own")
def _one_layer(k, layers, kv_heads, head_width):
    return 2 * k * kv_heads * head_width


@prefix_count.mistake("this counts one head; each key/value head has a part of the prefix")
def _one_head(k, layers, kv_heads, head_width):
    return 2 * k * layers * head_width


@prefix_count.mistake("this is prompt tuning: k vectors before the first layer, and nothing in the others")
def _prompt_only(k, layers, kv_heads, head_width):
    return k * kv_heads * head_width


zero_prefix = prediction(
    "zero_prefix",
    LESSON,
    "The keys and values of a prefix are all zero. Beside the base's, the output of an attention head is …\n"
    "The answers are 'smaller', 'equal', 'larger', 'zero'.",
    right="smaller",
    why="A key of zeros has the score q·0 = 0, which is not minus infinity: it gets a share of the softmax, and its "
    "value adds nothing. The text's shares sum to less than one.",
    wrong={
        "equal": "a score of zero is not a weight of zero. What is e⁰, and what happens to the other weights?",
        "larger": "the values of the prefix are zero, so they add nothing. What happens to the weights of the text?",
        "zero": "the text's keys are still there. How is the softmax shared out between them and the prefix?",
    },
)
