"""The table of the whole field: every method, initialisation and optimizer that is here, read off its own source.

    python -m peftlab methods                     # all of them, by family
    python -m peftlab methods DoRA                # one, in full

Equation, count and paper stand in the docstrings, so that there is one place for each; what a class can do is measured
by the laws (tests/test_laws.py) and recorded in catalogue.json by scripts/catalogue.py, with docs/methods.md.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .core import METHODS, Adapter

HERE = Path(__file__).parent
FAMILIES = (
    "low-rank", "shared and vector-based", "Hadamard and Kronecker", "spectral and structured", "orthogonal",
    "selective and sparse", "scaling", "bottleneck", "soft prompt", "representation", "mixture", "side network",
)  # fmt: skip
INITIALISATION, OPTIMIZER, PROCEDURE = "initialisation", "optimizer", "procedure"  # the families of what is no adapter
COMPARED = {  # what tests compare of a method with HF PEFT's, and how it is said
    "outputs": "outputs", "writes": "it reads our file", "reads": "we read its file", "gradients": "gradients",
}  # fmt: skip
FORMULA = re.compile(r" [=←~] | becomes ")
NEW = re.compile(r"(and|as|behind|each|for|from|i = 1|of|over|so|where|with)\b")
PAPER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


@dataclass(frozen=True)
class Entry:
    """One line of the table. `can` has what the laws measured (starts, merges, mixes), and the tests beside peft."""

    name: str
    family: str
    what: str  # the first line of its docstring
    equation: str
    count: str  # the closed formula; "" where nothing is added
    source: str  # authors, year, paper
    year: int | None
    arxiv: str | None
    file: str  # below peftlab/
    lines: int
    hf_type: str | None
    can: dict[str, Any]

    @property
    def link(self) -> str | None:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None


def entries() -> list[Entry]:
    """All of them: methods by family and year, then initialisations, optimizers and procedures. A few milliseconds."""
    from .inits import INITS
    from .optim import OPTIMIZERS

    known = json.loads((HERE / "catalogue.json").read_text(encoding="utf-8"))
    found = [_method(c, known.get(n, {})) for n, c in classes().items()]
    found.sort(key=lambda e: (FAMILIES.index(e.family), e.year or 0, e.name))
    others = {INITIALISATION: INITS, OPTIMIZER: OPTIMIZERS, PROCEDURE: procedures()}
    return found + [_read(name, inspect.unwrap(thing), family, "", None, known.get(name, {}))
                    for family, there in others.items() for name, thing in there.items()]  # fmt: skip


def classes() -> dict[str, type[Adapter]]:
    """METHODS, without those of a reader's own, and Arrow, which is no member because nothing of it is trained."""
    from . import methods  # noqa: F401  fills METHODS
    from .methods.arrow import Arrow

    return {name: c for name, c in METHODS.items() if c.__module__.startswith("peftlab.")} | {"Arrow": Arrow}


def procedures() -> dict[str, Callable]:
    """What is no method, start or optimizer: unions of methods, choices of targets and masks, searches, penalties."""
    from . import inits, optim, unions
    from .adapter_drop import adapter_drop
    from .intruders import reduce_intruders
    from .lorahub import lorahub
    from .replicate import replicate_layers

    return {
        "MAM": unions.mam, "UniPELT": unions.unipelt, "FISH mask": inits.fish, "LT-SFT": inits.lottery,
        "KappaTune": inits.kappatune, "O-LoRA": optim.OLoRA, "intruder reduction": reduce_intruders,
        "LoraHub": lorahub, "layer replication": replicate_layers, "AdapterDrop": adapter_drop,
    }  # fmt: skip


def reference_mark(can: dict[str, Any]) -> str:
    """R: compared with HF PEFT, a method in files both ways, outputs and gradients; r: in part; nothing: not at all."""
    words = set(can.get("reference", ()))
    whole = {"writes", "reads", "gradients"} <= words if words & set(COMPARED) else True
    return ("R" if whole else "r") if words else ""


