"""Exercises with checks: `check("lora_forward", my_function)` says whether it is right, or what is wrong with it.

Each lesson's exercises are a file of this folder: the reference solutions, the cases they are tried on, and typical
mistakes with their hints.
"""

import importlib
import pkgutil

from ..source import Source
from ._frame import EXERCISES, Exercise, Result, find

__all__ = ["EXERCISES", "Exercise", "Result", "Source", "check", "find", "names", "question", "solution", "stub"]

for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):  # the lessons register their exercises
    importlib.import_module(f"{__name__}.{_module}")


def check(name: str, attempt: object = None) -> Result:
    """Print whether an attempt is right, what is wrong with it and a hint, or that it was not tried yet.

    The result is true if the attempt is right. A wrong attempt never raises, whatever it does; an unknown name does:
    KeyError, with the name that was probably meant.
    """
    result = find(name).check(attempt)
    print(result)
    return result


def solution(name: str) -> Source:
    """The reference solution. Try first: reading it teaches less than being wrong once."""
    return find(name).solution()


def question(name: str) -> str:
    """The exercise in words."""
    return find(name).question


def stub(name: str) -> str:
    """The code to fill in, for the author of a notebook: print(stub("lora_forward"))."""
    return find(name).stub


def names(lesson: str | None = None) -> list[str]:
    """The names of all exercises, or of one lesson's."""
    return [one.name for one in EXERCISES.values() if lesson in (None, one.lesson)]
