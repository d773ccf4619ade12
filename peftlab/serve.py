"""Many adapters served at once: one batch to decode, where each row has its own adapter, length, temperature and seed.

    for token in decode(model, tokenizer, [Request(ids, adapter="sql"), Request(other, temperature=0.8, seed=1)]):
        print(token.row, token.text)                                  # as they come
    generate(model, tokenizer, prompts, adapters=["sql", None])       # the whole answers

A row's answer does not depend on the rows beside it: it has a random generator of its own, and the factors of its own
adapter (`mixed`). Up to rounding: matrix products of another height add in another order, so two tokens whose
probabilities agree to six digits may change places.
Source: Sheng et al. 2023 (S-LoRA), arXiv:2311.03285; rows that are done leave the batch: Yu et al. 2022 (Orca), OSDI.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attach import adapters, check_attached, check_mixes, hosts, merged_names
from .core import Switch
from .mixed import Rows
from .runtime import mode
from .texts import check_decoder_only, context_of, filler, tokens_of

LONGEST = 4  # bytes of a character in UTF-8, so at most as many tokens


@dataclass(frozen=True)
class Request:
    """One row of a batch to decode."""

    prompt: list[int]  # token ids, special tokens included: what the model reads
    adapter: str | None = None  # None: the bare base
    max_new_tokens: int = 16
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # the most probable tokens that have this much of the probability together
    top_k: int = 0  # the k most probable tokens; 0: all
    seed: int | None = None  # of this row's own generator; None: drawn from torch's
    stop: tuple[str, ...] = ()  # texts before which the answer ends


@dataclass(frozen=True)
class Token:
    """One decoded token of one row; the last of a row has `finish`."""

    row: int  # which request
    id: int  # -1 for "cancelled", which comes without a token
    text: str  # what may be shown now: whole characters, no part of a stop text; a row's pieces add up to its answer
    logprob: float  # ln p of the token under the model: at temperature 1, before top_k and top_p
    finish: str | None = None  # "stop": a stop text or an end token; "length"; "cancelled"


def check(model: nn.Module, tokenizer, request: Request) -> None:
    """ValueError, or LookupError for an unknown adapter, if the request cannot be served; nothing is run or changed."""
    _check(model, [request])


def _check(model: nn.Module, requests: Sequence[Request]) -> None:
    check_decoder_only(model)
    there, merged, context = adapters(model), merged_names(model), context_of(model)
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    for i, request in enumerate(requests):
        at = f"request {i}: " if len(requests) > 1 else ""
        if merged:
            raise ValueError(f"{', '.join(merged)} is merged into the weights, so no row can be without it; "
                             "unmerge(model) first")  # fmt: skip
        if request.adapter is not None and request.adapter not in there:
            try:
                check_attached(model, [request.adapter])
            except ValueError as error:
                raise LookupError(f"{at}{error}") from None
        if wrong := _wrong(request, vocabulary, context):
            raise ValueError(at + wrong)
    check_mixes(model, {request.adapter for request in requests})


def _wrong(request: Request, vocabulary: int, context: float) -> str | None:
    """What is wrong with a request's numbers; None: nothing."""
    n, new = len(request.prompt), request.max_new_tokens
    if n == 0:
        return "the prompt is empty: there is nothing to go on from"
    if not all(isinstance(t, int) and 0 <= t < vocabulary for t in request.prompt):
        return f"the prompt must be token ids, whole numbers from 0 to {vocabulary - 1}; tokenise the text first"
    if new < 1:
        return f"max_new_tokens={new} must be at least 1"
    if n + new > context:
        return (f"the prompt has {n} tokens; with max_new_tokens={new} that is more than the model's context of "
                f"{context}: shorten the prompt or lower max_new_tokens")  # fmt: skip
    if not (math.isfinite(request.temperature) and request.temperature >= 0):
        return f"temperature={request.temperature} must be 0 (greedy) or a positive number"
    if not 0 < request.top_p <= 1:
        return f"top_p={request.top_p} must be above 0 and at most 1"
    if request.top_k < 0:
        return f"top_k={request.top_k} must be 0 (all tokens) or more"
    if request.seed is not None and not -(2**63) <= request.seed < 2**64:
        return f"seed={request.seed} must fit in 64 bits"
    if isinstance(request.stop, str) or not all(isinstance(s, str) and s for s in request.stop):
        return f"stop={request.stop!r} must be a tuple of texts that are not empty"
    return None