def compared_in_words(words: Iterable[str]) -> str:
    """What tests compare of it with HF PEFT, as it is said."""
    there = set(words)
    said = [COMPARED[word] for word in COMPARED if word in there]
    if {"reads", "writes"} <= there:
        said = ["files both ways", "outputs", *(["gradients"] if "gradients" in there else [])]
    return ", ".join([*said, *(f"with `{word}`" for word in sorted(there) if word.startswith("peft."))])


def entry(name: str) -> Entry:
    """The one of this name, whatever its case. ValueError, with the nearest names, if there is none."""
    import difflib

    there = {e.name.lower(): e for e in entries()}
    if name.lower() not in there:
        near = difflib.get_close_matches(name.lower(), there, 3, 0.5)
        hint = f"; did you mean {', '.join(there[n].name for n in near)}?" if near else ""
        raise ValueError(f"nothing here is called {name!r}{hint} (python -m peftlab methods lists all)")
    return there[name.lower()]


def _method(method: type[Adapter], can: dict) -> Entry:
    own = method.expected.__doc__ if "expected" in vars(method) and method.expected.__doc__ else method.size.__doc__
    count = "" if own == Adapter.size.__doc__ else " ".join((own or "").split()).rstrip(".")
    count = "nothing" if method.part_of else count  # Arrow
    return _read(method.__name__, method, method.family, count, method.hf_type, can)


def _read(name: str, thing: Any, family: str, count: str, hf_type: str | None, can: dict) -> Entry:
    first, *paragraphs = (inspect.getdoc(thing) or "").split("\n\n")
    what = " ".join(first.split()).partition(". ")[0].rstrip(".")
    before, _, rest = what.partition(": ")
    if rest and (family in FAMILIES or before.lower().startswith(name.lower())):
        what = rest  # without the name
    equation = next((e for p in paragraphs if (e := _equation(p.partition("Source: ")[0]))), "")
    source = next((" ".join(p.split("Source: ")[1].split()) for p in paragraphs if "Source: " in p), "")
    year, paper = re.search(r"\b(19|20)\d\d\b", source), PAPER.search(source)
    file = Path(inspect.getsourcefile(inspect.unwrap(thing)) or "")
    return Entry(
        name, family, what, equation, count, source,
        int(year[0]) if year else None, paper[1] if paper else None, file.relative_to(HERE).as_posix(),
        len(file.read_text(encoding="utf-8").splitlines()), hf_type, can,
    )  # fmt: skip


def _equation(paragraph: str, longest: int = 190) -> str:
    """The first sentence with an = in it, from the clause that has it; a long one is cut where a clause ends.

    Formulas that stand apart, by two spaces or on lines of their own, are clauses.
    """
    text = re.sub(r"\n {4,}(?=\S+(?: \([^)]*\))? [=←] )", "  ", paragraph.strip())
    text = re.sub(r"[,;]? {2,}(?=(?:over|where|with)\b)", ", ", re.sub(r": {2,}", ": ", text))
    text = re.sub(r"[,;.]? {2,}", "; ", re.sub(r"\n *", " ", text))
    clauses: list[str] = []
    for sentence in _cut(text, (". ",)):
        clauses = _cut(sentence, ("; ", ": "))
        while clauses and not FORMULA.search(clauses[0]):
            clauses.pop(0)
        if clauses:
            break
    parts = [part for clause in clauses for part in _parts(clause)]
    while sum(map(len, parts)) > longest and len(parts) > 1:
        parts.pop()
    return "".join(parts).rstrip(" ,;:.")


def _parts(clause: str) -> list[str]:
    """Where a clause can be cut: before " with", or before a comma behind which something new begins."""
    found: list[str] = []
    for piece in _cut(clause, (", ",)):
        if found and not (FORMULA.search(piece) or NEW.match(piece)):
            found[-1] += piece
        else:
            found.append(piece)
    return [part for piece in found for part in re.split(r"(?<= )(?=(?:with|where) )", piece)]


def _cut(text: str, ends: tuple[str, ...]) -> list[str]:
    """A text in pieces with their ends, but whole inside of brackets: f([P; E(x)]) is one piece."""
    found, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth <= 0 and text[at : at + 2] in ends:
            found.append(text[start : at + 2])
            start = at + 2
    return [*found, text[start:]]
