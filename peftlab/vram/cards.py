"""Will it fit this card, and what would make it fit?"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch

from .allocator import CachingAllocator, OutOfMemory
from .memory import GIB, Memory, size
from .tape import CUBLAS, Tape

# What a process has on the card beside torch's allocator: the driver's own, and kernels of torch and cuBLAS, which are
# loaded when first used. An out-of-memory message tells it: "this process has … in use", less what torch has allocated
# and reserved: 0.1 to 0.6 GiB in eleven of twelve public ones, of seven kinds of card; the twelfth, with more libraries
# in the process, has 2.1.
CONTEXT = GIB // 2
# The part of what is usable that should stay free: for workspaces of kernels that no tape shows, and for gaps that open
# up over many steps with rows of unequal length.
MARGIN = 0.03
CUBLAS_HOPPER = 8 * 4096 * 1024  # aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize
AMPERE, HOPPER = (8, 0), (9, 0)  # the first with torch's flash attention and bfloat16; the first with that workspace

FITS, TIGHT, TOO_LARGE = WORDS = ("fits", "tight", "does not fit")


class Card(NamedTuple):
    """A GPU: its memory in bytes, torch's `total_memory`, which is less than what it is sold with."""

    name: str
    memory: int
    capability: tuple[int, int] | None = None  # CUDA compute capability; None: unknown, or no CUDA
    taken: int = 0  # bytes that other programs have on it now, where that was looked up
    note: str = ""


_NOT_CUDA = "predicted with the kernels and workspaces of NVIDIA's cards; an AMD card's differ"

# GiB as torch prints them: "GPU 0 has a total capacity of 23.65 GiB" in public out-of-memory reports that name the
# card, or total_memory in public print-outs of torch.cuda.get_device_properties, rounded down. All were found there but
# the RTX 4070's, which is the CUDA driver's. Where reports of a card differ (driver, board), it is a low one of Linux.
# Windows shows up to 0.9 GiB more, which it keeps for itself; error correction (ECC), if it is switched on, takes about
# 6 % of an RTX A or Ada card.
CARDS: dict[str, Card] = {
    name: Card(name, int(gib * GIB), capability, note=_NOT_CUDA if capability is None else "")
    for name, gib, capability in (
        ("GTX 1080 8GB", 7.92, (6, 1)),
        ("GTX 1080 Ti 11GB", 10.92, (6, 1)),
        ("RTX 2080 Ti 11GB", 10.76, (7, 5)),
        ("RTX 3060 12GB", 11.65, (8, 6)),
        ("RTX 3080 10GB", 9.78, (8, 6)),
        ("RTX 3090 24GB", 23.69, (8, 6)),
        ("RTX 4060 8GB", 7.75, (8, 9)),
        ("RTX 4070 12GB", 11.59, (8, 9)),
        ("RTX 4070 Ti Super 16GB", 15.56, (8, 9)),
        ("RTX 4080 16GB", 15.67, (8, 9)),
        ("RTX 4090 24GB", 23.65, (8, 9)),
        ("RTX 5080 16GB", 15.47, (12, 0)),
        ("RTX 5090 32GB", 31.37, (12, 0)),
        ("RTX A4000 16GB", 15.61, (8, 6)),
        ("RTX A5000 24GB", 23.54, (8, 6)),
        ("RTX A6000 48GB", 47.53, (8, 6)),
        ("RTX 6000 Ada 48GB", 47.48, (8, 9)),
        ("RTX PRO 6000 Blackwell 96GB", 94.97, (12, 0)),
        ("T4 16GB", 14.57, (7, 5)),
        ("V100 16GB", 15.75, (7, 0)),
        ("V100 32GB", 31.74, (7, 0)),
        ("A10G 24GB", 22.05, (8, 6)),
        ("A40 48GB", 44.35, (8, 6)),
        ("L4 24GB", 22.03, (8, 9)),
        ("L40 48GB", 44.40, (8, 9)),
        ("L40S 48GB", 44.52, (8, 9)),
        ("A100 40GB", 39.38, (8, 0)),
        ("A100 80GB", 79.25, (8, 0)),
        ("H20 96GB", 95.00, (9, 0)),
        ("H100 80GB", 79.10, (9, 0)),
        ("H200 141GB", 139.80, (9, 0)),
        ("B200 192GB", 178.35, (10, 0)),
        ("MI300X 192GB", 191.98, None),
    )
}

