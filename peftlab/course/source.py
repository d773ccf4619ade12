"""`show(obj)`: the very source that the tests run, as the output of a notebook cell."""

from __future__ import annotations

import inspect
import sys
import textwrap
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True)
class Source:
    """A piece of source code that shows itself in a notebook: where it is from, then the code, highlighted."""

    path: str  # relative to the folder that holds the package: peftlab/methods/lora.py
    first: int | None  # its first line in that file; None for what is not in a file
    code: str

    @property
    def where(self) -> str:
        if self.first is None:
            return self.path
        last = self.first + self.code.count("\n")
        return f"{self.path}, " + (f"line {last}" if last == self.first else f"lines {self.first}–{last}")

    def __repr__(self) -> str:
        return f"# {self.where}\n{self.code}"

    def _repr_markdown_(self) -> str:
        fence = "```"
        while fence in self.code:
            fence += "`"
        return f"{self.where.replace(self.path, f'`{self.path}`', 1)}\n\n{fence}python\n{self.code}\n{fence}\n"


def show(obj: object) -> Source:
    """The source of a class, function, method, property or module, with its file and lines.

    Raises TypeError if there is none to show: built-ins, compiled code, and plain values.
    """
    target = _unwrap(obj)
    try:
        lines, first = inspect.getsourcelines(target)  # type: ignore[arg-type]
        file = inspect.getsourcefile(target) or ""  # type: ignore[arg-type]
    except (TypeError, OSError) as error:
        raise TypeError(_why_not(obj)) from error
    code = textwrap.dedent("".join(lines)).rstrip("\n")
    return Source(_relative(file, target), max(first, 1), code)


def _unwrap(obj: object) -> object:
    """The object that has the source: what a property, a partial or a decorator hides."""
    if isinstance(obj, property) and obj.fget is not None:
        return _unwrap(obj.fget)
    if isinstance(obj, partial):
        return _unwrap(obj.func)
    return inspect.unwrap(obj) if callable(obj) else obj


def _relative(file: str, target: object) -> str:
    """A file's path from the folder that holds its package, or `this notebook` for code typed into a cell."""
    module = target if isinstance(target, ModuleType) else sys.modules.get(getattr(target, "__module__", None) or "")
    name = getattr(module, "__name__", "__main__")
    if name == "__main__" or not Path(file).is_file():
        return "this notebook"
    above = name.count(".") + (Path(file).stem == "__init__")
    return Path(file).relative_to(Path(file).parents[above]).as_posix()


def _why_not(obj: object) -> str:
    name = getattr(obj, "__qualname__", None) or getattr(obj, "__name__", None)
    if inspect.isbuiltin(obj) or inspect.isclass(obj) or inspect.isroutine(obj) or isinstance(obj, ModuleType):
        return f"{name} has no Python source to show: it is built in or compiled; help({name}) describes it"
    kind = type(obj).__name__
    return f"a {kind} object has no source of its own; show(type(obj)) shows its class {kind}"
