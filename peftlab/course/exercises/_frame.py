"""How an exercise is checked: the attempt, the reference and the typical mistakes all do the same cases.

An attempt that agrees with the reference on every case is right. One that agrees with a known mistake on every case
gets that mistake's hint. Any other gets the first case that differs, and the exercise's own hint.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import math
import numbers
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..source import Source, show

EXERCISES: dict[str, Exercise] = {}  # by name, filled as the files of the lessons are imported

Function = Callable[..., Any]
RTOL, ATOL = 1e-4, 1e-5  # float32 sums of a few dozen products, added up in any order


@dataclass(frozen=True)
class Mistake:
    """A typical wrong answer and the hint that its author needs."""

    answer: Any  # a function, or for a question with a fixed set of answers one of these
    hint: str


@dataclass
class Exercise:
    """A question with a stub, a reference solution, cases to try it on, and typical mistakes."""

    name: str
    lesson: str
    question: str
    reference: Any
    cases: Callable[[], list[tuple]]
    hint: str  # for wrong answers that are not among the mistakes
    mistakes: list[Mistake] = field(default_factory=list)
    why: str = ""  # said after a right answer

    @property
    def is_function(self) -> bool:
        return callable(self.reference)

    @property
    def stub(self) -> str:
        """What the learner finds in the notebook: the head, the question, and three dots to replace."""
        if not self.is_function:
            words = textwrap.fill(self.question, 100, initial_indent="# ", subsequent_indent="# ")
            return f"{words}\n{self.name} = ..."
        words = self.question + ("\n" if "\n" in self.question else "")
        body = textwrap.indent(f'"""{words}"""\n...', "    ")
        return f"def {self.name}{inspect.signature(self.reference)}:\n{body}"

    def mistake(self, hint: str) -> Callable[[Function], Function]:
        """Decorate a wrong answer with the hint that it must get."""

        def note(answer: Function) -> Function:
            self.mistakes.append(Mistake(answer, hint))
            return answer

        return note

    def check(self, attempt: object) -> Result:
        """Compare an attempt with the reference. Never raises for what the attempt does."""
        try:
            return self._judge(attempt)
        except Exception as error:  # an answer may refuse even to be compared or printed: a meta tensor, say
            return self._wrong(f"what it returned cannot be compared ({type(error).__name__}). Hint: {self.hint}")

    def _judge(self, attempt: Any) -> Result:
        if _blank(attempt):
            return Result(self.name, "not tried yet")
        if self.is_function and not callable(attempt):
            what = type(attempt).__name__
            return self._wrong(f"this exercise takes a function, got a {what}: check({self.name!r}, {self.name})")
        if not self.is_function:
            return self._check_answer(attempt)
        cases = self.cases()
        trouble = _signature_trouble(attempt, self.reference, cases[0])
        if trouble:
            return self._wrong(trouble)
        got = [_run(attempt, case) for case in cases]
        if all(_blank(one.value) and one.error in (None, "NotImplementedError") for one in got):
            return Result(self.name, "not tried yet")
        wanted = [_run(self.reference, case) for case in cases]
        if _agree(got, wanted):
            return Result(self.name, "right", self.why)
        for known in self.mistakes:
            if _agree(got, [_run(known.answer, case) for case in cases]):
                return self._wrong(known.hint)
        names = list(inspect.signature(self.reference).parameters)
        return self._wrong(f"{_difference(got, wanted, names)}. Hint: {self.hint}")

    def _check_answer(self, attempt: object) -> Result:
        if _same(attempt, self.reference):
            return Result(self.name, "right", self.why)
        for known in self.mistakes:
            if _same(attempt, known.answer):
                return self._wrong(known.hint)
        return self._wrong(f"{attempt!r} is not one of the answers. {self.hint}")

    def _wrong(self, message: str) -> Result:
        return Result(self.name, "not right yet", message)

    def solution(self) -> Source:
        """The reference, to be shown on request."""
        if not self.is_function:
            return Source(f"the answer to {self.name}", None, f"{self.name} = {self.reference!r}  # {self.why}")
        source = show(self.reference)
        before, head, rest = source.code.partition(f"def {self.name}(")  # the decorator above says nothing to a learner
        return Source(source.path, (source.first or 1) + before.count("\n"), head + rest)


@dataclass(frozen=True)
class Result:
    """What `check` found: true if right. It has been printed already, so it shows nothing itself."""

    name: str
    status: str  # "not tried yet", "not right yet" or "right"
    message: str = ""

    def __bool__(self) -> bool:
        return self.status == "right"

    def __str__(self) -> str:
        sign = {"right": "✔", "not right yet": "✘"}.get(self.status, "…")
        join = ". " if self else ": "
        return f"{sign} {self.name}: {self.status}" + (join + self.message if self.message else "")

    def _ipython_display_(self) -> None:
        pass


def exercise(lesson: str, hint: str, cases: Callable[[], list[tuple]]) -> Callable[[Function], Exercise]:
    """Decorate the reference solution; its docstring is the question."""

    def register(reference: Function) -> Exercise:
        new = Exercise(reference.__name__, lesson, inspect.getdoc(reference) or "", reference, cases, hint)
        EXERCISES[new.name] = new
        return new

    return register


def prediction(name: str, lesson: str, question: str, right: str, why: str, wrong: dict[str, str]) -> Exercise:
    """A question with a few answers, one of them right; each wrong one with its hint."""
    answers = ", ".join(map(repr, sorted([right, *wrong])))
    mistakes = [Mistake(answer, hint) for answer, hint in wrong.items()]
    hint = f"The answers are {answers}."
    new = Exercise(name, lesson, f"{question} {hint}", right, list, hint, mistakes, why)
    EXERCISES[name] = new
    return new


def find(name: str) -> Exercise:
    """The exercise of that name. Raises KeyError with the names that were probably meant."""
    if name in EXERCISES:
        return EXERCISES[name]
    close = difflib.get_close_matches(str(name), EXERCISES, n=2, cutoff=0.5)
    cure = f"did you mean {' or '.join(map(repr, close))}?" if close else f"there are {', '.join(EXERCISES)}"
    raise UnknownName(f"no exercise {name!r}; {cure}")


class UnknownName(KeyError):
    """A KeyError that prints its message as it is, without quotes around it."""

    def __str__(self) -> str:
        return str(self.args[0])


# --------------------------------------------------------------------------------------- what a function did


@dataclass(frozen=True)
class Outcome:
    """What a function did with one case: its value or its error, and which arguments it changed."""

    value: Any = None
    error: str | None = None
    message: str = ""
    changed: tuple[int, ...] = ()


def _run(function: Function, case: tuple) -> Outcome:
    arguments = copy.deepcopy(case)
    try:
        value = function(*arguments)
    except (Exception, SystemExit) as error:  # any failure of a learner's code is an answer to judge, not ours
        return Outcome(error=type(error).__name__, message=str(error).split("\n")[0])
    changed = tuple(i for i, (old, new) in enumerate(zip(case, arguments, strict=True)) if not _untouched(old, new))
    return Outcome(value, changed=changed)


def _untouched(old: object, new: object) -> bool:
    if isinstance(old, nn.Module) and isinstance(new, nn.Module):
        before, after = dict(old.named_parameters()), dict(new.named_parameters())
        return before.keys() == after.keys() and all(
            p.requires_grad == after[name].requires_grad and torch.equal(p, after[name]) for name, p in before.items()
        )
    return torch.equal(old, new) if isinstance(old, Tensor) and isinstance(new, Tensor) else bool(old == new)


def _agree(some: Iterable[Outcome], others: Iterable[Outcome]) -> bool:
    return all(
        a.error == b.error and a.changed == b.changed and (a.error is not None or _same(a.value, b.value))
        for a, b in zip(some, others, strict=True)
    )


def _same(a: Any, b: Any) -> bool:
    """Whether two answers are equal, up to rounding."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=RTOL, atol=ATOL)
    if isinstance(a, str) and isinstance(b, str):
        return a.strip().casefold() == b.strip().casefold()
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    x, y = _number(a), _number(b)
    return x is not None and y is not None and math.isclose(x, y, rel_tol=1e-6)


