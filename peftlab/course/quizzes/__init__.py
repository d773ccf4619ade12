"""Quizzes, one file per lesson: `quiz("02_lora")` asks, and explains every answer."""

import difflib
import importlib
from pathlib import Path

from ._frame import Question, Quiz

__all__ = ["lessons", "questions", "quiz"]

_PREFIX = "lesson_"


def lessons() -> list[str]:
    """The lessons that have a quiz."""
    return sorted(file.stem.removeprefix(_PREFIX) for file in Path(__file__).parent.glob(f"{_PREFIX}*.py"))


def questions(lesson: str) -> tuple[Question, ...]:
    """The questions of a lesson, with choices and explanations. Raises ValueError for a lesson without a quiz."""
    known = lessons()
    if lesson not in known:
        close = difflib.get_close_matches(str(lesson), known, n=1, cutoff=0.4)
        inside = [name for name in known if str(lesson) and str(lesson) in name]
        cure = f"did you mean {(inside or close)[0]!r}?" if inside or close else f"there are {', '.join(known)}"
        raise ValueError(f"no quiz for lesson {lesson!r}; {cure}")
    return importlib.import_module(f"{__name__}.{_PREFIX}{lesson}").QUESTIONS


def quiz(lesson: str) -> Quiz:
    """The quiz of a lesson as a widget. Raises ValueError for a lesson without one."""
    return Quiz(lesson, questions(lesson))