# What may stand in a device's name beside what tells it from others: "NVIDIA A100-SXM4-80GB", "Tesla V100-PCIE-16GB".
_CHAFF = re.compile(r"nvidia|geforce|tesla|quadro|amd|instinct|rtx|gtx|pcie|sxm\d?|hbm\d\w?|generation|server|edition|"
                    r"blackwell|[^a-z0-9]")  # fmt: skip


def _key(name: str) -> str:
    return re.sub(r"gi?b$", "", _CHAFF.sub("", name.lower()))


def card_named(name: Any) -> Card:
    """The card that is meant: "4090", "RTX 4090", "a100-80gb", torch's own "NVIDIA H100 80GB HBM3", a `Card`.

    A number, "24", "24GB" or "22.5 GiB" is any card with so many GiB; None: the one in this computer.
    Raises ValueError for a card that is not in CARDS, with those that are, and for a name that fits several.
    """
    if name is None or isinstance(name, Card):
        return this_card() if name is None else name
    text = str(name).strip()
    key = _key(text)
    known = {_key(n.rpartition(" ")[0]): n for n in CARDS} | {_key(n): n for n in CARDS}
    found = [n for n in CARDS if key and key in (_key(n), _key(n.rpartition(" ")[0]))]
    if len(found) == 1:
        return CARDS[found[0]]
    if found:
        raise ValueError(f"there are several cards {text!r}: say which, {' or '.join(map(repr, found))}")
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(g|gb|gib)?", text.lower())
    if number and 0 < float(number[1]) <= 1024:
        return Card(f"a card of {float(number[1]):g} GiB", int(float(number[1]) * GIB))
    close = dict.fromkeys(known[n] for n in difflib.get_close_matches(key, known, n=6))
    hint = f"; did you mean {' or '.join(map(repr, list(close)[:3]))}?" if close else "."
    raise ValueError(f"no card is known as {text!r}{hint} Known are {', '.join(CARDS)}; any other by its memory, such "
                     "as '24GB'")  # fmt: skip


def this_card() -> Card:
    """The CUDA device that torch would use here, and what other programs have on it now.

    Raises ValueError where there is none.
    """
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device here; name a card, such as '4090' or '24GB'")
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info()
    others = max(0, total - free - torch.cuda.memory_reserved() - CONTEXT)
    amd = torch.version.hip is not None
    return Card(found.name, total, None if amd else (found.major, found.minor), others, _NOT_CUDA if amd else "")


# ------------------------------------------------------------------------------------------------------------- verdict


class Way(NamedTuple):
    """A change that was predicted anew: arguments of `predict`, in words, and what then is reserved."""

    changes: Mapping[str, Any]
    words: str
    reserved: int
    word: str


