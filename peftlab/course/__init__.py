"""What the notebooks are made of beside the methods: source listings, widgets, exercises with checks, quizzes.

Nothing is imported before it is asked for, so that `import peftlab` needs neither matplotlib nor ipywidgets.
"""

import importlib

_HOME = {  # public name -> module that defines it
    "show": "source",
    "knob": "widgets",
    "Explorer": "widgets",
    "LiveTraining": "widgets",
    "quiz": "quizzes",
    "ledger_explorer": "ledger",
}
_MODULES = ("exercises", "ledger", "quizzes", "source", "style", "widgets")

__all__ = [*_HOME, *_MODULES]  # noqa: PLE0604  (all of them are strings)


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
