"""What is the largest that fits this card: batch, length, model?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .cards import CONTEXT, FITS, MARGIN, TOO_LARGE, Card, before_ampere, card_named, judge, usable_of
from .memory import GIB, Memory, size
from .prediction import DTYPES, predict

if TYPE_CHECKING:
    import pandas

STEP = 64  # tokens: kernels are fastest on multiples of it


class Row(NamedTuple):
    """A line of a plan: a model at a batch of so many rows of so many tokens, what it needs and whether that fits.

    reserved None: not predicted, since a larger model fits, or a smaller one does not.
    """

    model: str
    batch: int
    tokens: int
    reserved: int | None
    word: str


@dataclass(frozen=True, repr=False)
class Plan:
    """The largest that fits a card, always with MARGIN to spare.

    With a model: batch, the most rows at the tokens asked for, and tokens, the longest rows at the batch asked for; 0:
    not even the least fits. Without: model, the largest of the built-in ones; "": none. rows: each with what it needs.
    """

    card: Card
    usable: int
    question: str
    rows: tuple[Row, ...]
    model: str = ""
    batch: int = 0
    tokens: int = 0
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        shown = [row for row in self.rows if row.reserved is not None]
        several = len({row.model for row in self.rows}) > 1
        wide = max([len(row.model) for row in shown], default=0)
        lines = [f"{self.card.name}, {size(self.usable)} usable: {self.question}"]
        for row in shown:
            sizes = "" if several else f"{row.batch:>5} × {row.tokens:>7,} tokens  "
            lines.append(f"  {row.model:<{wide}}  {sizes}{size(row.reserved or 0):>10}  {row.word}")
        rest = [row.word for row in self.rows if row.reserved is None]
        if rest:
            lines.append(f"  by their size, {rest.count(FITS)} more fit and {rest.count(TOO_LARGE)} more do not")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def to_pandas(self) -> pandas.DataFrame:
        """One line a row; GiB."""
        import pandas as pd

        entries = [row._asdict() | {"reserved": row.reserved and row.reserved / GIB} for row in self.rows]
        return pd.DataFrame(entries, columns=list(Row._fields)).rename(columns={"reserved": "GiB"})

    def to_dict(self) -> dict[str, Any]:
        """What can be written as JSON. Bytes."""
        return {"card": self.card.name, "usable": self.usable, "question": self.question, "model": self.model,
                "batch": self.batch, "tokens": self.tokens, "rows": [row._asdict() for row in self.rows],
                "notes": list(self.notes)}  # fmt: skip


def plan(card: Any, model: Any = None, method: Any = "lora", *, tokens: int = 512, batch: int = 1,
         context: float = CONTEXT, others: float = 0, **rest: Any) -> Plan:  # fmt: skip
    """The largest that fits a card.

        plan("4090", "llama-3.1-8b", quantize="nf4", checkpointing=True)   the largest batch, and the longest rows
        plan("4090", quantize="nf4", tokens=1024)                          the largest of the built-in language models

    card, context, others: as for `verdict`. model, method, tokens, batch, rest: as for `predict`. Lengths are multiples
    of STEP, and no longer than the model's context. Ten to twenty predictions. Raises what `predict` and `verdict`
    raise, and ValueError if no built-in model takes this method and length.
    """
    if rest.get("device", "cuda") != "cuda":
        raise ValueError(f"device={rest['device']!r}: nothing is reserved there; a plan is for a card, device='cuda'")
    chosen = card_named(card)
    usable, _ = usable_of(chosen, context, others)
    if before_ampere(chosen) and rest.get("attention", "auto") == "auto":
        rest["attention"] = "efficient"
    room = _Room(chosen, usable, method, rest)
    return _largest_sizes(room, model, batch, tokens) if model is not None else _largest_model(room, batch, tokens)


@dataclass
class _Room:
    """A card, and what is to run on it."""

    card: Card
    usable: int
    method: Any
    rest: dict[str, Any]

    def least_bytes(self) -> float:
        """Of a parameter of the base: no model takes less than its weights."""
        packed = {"int8": 1.0, None: float(DTYPES[self.rest.get("dtype", "bfloat16")].itemsize)}
        return packed.get(self.rest.get("quantize"), 0.5)

    def row(self, model: Any, batch: int, tokens: int) -> tuple[Row, Memory]:
        memory = predict(model, self.method, batch=batch, tokens=tokens, **self.rest)
        judged = judge(memory, self.card, self.usable)
        return Row(str(memory.asked.get("model")), batch, tokens, judged.reserved, judged.word), memory


def _largest_sizes(room: _Room, model: Any, batch: int, tokens: int) -> Plan:
    first, memory = room.row(model, batch, tokens)  # what is wrong with the question is said here
    limit = _context_of(model)

    def at(b: int, t: int) -> Row:
        if (b, t) == (batch, tokens):
            return first
        try:
            return room.row(model, b, t)[0]
        except ValueError:  # tensors of this size cannot exist
            return Row(first.model, b, t, None, TOO_LARGE)

    longest = 2**20 if limit is None else limit - int(room.rest.get("new_tokens", 0))
    most = largest(lambda n: at(n, tokens), 2**16, room.usable)
    long = largest(lambda n: at(batch, STEP * n), max(1, longest // STEP), room.usable)
    question = ", ".join(part for part in memory.title().split(", ") if not part.endswith(("tokens", "new")))
    ended = limit is not None and long.tokens >= STEP * (longest // STEP)
    notes = (f"no longer than its context, {limit:,} tokens",) if ended else ()
    return Plan(room.card, room.usable, question, (most, long), first.model, most.batch if most.word == FITS else 0,
                long.tokens if long.word == FITS else 0, notes)  # fmt: skip


def largest(at: Callable[[int], Row], most: int, usable: int) -> Row:
    """The row of the largest n in 1…most that fits, if the need grows with n; the row of 1 if not even that does.

    By secants, since memory grows nearly in a straight line, and now and then by halving, in case it does not.
    """
    room, best = (1 - MARGIN) * usable, at(1)
    low, high, points, guess = 1, most + 1, [(1, best.reserved or 0)], min(8, most)
    while best.word == FITS and high - low > 1:
        row = at(guess)
        low, high, best = (guess, high, row) if row.word == FITS else (low, guess, best)
        points += [(guess, row.reserved)] if row.reserved else []
        (a, y), (b, z) = points[-2:] if row.reserved else ((0, 0), (0, 0))
        if a == b or (z - y) / (b - a) <= 0 or (high <= most and len(points) % 4 == 0):
            guess = (low + high) // 2
        else:
            guess = b + int((room - z) * (b - a) / (z - y))
        guess = min(max(guess, low + 1), high - 1)
    return best


def _context_of(model: Any) -> int | None:
    """How many tokens a model was made for; None: its config does not say."""
    from ..shapes import config_of

    config = getattr(model, "config", None) if isinstance(model, torch.nn.Module) else config_of(model)
    return getattr(config, "max_position_embeddings", None)


def _largest_model(room: _Room, batch: int, tokens: int) -> Plan:
    """Of the built-in language models: by halving, then the neighbours of the edge, as need is not quite by size."""
    length, sizes = tokens + int(room.rest.get("new_tokens", 0)), _language_models()
    long = [name for name in sorted(sizes, key=sizes.__getitem__) if (_context_of(name) or length) >= length]
    short = len(sizes) - len(long)
    rows, refused, question = _smallest(room, long, batch, tokens)
    names = [name for name in long if _family(name) not in refused]
    notes = [f"{short} built-in models have a context of less than {length:,} tokens"] if short else []
    notes += [f"without the models of {family}: {error}" for family, error in refused.items()]

    def fits(i: int) -> bool:
        if names[i] not in rows:
            if sizes[names[i]] * room.least_bytes() > room.usable:
                return False
            rows[names[i]], _ = room.row(names[i], batch, tokens)
        return rows[names[i]].word == FITS

    low, high = -1, len(names)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    for start, way, expected in ((high, 1, False), (low, -1, True)):
        i, in_a_row = start, 0
        while 0 <= i < len(names) and in_a_row < 2:
            in_a_row = in_a_row + 1 if fits(i) is expected else 0
            i += way
    edge = max((i for i, name in enumerate(names) if name in rows and rows[name].word == FITS), default=-1)
    table = [rows.get(name) or Row(name, batch, tokens, None, FITS if i < edge else TOO_LARGE)
             for i, name in enumerate(names)]  # fmt: skip
    return Plan(room.card, room.usable, question, tuple(table), names[edge] if edge >= 0 else "", notes=tuple(notes))


def _smallest(room: _Room, names: list[str], batch: int, tokens: int) -> tuple[dict[str, Row], dict[str, str], str]:
    """(rows of the smallest model of each family, family -> why it takes no such method, what was asked in words)."""
    rows: dict[str, Row] = {}
    refused: dict[str, str] = {}
    question = ""
    for name in names:
        if _family(name) not in {*map(_family, rows), *refused}:
            try:
                rows[name], memory = room.row(name, batch, tokens)
                question = ", ".join(memory.title().split(", ")[1:])
            except ValueError as error:
                refused[_family(name)] = str(error)
    if not rows:
        raise ValueError(next(iter(refused.values()), f"no built-in model has a context of {tokens:,} tokens"))
    return rows, refused, question


def _family(name: str) -> str:
    from ..shapes import shapes

    return shapes()[name]["config"]["model_type"]


def _language_models() -> dict[str, int]:
    """name -> parameters of the built-in shapes that have a Hub id and write text from left to right."""
    from ..shapes import meta_model, shapes

    found = {}
    for name, entry in shapes().items():
        if entry["hub"] and entry["config"]["architectures"][0].endswith(("ForCausalLM", "LMHeadModel")):
            found[name] = entry["parameters"] or sum(p.numel() for p in meta_model(name).parameters())
    return found