def _number(value: object) -> float | None:
    """The value of a number, also of NumPy's and of a tensor without dimensions; None for anything else."""
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex():
        value = value.item()
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else None


def _blank(value: object) -> bool:
    return value is None or value is ... or value is NotImplemented


# ------------------------------------------------------------------------------------- telling the difference


def _signature_trouble(attempt: Function, reference: Function, case: tuple) -> str:
    try:
        inspect.signature(attempt).bind(*case)
    except TypeError:
        return f"it must take {len(case)} arguments, {inspect.signature(reference)}"
    except ValueError:  # compiled functions have no signature to look at
        pass
    return ""


def _difference(got: list[Outcome], wanted: list[Outcome], names: list[str]) -> str:
    """The first case that differs, in words: error, kind, shape, value, or an argument that was changed."""
    for number, (g, w) in enumerate(zip(got, wanted, strict=True), start=1):
        if _agree([g], [w]):
            continue
        case = f"in test {number} of {len(got)}"
        if g.error:
            return f"{case} it raised {g.error}" + (f": {g.message}" if g.message else "")
        if g.changed != w.changed:
            return f"{case} it changed its argument {names[g.changed[0]]} in place"
        return f"{case} it returned {_unlike(g.value, w.value)}"
    return "it differs"


def _unlike(got: Any, wanted: Any) -> str:
    if _blank(got):
        return "nothing"
    if isinstance(wanted, Tensor):
        if not isinstance(got, Tensor):
            return f"a {type(got).__name__} where a tensor is expected"
        if got.shape != wanted.shape:
            return f"the shape {tuple(got.shape)} instead of {tuple(wanted.shape)}"
        return f"the right shape, but values that differ by up to {(got.double() - wanted.double()).abs().max():.3g}"
    kind = dict if isinstance(wanted, dict) else (tuple, list)
    if isinstance(wanted, (tuple, dict)):
        if not isinstance(got, kind):
            return f"a {type(got).__name__} where a {type(wanted).__name__} is expected"
        if len(got) != len(wanted):
            return f"{len(got)} values instead of {len(wanted)}"
    if isinstance(wanted, dict):
        if got.keys() != wanted.keys():
            return f"the keys {', '.join(map(str, got))} instead of {', '.join(wanted)}"
        first = next(key for key in wanted if not _same(got[key], wanted[key]))
        return f"for {first!r} {_unlike(got[first], wanted[first])}"
    if isinstance(wanted, tuple):
        place = next(i for i in range(len(wanted)) if not _same(got[i], wanted[i]))
        return f"as value {place + 1} {_unlike(got[place], wanted[place])}"
    return f"{_short(got)} instead of {_short(wanted)}"


def _short(value: object) -> str:
    number = _number(value)
    text = repr(value) if number is None or isinstance(value, int) else f"{number:.6g}"
    return text if len(text) <= 60 else text[:57] + "…"
