"""All methods, initialisations and optimizers that are here: equation, count, paper, and what each can do.

  python -m peftlab methods
  python -m peftlab methods DoRA
  python -m peftlab methods --family orthogonal
  python -m peftlab methods --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json

HELP = "list the whole field: equation, count formula, paper, abilities"
MARKS = (("starts", "S", "starts at the base"), ("merges", "M", "merges into the weights"),
         ("mixes", "B", "runs in mixed batches"), ("reads", "W", "reads the dense weight"),
         ("data", "D", "needs data to begin"), ("reference", "R", "compared with HF PEFT"))  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("name", nargs="?", help="one of them, in full")
    which.add_argument("--family", metavar="WORDS", help="only the families whose name has these words")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> None:
    from ..catalogue import entries, entry

    found = [entry(args.name)] if args.name else entries()
    if args.family:
        families = list(dict.fromkeys(e.family for e in found))
        found = [e for e in found if args.family.lower() in e.family.lower()]
        if not found:
            raise ValueError(f"no family's name has {args.family!r} in it; there are {', '.join(families)}")
    if args.json:
        print(json.dumps([dataclasses.asdict(e) for e in found], indent=1, ensure_ascii=False))
    elif args.name:
        print(_one(found[0]))
    else:
        print(_table(found))


def _marks(can: dict) -> str:
    return "".join(letter if can.get(key) else "·" for key, letter, _ in MARKS)


def _table(found: list) -> str:
    wide = max(len(e.name) for e in found)
    lines, family = [], None
    for e in found:
        if e.family != family:
            family = e.family
            lines += ["", family.upper()]
        lines.append(f"  {e.name:<{wide}}  {e.year or '':>4}  {_marks(e.can)}  {e.what}")
        if e.equation or e.count:
            lines.append(f"  {'':<{wide}}        {e.equation}{f'   [{e.count}]' if e.count else ''}")
    key = ", ".join(f"{letter} {words}" for _, letter, words in MARKS)
    return "\n".join([f"{len(found)} in all. {key}; in brackets what a layer trains.", *lines])


def _one(e) -> str:
    able = [f"{'yes' if e.can.get(key) else 'no':<4} {words}" for key, _, words in MARKS]
    parts = [f"{e.name}: {e.what}.", f"family    {e.family}", f"equation  {e.equation}"]
    parts += [f"count     {e.count}"] if e.count else []
    parts += [f"source    {e.source}"] + ([f"          {e.link}"] if e.link else [])
    parts += [f"file      peftlab/{e.file}, {e.lines} lines"] + ([f"HF PEFT   {e.hf_type}"] if e.hf_type else [])
    return "\n".join([*parts, "", *(able if e.can else [])]).rstrip()
