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
from collections.abc import Callable
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
    from .intruders import reduce_intruders
    from .lorahub import lorahub

    return {
        "MAM": unions.mam, "UniPELT": unions.unipelt, "FISH mask": inits.fish, "LT-SFT": inits.lottery,
        "KappaTune": inits.kappatune, "O-LoRA": optim.OLoRA, "intruder reduction": reduce_intruders,
        "LoraHub": lorahub,
    }  # fmt: skip


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
    what, *paragraphs = (" ".join(p.split()) for p in (inspect.getdoc(thing) or "").split("\n\n"))
    what = what.partition(". ")[0].rstrip(".")
    what = what.partition(": ")[2] or what
    equation = next((e for p in paragraphs if (e := _equation(p.partition("Source: ")[0]))), "")
    source = next((p.partition("Source: ")[2] for p in paragraphs if "Source: " in p), "")
    year, paper = re.search(r"\b(19|20)\d\d\b", source), PAPER.search(source)
    file = Path(inspect.getsourcefile(thing) or "")
    return Entry(
        name, family, what, equation, count, source,
        int(year[0]) if year else None, paper[1] if paper else None, file.relative_to(HERE).as_posix(),
        len(file.read_text(encoding="utf-8").splitlines()), hf_type, can,
    )  # fmt: skip


def _equation(paragraph: str, longest: int = 96) -> str:
    """The first clause with an = in it, cut at a comma if it is long; of assignments (←), as many as have room."""
    clauses = _cut(paragraph, (". ", ": ", "; "))
    found = next((c for c in clauses if re.search(r" [=←] | becomes ", c)), "")
    joint, parts = ("; ", clauses) if "←" in found else (", ", _cut(found, (", ",)))
    while len(joint.join(parts)) > longest and len(parts) > 1:
        parts.pop()
    return joint.join(parts)


def _cut(text: str, ends: tuple[str, ...]) -> list[str]:
    """A text in pieces, but whole inside of brackets: f([P; E(x)]) is one piece."""
    found, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth <= 0 and text[at : at + 2] in ends:
            found.append(text[start:at])
            start = at + 2
    return [*found, text[start:].strip().rstrip(".")]
