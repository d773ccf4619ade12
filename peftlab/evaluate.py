"""What a model can do, in numbers that carry their uncertainty.

    score = exact_match(model, tokenizer, rows)     # 97.0 % (93.6–98.6, n=200)
    score.by("split")                               # the same, one Score per split
    score.frame()                                   # a pandas table: prompt, expected, got, right

Nothing here changes the model: its train/eval mode comes back as it was, and the active adapters are whatever
the caller chose (`pl.using`).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from .runtime import mode
from .texts import check_decoder_only, context_of, filler, tokens_of

Z95 = 1.959963984540054  # the 97.5 % point of the standard normal distribution
BOOTSTRAP = 1000  # resamples; the ends of a 95 % interval then move by about a tenth of its width


@dataclass(frozen=True)
class Score:
    """A measured figure with its 95 % interval and the number of cases behind it.

    `predictions` holds one dict per case: the columns of its row and, for accuracies, `expected`, `got`, `right`.
    """

    value: float
    low: float
    high: float
    n: int
    unit: str = "%"  # "%": a proportion in [0, 1], shown in percent; anything else is shown as it is
    predictions: list[dict] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def of(cls, predictions: Sequence[Mapping]) -> "Score":
        """The proportion of rows with a true `right`, with Wilson's interval."""
        rows = [dict(row) for row in predictions]
        hits = sum(bool(row["right"]) for row in rows)
        low, high = wilson(hits, len(rows))
        return cls(hits / len(rows), low, high, len(rows), predictions=rows)

    def by(self, column: str) -> "dict[str, Score]":
        """One Score for each value of a column of the rows, in order of first appearance: `score.by("split")`."""
        if not self.predictions or "right" not in self.predictions[0]:
            raise ValueError("only an accuracy can be split by a column; this score has no right/wrong rows")
        groups: dict[str, list[dict]] = {}
        for row in self.predictions:
            if column not in row:
                raise ValueError(f"no column {column!r} in the rows; there are {', '.join(row)}")
            groups.setdefault(row[column], []).append(row)
        return {value: Score.of(rows) for value, rows in groups.items()}

    def frame(self):
        """The predictions as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(self.predictions)

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        scale, digits, unit = (100, 1, "%") if self.unit == "%" else (1, 3, self.unit)
        if math.isnan(self.low):
            return f"{scale * self.value:.{digits}f} {unit} (no interval from one case, n={self.n})"
        low, high = f"{scale * self.low:.{digits}f}", f"{scale * self.high:.{digits}f}"
        return f"{scale * self.value:.{digits}f} {unit} ({low}–{high}, n={self.n})"


def wilson(hits: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval for a proportion: its ends, in [0, 1].

    (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n), with p = hits/n. Unlike p ± z·√(p(1−p)/n) it stays inside
    [0, 1] and keeps a width at p = 0 and p = 1, where small tests often end.
    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22.
    """
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"a proportion needs 0 ≤ hits ≤ n and n ≥ 1; got hits={hits}, n={n}")
    p = hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    # At the two ends the formula gives exactly 0 and 1; rounding must not say otherwise.
    return (0.0 if hits == 0 else low, 1.0 if hits == n else high)