def sample(logits: Tensor, request: Request, generator: torch.Generator) -> int:
    """A token drawn from softmax(logits / temperature), cut to top_k, then to top_p. Shapes: logits (vocabulary,).

    One uniform number u a token, and the first token at which the summed probability is above u.
    Source: Holtzman et al. 2020, arXiv:1904.09751, section 3.1 (top_p); Fan et al. 2018, arXiv:1805.04833 (top_k).
    """
    logits = logits.double()
    p = ((logits - logits.max()) / request.temperature).softmax(-1)  # minus the maximum: the least temperature works
    order = None
    if request.top_k or request.top_p < 1:
        p, order = p.sort(descending=True, stable=True)
        p = p[: request.top_k or None]
        before = p.cumsum(-1) - p
        p = p[before < request.top_p * p.sum()]
    u = torch.rand((), generator=generator, dtype=torch.double).item()
    total = p.cumsum(-1)
    i = int(torch.searchsorted(total, u * total[-1], right=True).clamp(max=len(p) - 1))
    return i if order is None else int(order[i])


class Text:
    """A row's text as its tokens come. What could still change is held back: half a character, half a stop text."""

    def __init__(self, tokenizer, stop: Sequence[str]):
        self.tokenizer, self.stop = tokenizer, stop
        self.ids: list[int] = []
        self.start = 0  # decoding begins here: one clean place back, as some tokenizers drop a text's first space
        self.clean = 0  # here the text so far ended with a whole character
        self.shown = 0  # characters of the text from `start` that were handed on
        self.held = ""  # that much of a stop text was seen

    def decoded(self) -> str:
        return self.tokenizer.decode(
            self.ids[self.start :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def whole_characters(self, last: bool) -> str:
        text = self.decoded()
        if last or not text.endswith("\ufffd"):  # a character in two tokens is decoded to this until both are there
            new = text[self.shown :]
            self.start, self.clean = self.clean, len(self.ids)
            self.shown = len(self.decoded())
        elif len(self.ids) - self.clean > LONGEST:  # bytes that are no text: they stay what they are, but for the last
            kept = len(text) - len(text.rstrip("\ufffd"))
            new = text[self.shown : len(text) - min(kept, LONGEST - 1)]
            self.shown += len(new)
        else:
            new = ""
        return new

    def add(self, token: int, last: bool = False) -> tuple[str, bool]:
        """(what may be shown now, whether a stop text came) after one more token; the last one frees what was held."""
        self.ids.append(token)
        return self.beyond(self.whole_characters(last), last)

    def end(self) -> str:
        """What was held back, when the row ends without another token."""
        return self.beyond(self.whole_characters(last=True), last=True)[0]

    def beyond(self, new: str, last: bool) -> tuple[str, bool]:
        text = self.held + new
        places = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if places:
            return text[: min(places)], True
        longest = 0 if last else max(
            (n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
        )  # fmt: skip
        self.held = text[len(text) - longest :]
        return text[: len(text) - longest], False


@dataclass
class Row:
    """A request that is being decoded."""

    number: int
    request: Request
    text: Text
    generator: torch.Generator | None  # None: greedy


class Batch:
    """The rows that are still decoded, and what the model keeps of them: N rows, T tokens, padded on the left."""

    def __init__(self, model: nn.Module, switch: Switch, rows: list[Row], pad: int):
        self.model, self.switch, self.rows = model, switch, rows
        self.mixed = Rows([row.request.adapter for row in rows], watched=False)
        self.takes = set(inspect.signature(model.forward).parameters)
        device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        longest = max(len(row.request.prompt) for row in rows)
        gaps = [longest - len(row.request.prompt) for row in rows]
        self.ids = torch.tensor([[pad] * gap + row.request.prompt for gap, row in zip(gaps, rows, strict=True)])
        self.mask = (torch.arange(longest) >= torch.tensor(gaps)[:, None]).long().to(device)
        self.ids = self.ids.to(device)
        self.cache = None

    def forward(self) -> Tensor:
        """The logits (N, vocabulary) of each row's next token."""
        places = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -self.ids.shape[1] :]  # padding has none
        more = {name: value for name, value in (("position_ids", places), ("logits_to_keep", 1)) if name in self.takes}
        before, self.switch.active, self.switch.rows = (self.switch.active, self.switch.rows), (), self.mixed
        try:
            with torch.no_grad():
                out = self.model(
                    input_ids=self.ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, **more
                )
        finally:  # between two steps the model is whatever its owner made it
            self.switch.active, self.switch.rows = before
        self.cache = out.past_key_values
        return out.logits[:, -1]

    def go_on(self, tokens: list[int]) -> None:
        """Put each row's new token behind it."""
        self.ids = torch.tensor(tokens, device=self.ids.device)[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)

    def keep(self, places: list[int]) -> None:
        """Go on with the rows at these places; the others leave."""
        everyone, self.rows = len(self.rows), [self.rows[i] for i in places]
        if 0 < len(places) < everyone:
            self.mixed = self.mixed.only(places)
            index = torch.tensor(places, device=self.ids.device)
            self.ids, self.mask = self.ids[index], self.mask[index]
            if self.cache is not None:
                self.cache.batch_select_indices(index)


def decode(
    model: nn.Module, tokenizer, requests: Sequence[Request], cancelled: Callable[[int], bool] = lambda row: False
) -> Iterator[Token]:
    """The tokens of all requests as they come: step by step, in a step row by row. Rows that are done leave the batch.

    cancelled(row) is asked before each step. Answers end at the end tokens of the model's generation_config, else at
    the tokenizer's. While it runs, the model is in eval mode; adapters must stay as they are, and no two threads may
    use the model at once. Between two tokens the adapters that run are those that ran before.
    Raises ValueError or LookupError (see `check`) at once, before anything runs.
    """
    requests = list(requests)
    if requests:
        _check(model, requests)
    return _decode(model, tokenizer, requests, cancelled)


def _decode(model: nn.Module, tokenizer, requests: list[Request], cancelled: Callable[[int], bool]) -> Iterator[Token]:
    if not requests:
        return
    ends = _end_tokens(model, tokenizer)
    switch = next((host.switch for host in hosts(model).values()), Switch())
    rows = [Row(i, r, Text(tokenizer, r.stop), _generator(r)) for i, r in enumerate(requests)]
    batch = Batch(model, switch, rows, filler(tokenizer))
    with mode(model, training=False):
        while batch.rows:
            gone = [cancelled(row.number) for row in batch.rows]
            for row, over in zip(batch.rows, gone, strict=True):
                if over:
                    yield Token(row.number, -1, row.text.end(), 0.0, "cancelled")
            batch.keep([i for i, over in enumerate(gone) if not over])
            if not batch.rows:
                return
            logits = batch.forward().float()
            tokens = [
                best if row.generator is None else sample(logits[i], row.request, row.generator)
                for i, (row, best) in enumerate(zip(batch.rows, logits.argmax(-1).tolist(), strict=True))
            ]
            chosen = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
            logprobs = (chosen - logits.logsumexp(-1)).tolist()
            batch.go_on(tokens)
            going = []
            for i, (row, token, logprob) in enumerate(zip(batch.rows, tokens, logprobs, strict=True)):
                full = len(row.text.ids) + 1 == row.request.max_new_tokens
                text, stopped = row.text.add(token, last=full or token in ends)
                finish = "stop" if stopped or token in ends else "length" if full else None
                going += [i] if finish is None else []
                yield Token(row.number, token, text, logprob, finish)
            batch.keep(going)


def _end_tokens(model: nn.Module, tokenizer) -> set[int]:
    """As transformers' generate() has them."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _generator(request: Request) -> torch.Generator | None:
    if request.temperature == 0:
        return None
    seed = int(torch.randint(2**62, ())) if request.seed is None else request.seed
    return torch.Generator().manual_seed(seed)


def generate(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    adapters: Sequence[str | None],
    max_new_tokens: int | Sequence[int] = 48,
    temperature: float | Sequence[float] = 0.0,
    top_p: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    seed: int | None | Sequence[int | None] = None,
    stop: Sequence[str] = (),
    batch_size: int = 64,
) -> list[str]:
    """The answers to the prompts, in their order, each from its own adapter (None: the bare base).

    Settings are one value for all rows or one for each; stop: texts before which an answer ends, for all rows.
    Raises ValueError or LookupError (see `check`) before anything runs, also if a list has another length.
    """
    if isinstance(prompts, str) or isinstance(adapters, str):
        raise ValueError("prompts and adapters are lists: one adapter name (None: the bare base) for each prompt")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    settings = {"adapters": adapters, "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p,
                "top_k": top_k, "seed": seed}  # fmt: skip
    columns = [_column(name, given, len(prompts)) for name, given in settings.items()]
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    requests = [
        Request(tokens_of(tokenizer, prompt), adapter, new, heat, p, k, own, texts)
        for prompt, adapter, new, heat, p, k, own in zip(prompts, *columns, strict=True)
    ]
    if requests:
        _check(model, requests)
    answers = [""] * len(requests)
    for start in range(0, len(requests), batch_size):
        for token in decode(model, tokenizer, requests[start : start + batch_size]):
            answers[start + token.row] += token.text
    return answers


def _column(name: str, given: Any, rows: int) -> list[Any]:
    """A setting for each row, from one for all or from a list."""
    column = list(given) if isinstance(given, Sequence) else [given] * rows
    if len(column) != rows:
        raise ValueError(f"{name} has {len(column)} values for {rows} prompts: one for each")
    return column