@dataclass(frozen=True, repr=False)
class Verdict:
    """Whether a program fits a card: `word` is "fits", "tight" or "does not fit"; false only if it does not.

    usable: the card's memory − context − others. reserved: what torch would reserve there if it had room. All in bytes.
    retries: how often the allocator has to give unused memory back before it finds a place. ways: what makes it fit,
    the least costly first; where nothing does, `least` is the smallest need that was found. notes: what is other than
    asked.
    """

    word: str
    card: Card
    memory: Memory
    reserved: int
    usable: int
    context: int
    others: int
    retries: int = 0
    ways: tuple[Way, ...] = ()
    least: Way | None = None
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.word != TOO_LARGE

    @property
    def spare(self) -> int:
        """Bytes that are left; negative: that are missing."""
        return self.usable - self.reserved

    def __repr__(self) -> str:
        parts = [f"{size(self.card.memory)} − {size(self.context)} of context"]
        parts += [f"{size(self.others)} of others"] if self.others else []
        lines = [f"{self.card.name}: {self.word}, {self._reason()}",
                 f"  {size(self.reserved)} reserved, {size(self.usable)} usable ({' − '.join(parts)})"]  # fmt: skip
        if self.ways:
            wide = max(len(way.words) for way in self.ways)
            lines.append("  what would help, each predicted anew:")
            lines += [f"    {way.words:<{wide}}  {size(way.reserved):>10}  {way.word}" for way in self.ways]
        if self.least:
            lines.append(f"  no way was found; the least is {size(self.least.reserved)}, with {self.least.words}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def _reason(self) -> str:
        if self.word == FITS:
            return f"with {size(self.spare)} to spare"
        if self.word == TOO_LARGE:
            return f"it lacks {size(-self.spare)}" if self.spare < 0 else "torch finds no place for its last block"
        if self.spare >= 0:
            return f"with less than {MARGIN:.0%} to spare"
        times = "once" if self.retries == 1 else f"{self.retries} times"
        return f"if torch gives unused memory back {times} in the steps predicted, which costs time"

    def to_dict(self) -> dict[str, Any]:
        """What can be written as JSON. Bytes."""
        return {
            "word": self.word, "card": self.card.name, "card_memory": self.card.memory, "context": self.context,
            "others": self.others, "usable": self.usable, "reserved": self.reserved, "spare": self.spare,
            "retries": self.retries, "ways": [way._asdict() for way in self.ways],
            "least": self.least._asdict() if self.least else None, "notes": list(self.notes),
        }  # fmt: skip


def verdict(memory: Memory, card: Any = None, *, context: float = CONTEXT, others: float = 0,
            advise: bool = True) -> Verdict:  # fmt: skip
    """Whether `memory` fits a card, and if it does not fit well, the changes that make it fit.

    card: what `card_named` takes; None: the one in this computer. context, others: bytes that the CUDA context and
    other programs take (a desktop on the same card: about 1 GiB). advise: predict changes anew, which takes a while.

    "fits": torch reserves no more than is usable, with MARGIN to spare. "tight": there is less to spare; or what would
    be reserved is too much, but the tape goes through on so small a card, since torch gives unused memory back and
    tries again. "does not fit": it does not go through.
    Cards before Ampere have no flash attention and are predicted anew without it. From Hopper on cuBLAS takes 32 MiB a
    thread (torch's source says so of Hopper; newer cards are taken alike, which is 48 MiB too much at most).
    Raises ValueError for an unknown card, for memory of a CPU, and if context and others leave nothing.
    """
    chosen = card_named(card)
    usable, others = usable_of(chosen, context, others)
    if memory.asked.get("device", "cuda") == "cpu" or not memory.reserved:
        raise ValueError("memory of a CPU, where torch reserves nothing; predict with device='cuda' for a card")
    memory, notes = _on(memory, chosen)
    word, reserved, retries = judge(memory, chosen, usable)
    found = Verdict(word, chosen, memory, reserved, usable, int(context), others, retries, notes=notes)
    if word == FITS or not advise or memory.again is None:
        return found
    advice = Advice(memory, lambda m: judge(m, chosen, usable), usable, before_ampere(chosen))
    ways, least = advice.given(word, reserved)
    return replace(found, ways=ways, least=least)


def usable_of(card: Card, context: float, others: float) -> tuple[int, int]:
    """(bytes for torch's allocator, bytes of other programs)."""
    if not (context >= 0 and others >= 0):
        raise ValueError(f"context={context} and others={others} are bytes, at least 0")
    taken = int(others) + card.taken
    usable = card.memory - int(context) - taken
    if usable <= 0:
        raise ValueError(f"{card.name} has {size(card.memory)}, and context ({size(context)}) and others "
                         f"({size(taken)}) leave nothing of it")  # fmt: skip
    return usable, taken


def before_ampere(card: Card) -> bool:
    """Whether it is known to have no flash attention."""
    return card.capability is not None and card.capability < AMPERE


def _on(memory: Memory, card: Card) -> tuple[Memory, tuple[str, ...]]:
    """The same on that card, and what is other than asked."""
    notes, attention = [card.note] if card.note else [], memory.asked.get("attention")
    if before_ampere(card) and memory.source == "predicted":
        if attention == "auto" and memory.again is not None:
            memory = memory.again(attention="efficient")
            notes.append("no flash attention before Ampere: predicted anew with the memory-efficient kernel, or, where "
                         "heads share keys and values, the plain formula")  # fmt: skip
        elif attention in ("auto", "flash"):
            notes.append("predicted with flash attention, which torch does not have before Ampere: it takes more here")
        if "bf16" in str(memory.asked.get("autocast")) or memory.asked.get("dtype") in ("bfloat16", "bf16"):
            notes.append("no bfloat16 arithmetic of its own before Ampere; float16 takes the same memory")
    return memory, tuple(notes)


class Judged(NamedTuple):
    """A verdict's numbers."""

    word: str
    reserved: int
    retries: int


def judge(memory: Memory, card: Card, usable: int) -> Judged:
    """Whether memory fits, without advice; with the attention kernel that it was predicted with."""
    reserved, tape = _need(memory, card)
    if reserved <= usable:
        return Judged(FITS if usable - reserved >= MARGIN * usable else TIGHT, reserved, 0)
    if tape is None or memory.allocated > usable:
        return Judged(TOO_LARGE, reserved, 0)
    try:
        small = CachingAllocator(usable, bool(memory.asked.get("expandable"))).replay(tape)
    except OutOfMemory:
        return Judged(TOO_LARGE, reserved, 0)
    return Judged(TIGHT, reserved, small.retries)


def _need(memory: Memory, card: Card) -> tuple[int, Tape | None]:
    """What it reserves there, and its tape there. What was measured is taken as it is."""
    if memory.source != "predicted" or card.capability is None or card.capability < HOPPER:
        return memory.reserved, memory.tape
    if memory.tape is None:
        threads = 2 if memory.asked.get("train", True) else 1
        return memory.reserved + threads * (CUBLAS_HOPPER - CUBLAS), None
    blocks = [replace(b, size=CUBLAS_HOPPER) if b.op == "cuBLAS" else b for b in memory.tape.blocks]
    tape = replace(memory.tape, blocks=blocks)
    return CachingAllocator(expandable=bool(memory.asked.get("expandable"))).replay(tape).peak_reserved, tape


# -------------------------------------------------------------------------------------------------------------- advice

Changes = dict[str, Any]
T = TypeVar("T")
Ladder = list[Changes]  # changes of one kind, from mild to strong
# The projections of queries and values, by the names that the families have for them (the brackets: any will do).
QUERY_VALUE = "(q_proj|v_proj|query|value|query_proj|value_proj|q|v|c_attn|qkv_proj|query_key_value)"
WAYS = 4  # so many are told


def ladders(asked: Mapping[str, Any], old: bool = False) -> list[Ladder]:
    """The changes that may save memory where this was asked, the least costly kind first. old: a card before Ampere."""
    training, method = asked.get("train", True), str(asked.get("method") or "").lower()
    batch, tokens, optimizer = asked.get("batch", 1), asked.get("tokens", 1), asked.get("optimizer")
    full, frozen = method == "full", method not in ("", "full") or not training
    found: list[Ladder] = [[{"checkpointing": True}] if training and not asked.get("checkpointing") else []]
    found.append([{"batch": n} | ({"micro_batches": asked.get("micro_batches", 1) * batch // n} if training else {})
                  for n in _parts(batch)])  # fmt: skip
    found.append(_lighter(asked, old) if frozen else [])
    found.append([{"targets": QUERY_VALUE}] if method == "lora" else [])
    if training and str(optimizer).startswith("adamw"):
        smaller = (["adamw"] if optimizer == "adamw_foreach" else []) + (["adamw8bit"] if full else [])
        found.append([{"optimizer": name} for name in smaller if name != optimizer])
    found.append([{"attention": "efficient" if old else "auto"}] if asked.get("attention") in ("math", "eager") else [])
    found.append([{"tokens": n} for n in (tokens // 2, tokens // 4) if n >= 128])
    found.append([{"method": "LoRA", "r": 16}, {"method": "LoRA", "r": 16, "quantize": "nf4"}] if full else [])
    return [ladder for ladder in found if ladder]


def _lighter(asked: Mapping[str, Any], old: bool) -> Ladder:
    """Fewer bits for the frozen base; and for what is kept of a layer's input, which is cast to the adapter's type."""
    wide, quantize = asked.get("dtype") in ("float32", "fp32"), asked.get("quantize")
    found = [{"dtype": "float16" if old else "bfloat16"}] if wide and not quantize else []
    found += [{"quantize": "nf4"}] if quantize in (None, "int8") else []
    if asked.get("train", True) and not old and asked.get("adapter_dtype") in ("float32", "fp32"):
        found.append((found[-1] if found else {}) | {"adapter_dtype": "bfloat16"})
    return found


def _parts(batch: int) -> list[int]:
    """Sizes of micro-batches that add up to a batch: each at most half of the one before, the last 1."""
    found = []
    while batch > 1:
        batch = max(n for n in range(1, batch // 2 + 1) if batch % n == 0)
        found.append(batch)
    return found


class Advice:
    """Finds the changes with which a program fits. A look at one is a prediction and takes seconds: there are few."""

    def __init__(self, memory: Memory, judge: Callable[[Memory], Judged], usable: int, old: bool):
        self.memory, self.judge, self.kinds = memory, judge, ladders(memory.asked, old)
        self.too_heavy = memory.by_kind.get("weights", 0) > usable  # then nothing helps that leaves the weights alone
        self.seen: dict[str, Way | None] = {}

    def given(self, word: str, reserved: int) -> tuple[tuple[Way, ...], Way | None]:
        """(ways out of this, the least need if there are none): single changes; if no cheap one is enough, several."""
        better = WORDS[: WORDS.index(word)]
        ways: list[Way] = []
        for ladder in self.kinds:
            if len(ways) < WAYS and not (self.too_heavy and not ladder[-1].keys() & {"quantize", "method", "dtype"}):
                ways += [way for way in [self.mildest(ladder)] if way and way.word in better]
        if not any(way.word == FITS and not way.changes.keys() & {"tokens", "method"} for way in ways):
            together = self.together()
            if together and together.word in better and together not in ways and (together.word == FITS or not ways):
                ways = [*ways[: WAYS - 1], together]
        known = [way for way in self.seen.values() if way and way.reserved < reserved]
        return tuple(ways), min(known, key=lambda way: way.reserved) if known and not ways else None

    def look(self, changes: Changes) -> Way | None:
        """The prediction with these changes; None if it is refused."""
        if (key := repr(changes)) not in self.seen:
            try:
                judged = self.judge(self.memory.again(**changes))  # type: ignore[misc]
                self.seen[key] = Way(changes, in_words(changes), judged.reserved, judged.word)
            except (ValueError, TypeError, RuntimeError, AttributeError):  # no such modules, packed already, …
                self.seen[key] = None
        return self.seen[key]

    def mildest(self, ladder: Ladder) -> Way | None:
        """The mildest change of one kind that is as good as the strongest; None if that does not fit either."""
        best = self.look(ladder[-1])
        if best is None or best.word == TOO_LARGE:
            return None
        return self.look(_first(ladder, lambda rung: (way := self.look(rung)) is not None and way.word == best.word))

    def together(self) -> Way | None:
        """As many kinds of changes as it takes, as strong as they go; then each given back as far as possible, the
        dearest first."""
        kinds = [kind for kind in self.kinds if self.seen.get(repr(kind[-1]), True) is not None]
        chosen = [kind[-1] for kind in kinds]
        best = self.look(_merged(chosen))
        if best is None or best.word == TOO_LARGE:
            return None

        def enough(some: Sequence[Changes]) -> bool:
            return (way := self.look(_merged(some))) is not None and way.word == best.word

        chosen = _first([chosen[: n + 1] for n in range(len(chosen))], enough)
        for i in reversed(range(len(chosen))):
            chosen = _first([[*chosen[:i], rung, *chosen[i + 1 :]] for rung in ({}, *kinds[i])], enough)
        return self.look(_merged(chosen))


def _first(rungs: Sequence[T], good: Callable[[T], bool]) -> T:
    """The first good one, if the last one is and all are that come after a good one."""
    low, high = -1, len(rungs) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good(rungs[middle]) else (middle, high)
    return rungs[high]


def _merged(changes: Sequence[Changes]) -> Changes:
    return {name: value for change in changes for name, value in change.items()}


def in_words(changes: Mapping[str, Any]) -> str:
    """Changes as one would say them."""
    said = {
        "checkpointing": lambda _: "gradient checkpointing",
        "batch": lambda n: f"batch {n}",
        "micro_batches": lambda n: f"{n} micro-batches a step",
        "dtype": lambda name: f"base in {name}",
        "quantize": lambda kind: f"base in {kind.upper()}",
        "adapter_dtype": lambda name: f"adapters in {name}",
        "targets": lambda _: "adapters on queries and values only",
        "optimizer": lambda name: f"optimizer {name}",
        "attention": lambda name: f"attention {name!r}",
        "tokens": lambda n: f"{n:,} tokens",
        "method": lambda name: f"{name} in place of full fine-tuning",
        "r": lambda r: f"r={r}",
    }
    return ", ".join(said[name](value) for name, value in changes.items())