@torch.no_grad()
def generate(
    model: nn.Module, tokenizer, prompts: Sequence[str], max_new_tokens: int = 48, batch_size: int = 64
) -> list[str]:
    """Greedy answers to prompts, in their order: what comes before the first newline, stripped.

    Batches are padded on the left (here, so the tokenizer's own padding side is neither read nor changed) and keep
    the order of `prompts`, so that `pl.using(model, rows=[...])` fits when one batch holds them all.
    Raises ValueError for no prompts, an empty one, or one that leaves no room for the answer in the model's context.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError("nothing to generate: the list of prompts is empty")
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens and batch_size start at 1; got {max_new_tokens} and {batch_size}")
    check_decoder_only(model)
    encoded = [tokens_of(tokenizer, prompt) for prompt in prompts]
    context = context_of(model)
    for i, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f"prompt {i} is empty: {prompts[i]!r}")
        if len(ids) + max_new_tokens > context:
            raise ValueError(
                f"prompt {i} has {len(ids)} tokens; with max_new_tokens={max_new_tokens} that is more than the "
                f"model's context of {context}: shorten the prompt or lower max_new_tokens"
            )
    device, pad = next(model.parameters()).device, filler(tokenizer)
    ends = _line_ends(tokenizer)
    answers = []
    with mode(model, training=False):
        for start in range(0, len(encoded), batch_size):
            batch = encoded[start : start + batch_size]
            longest = max(map(len, batch))
            x = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in batch], device=device)
            mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch], device=device)
            out = model.generate(  # type: ignore[operator]  # transformers' method
                input_ids=x, attention_mask=mask, max_new_tokens=max_new_tokens, use_cache=True,
                # Hub models bring sampling settings of their own: switch off each that would change a greedy answer.
                do_sample=False, temperature=None, top_p=None, top_k=None, num_beams=1, repetition_penalty=1.0,
                pad_token_id=pad, eos_token_id=ends,
            )  # fmt: skip
            for ids in out[:, longest:].tolist():
                answers.append(tokenizer.decode(ids, skip_special_tokens=True).split("\n")[0].strip())
    return answers


def accuracy(
    model: nn.Module,
    tokenizer,
    rows: Iterable[Mapping],
    right: Callable[[Mapping, str], bool],
    max_new_tokens: int = 48,
    batch_size: int = 64,
) -> Score:
    """The share of rows whose greedy answer is right: `right(row, answer)` decides.

    Rows have at least `prompt` and `completion` (one line). Raises ValueError for an empty data set, a missing
    column, or a completion that `max_new_tokens` would cut, which could never be right.
    """
    rows = _rows(rows, "prompt", "completion")
    for i, row in enumerate(rows):
        expected = row["completion"].strip()
        if "\n" in expected:
            raise ValueError(f"row {i}: an answer ends at the first newline, but the completion has several lines")
        if (length := len(tokens_of(tokenizer, row["completion"].rstrip(), special=False))) > max_new_tokens:
            raise ValueError(f"row {i}: its completion has {length} tokens, more than max_new_tokens={max_new_tokens}")
    answers = generate(model, tokenizer, [row["prompt"] for row in rows], max_new_tokens, batch_size)
    predictions = []
    for row, got in zip(rows, answers, strict=True):
        rest = {k: v for k, v in row.items() if k not in ("prompt", "completion")}
        judged = {"expected": row["completion"].strip(), "got": got, "right": bool(right(row, got))}
        predictions.append({"prompt": row["prompt"], **judged, **rest})
    return Score.of(predictions)


def exact_match(
    model: nn.Module, tokenizer, rows: Iterable[Mapping], max_new_tokens: int = 48, batch_size: int = 64
) -> Score:
    """The share of rows whose greedy answer is the completion, character for character."""
    return accuracy(model, tokenizer, rows, _same, max_new_tokens, batch_size)


def execution_accuracy(
    model: nn.Module, tokenizer, rows: Iterable[Mapping], max_new_tokens: int = 48, batch_size: int = 64
) -> Score:
    """The share of rows whose SQL, run on real SQLite tables, gives what the gold query gives (see `tasks.sql`).

    Each prediction also has `exact` (character for character) and `error` (what SQLite said, or "").
    Rows need `db` besides `prompt` and `completion`.
    """
    from .tasks import sql

    rows = _rows(rows, "prompt", "completion", "db")
    score = accuracy(model, tokenizer, rows, _executes, max_new_tokens, batch_size)
    for p in score.predictions:
        p["exact"], p["error"] = p["got"] == p["expected"], sql.run(p["db"], p["got"]).error or ""
    return score


@torch.no_grad()
def token_loss(
    model: nn.Module, tokenizer, texts: Sequence[str], window: int = 256, batch_size: int = 8, seed: int = 0
) -> Score:
    """Mean negative log-likelihood per token of texts, in nats: −(1/N) Σ log p(token | what came before).

    A text longer than `window` is cut into inputs of at most `window` tokens whose targets join without overlap:
    every token but the text's first is predicted exactly once, from at most `window` tokens before it.
    The interval is a percentile bootstrap over *texts* (tokens of one text are not independent); n counts texts.
    Raises ValueError for no texts, a text of fewer than two tokens, or a window beyond the model's context.
    Source: Efron 1979, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise ValueError("nothing to measure: the list of texts is empty")
    if not 1 <= window <= context_of(model):
        raise ValueError(f"window={window} must be at least 1 and at most the model's context of {context_of(model)}")
    check_decoder_only(model)
    pieces: list[tuple[int, list[int]]] = []  # (which text, at most window + 1 tokens)
    for i, text in enumerate(texts):
        ids = tokens_of(tokenizer, text)
        if len(ids) < 2:
            raise ValueError(f"text {i} has {len(ids)} token(s); a loss needs at least two: {text!r}")
        pieces += [(i, ids[a : a + window + 1]) for a in range(0, len(ids) - 1, window)]
    device, pad = next(model.parameters()).device, filler(tokenizer)
    sums, counts = torch.zeros(len(texts), dtype=torch.float64), torch.zeros(len(texts), dtype=torch.float64)
    with mode(model, training=False):
        for start in range(0, len(pieces), batch_size):
            batch = pieces[start : start + batch_size]
            longest = max(len(ids) for _, ids in batch) - 1
            x = torch.full((len(batch), longest), pad)
            y, mask = torch.full_like(x, -100), torch.zeros_like(x)  # -100: cross_entropy's mark for "no target"
            for row, (_, ids) in enumerate(batch):
                t = len(ids) - 1
                x[row, :t], y[row, :t], mask[row, :t] = torch.tensor(ids[:-1]), torch.tensor(ids[1:]), 1
            logits = model(input_ids=x.to(device), attention_mask=mask.to(device), use_cache=False).logits
            losses = F.cross_entropy(logits.float().transpose(1, 2), y.to(device), reduction="none")  # (B, T)
            which = torch.tensor([i for i, _ in batch])
            sums.index_add_(0, which, losses.double().sum(1).cpu())
            counts.index_add_(0, which, (y != -100).double().sum(1))
    low, high = _bootstrap(sums, counts, seed)
    cases = [
        {"text": text, "tokens": int(n), "loss": float(s / n)} for text, s, n in zip(texts, sums, counts, strict=True)
    ]
    return Score(float(sums.sum() / counts.sum()), low, high, len(texts), unit="nats/token", predictions=cases)


