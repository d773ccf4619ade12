"""What several verbs read in the same way."""

from __future__ import annotations

import ast
from typing import Any


def pair(text: str) -> tuple[str, Any]:
    """KEY=VALUE, with the value read as Python writes numbers, lists and truth; anything else is a word."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise ValueError(f"--set {text!r} is not KEY=VALUE, such as alpha=32")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def hyper(pairs: list[str], rank: int | None) -> dict[str, Any]:
    """The hyper-parameters of a method, from --set and --rank."""
    return dict(map(pair, pairs)) | ({} if rank is None else {"r": rank})


def shape_lines() -> list[str]:
    """The built-in shapes, for --list."""
    from ..shapes import shapes

    wide = max(map(len, shapes()))
    lines = [f"  {name:<{wide}}  {entry['hub'] or 'Brown et al. 2020, arXiv:2005.14165, table 2.1'}"
             for name, entry in shapes().items()]  # fmt: skip
    return ["built-in shapes, each with the Hub id that its numbers come from", *lines]
