"""`side_by_side(...)`: a model's SQL beside the gold query, with what each of them gives, as a small table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from . import style

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler

SHOWN = 3  # rows of a result that are spelt out


def result_of(db: str, query: str, shown: int = SHOWN) -> str:
    """What a query gives on the first database of a schema: its first rows and how many there are, or the error."""
    from ..tasks import sql

    result = sql.run(db, query)
    if result.rows is None:
        return f"error: {result.error}"
    if not result.rows:
        return "no rows"
    first = "; ".join(", ".join(_value(value) for value in row) for row in result.rows[:shown])
    more = len(result.rows) - shown
    return f"{first}; … and {more} more" if more > 0 else first


def _value(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def side_by_side(predictions: Iterable[Mapping], shown: int = SHOWN) -> Styler:
    """A table with one line per prediction: question, the model's SQL and its rows, the gold SQL and its rows, ✔ or ✘.

    predictions: those of `execution_accuracy(…)`, or some of them: `side_by_side(score.predictions[:4])`.
    ✔ means the same rows on each of several databases (`peftlab.tasks.sql.grade`); shown are those of the first.
    Raises ValueError if there are none or they are not graded SQL.
    """
    import pandas

    lines = []
    for p in predictions:
        if missing := [key for key in ("prompt", "expected", "got", "right", "db") if key not in p]:
            raise ValueError(f"these are no graded SQL answers: {missing[0]!r} is missing; "
                             "pass execution_accuracy(…).predictions")  # fmt: skip
        question = p["prompt"].removeprefix("Question: ").split("\nSQL:")[0]
        lines.append((question, p["got"], result_of(p["db"], p["got"], shown), p["expected"],
                      result_of(p["db"], p["expected"], shown), "✔" if p["right"] else "✘"))  # fmt: skip
    if not lines:
        raise ValueError("nothing to show: the list of predictions is empty")
    columns = ["question", "the model's SQL", "its rows", "the gold SQL", "gold rows", "right"]
    left = {"text-align": "left", "vertical-align": "top", "white-space": "normal", "overflow-wrap": "anywhere"}
    table = pandas.DataFrame(lines, columns=columns).style.hide(axis="index").format(escape="html")
    table = table.set_table_styles([{"selector": "th", "props": "text-align: left"}])
    table = table.set_properties(subset=columns[:-1], **left)
    table = table.set_properties(subset=columns[1:5:2], **{"font-family": "monospace"})
    return table.map(lambda sign: f"color: {style.GREEN if sign == '✔' else style.RED}", subset=["right"])