def _bootstrap(sums: torch.Tensor, counts: torch.Tensor, seed: int) -> tuple[float, float]:
    """The 95 % interval of Σ sums / Σ counts over texts drawn with replacement; (nan, nan) for a single text."""
    if len(sums) == 1:
        return math.nan, math.nan
    draws = torch.randint(len(sums), (BOOTSTRAP, len(sums)), generator=torch.Generator().manual_seed(seed))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high


def _same(row: Mapping, got: str) -> bool:
    return got == row["completion"].strip()


def _executes(row: Mapping, got: str) -> bool:
    from .tasks import sql

    return sql.grade(row["db"], got, row["completion"].strip())


def _rows(rows: Iterable[Mapping], *columns: str) -> list[dict]:
    found = [dict(row) for row in rows]
    if not found:
        raise ValueError("nothing to evaluate: the data set is empty")
    for i, row in enumerate(found):
        if missing := [c for c in columns if c not in row]:
            raise ValueError(f"row {i} has no column {missing[0]!r}; it has {', '.join(row) or 'none'}")
    return found


def _line_ends(tokenizer) -> list[int]:
    """Ids at which an answer is over: end of text, and every token of the vocabulary with a newline in it."""
    ids = range(len(tokenizer))
    ends = [i for i, piece in zip(ids, tokenizer.batch_decode([[i] for i in ids]), strict=True) if "\n" in piece]
    return ends if tokenizer.eos_token_id is None else sorted({*ends, tokenizer.eos_token_id})
