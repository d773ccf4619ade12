"""A quiz: multiple choice, with an explanation of every choice, right or wrong."""

from __future__ import annotations

import html
import textwrap
from dataclasses import dataclass

import ipywidgets

from .. import style
from ..widgets import bundle


@dataclass(frozen=True)
class Choice:
    text: str
    why: str  # why it is right, or what is wrong with it
    right: bool = False


@dataclass(frozen=True)
class Question:
    """A question, its choices (exactly one of them right), and where the answer can be looked up."""

    text: str
    choices: tuple[Choice, ...]
    source: str = ""

    def __post_init__(self) -> None:
        right = sum(choice.right for choice in self.choices)
        if right != 1:
            raise ValueError(f"{self.text!r} has {right} right choices; exactly one is needed")
        if len({choice.text for choice in self.choices}) < len(self.choices):
            raise ValueError(f"{self.text!r} has the same choice twice")


def yes(text: str, why: str) -> Choice:
    """The right choice."""
    return Choice(text, why, right=True)


def no(text: str, why: str) -> Choice:
    """A wrong choice."""
    return Choice(text, why)


class Quiz(ipywidgets.VBox):
    """The questions of a lesson. Choosing an answer (mouse, or Tab and space) shows why it is right or wrong.

    The text that a notebook stores has the questions and choices without the answers.
    """

    def __init__(self, lesson: str, questions: tuple[Question, ...]):
        self.lesson, self.questions = lesson, questions
        self.radios: list[ipywidgets.RadioButtons] = []
        self.explanations: list[ipywidgets.HTML] = []
        self.score = ipywidgets.HTML()
        parts = [part for number, one in enumerate(questions) for part in self._build(number, one)]
        super().__init__([*parts, self.score])
        self.add_class("peftlab-quiz")
        self._count()

    def choose(self, question: int, letter: str) -> str:
        """Answer from code, quiz.choose(1, "b"), and return the explanation. Questions count from 1."""
        if not 1 <= question <= len(self.questions):
            raise ValueError(f"no question {question}; they are numbered from 1 to {len(self.questions)}")
        letters = "abcdefgh"[: len(self.questions[question - 1].choices)]
        if len(letter) != 1 or letter not in letters:
            raise ValueError(f"question {question} has no choice {letter!r}; it has {', '.join(letters)}")
        self.radios[question - 1].index = letters.index(letter)
        return self.questions[question - 1].choices[letters.index(letter)].why

    @property
    def right(self) -> int:
        """How many questions are answered right at the moment."""
        chosen = zip(self.questions, self.radios, strict=True)
        return sum(radio.index is not None and one.choices[radio.index].right for one, radio in chosen)

    def _build(self, number: int, question: Question) -> tuple[ipywidgets.Widget, ...]:
        ask = f"<b>{number + 1}.</b> {html.escape(question.text)}"
        wide = ipywidgets.Layout(width="auto")
        radio = ipywidgets.RadioButtons(
            options=[choice.text for choice in question.choices], value=None, layout=wide, tooltip=question.text
        )
        explanation = ipywidgets.HTML()
        radio.observe(lambda change: self._explain(number), "index")
        self.radios.append(radio)
        self.explanations.append(explanation)
        return ipywidgets.HTML(f'<div style="line-height: 1.4; max-width: 60em">{ask}</div>'), radio, explanation

    def _explain(self, number: int) -> None:
        question, index = self.questions[number], self.radios[number].index
        if index is None:
            self.explanations[number].value = ""
        else:
            choice = question.choices[index]
            colour, sign = (style.GREEN, "✔ Right.") if choice.right else (style.RED, "✘ Not quite.")
            source = f" <i>{html.escape(question.source)}</i>" if question.source else ""
            self.explanations[number].value = (
                f'<div style="border-left: 4px solid {colour}; padding-left: 8px; margin-bottom: 10px;'
                f' line-height: 1.4; max-width: 60em"><b>{sign}</b> {html.escape(choice.why)}{source}</div>'
            )
        self._count()

    def _count(self) -> None:
        answered = sum(radio.index is not None for radio in self.radios)
        text = f"{self.right} of {len(self.questions)} right" if answered else "Choose an answer to see why."
        self.score.value = f"<b>{text}</b>"

    def __repr__(self) -> str:
        lines = [f"Quiz {self.lesson} (choose an answer in the live notebook to see why it is right or wrong)"]
        for number, one in enumerate(self.questions, start=1):
            lines += ["", *_wrapped(f"{number}. {one.text}", "   ")]
            for letter, choice in zip("abcdefgh", one.choices, strict=False):
                lines += _wrapped(f"   ({letter}) {choice.text}", "       ")
        return "\n".join(lines)

    def _repr_mimebundle_(self, **kwargs: object) -> dict[str, object]:
        return bundle(self)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, 100, subsequent_indent=indent, break_on_hyphens=False)
