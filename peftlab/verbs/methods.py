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
import shutil
import textwrap

HELP = "list the whole field: equation, count formula, paper, abilities"
MARKS = (("starts", "S", "starts at the base"), ("merges", "M", "merges into the weights"),
         ("mixes", "B", "runs in mixed batches"), ("reads", "W", "reads the dense weight"),
         ("data", "D", "needs data to begin"))  # fmt: skip


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
    from ..catalogue import reference_mark

    return "".join(letter if can.get(key) else "·" for key, letter, _ in MARKS) + (reference_mark(can) or "·")


def _table(found: list) -> str:
    width = shutil.get_terminal_size((100, 24)).columns
    key = "; ".join(f"{letter} {words}" for _, letter, words in MARKS)
    lines = textwrap.wrap(
        f"{len(found)} in all. {key}; R compared with HF PEFT in files both ways, outputs and gradients (or with its "
        "function), r in part. Then the equation, and in brackets the numbers that one site trains. "
        "`python -m peftlab methods NAME` shows one in full.", width)  # fmt: skip
    wide, family = max(len(e.name) for e in found), None
    for e in found:
        if e.family != family:
            family = e.family
            lines += ["", family.upper()]
        lines += _wrapped(f"  {e.name:<{wide}}  {e.year or '':>4}  {_marks(e.can)}  ", e.what, width)
        for text in (e.equation, f"[{e.count}]" if e.count else ""):
            lines += _wrapped(" " * 4, text, width)
    return "\n".join(lines)


def _wrapped(head: str, text: str, width: int) -> list[str]:
    """The text behind `head`, its further lines below its first one; a formula with no blank in it stays whole."""
    indent = " " * min(len(head), width // 3)
    return textwrap.wrap(text, max(width, 40), initial_indent=head, subsequent_indent=indent, break_long_words=False,
                         break_on_hyphens=False)  # fmt: skip


def _one(e) -> str:
    from ..catalogue import compared_in_words

    width = shutil.get_terminal_size((100, 24)).columns
    rows = [("family", e.family), ("equation", e.equation), ("count", e.count), ("source", e.source),
            ("", e.link or ""), ("file", f"peftlab/{e.file}, {e.lines} lines"),
            ("HF PEFT", e.hf_type or "")]  # fmt: skip
    there = e.can.get("reference", {})
    if there:
        tests = sorted({test for found in there.values() for test in found})
        rows.append(("compared", f"{compared_in_words(there)} (in tests/{', tests/'.join(tests)})"))
    lines = _wrapped("", f"{e.name}: {e.what}.", width)
    for name, text in rows:
        lines += _wrapped(f"{name:<10}", text, width)
    able = [f"{'yes' if e.can[key] else 'no':<4} {words}" for key, _, words in MARKS if key in e.can]
    return "\n".join([*lines, "", *able]).rstrip()
