"""Many methods on several tasks, in one table: what each is worth beside full fine-tuning, and what it costs.

    board = leaderboard(lab.read("classic"), lab.costs("classic"))      # best first
    board[pareto(board, "quality", "parameters", "decode")]             # those that no other method beats in all three
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import lab

if TYPE_CHECKING:
    import pandas

FULL = "full"  # the method that the others are measured by
COSTS = ("bytes", "step", "prefill", "decode", "mergeable")


def leaderboard(runs: pandas.DataFrame, costs: pandas.DataFrame) -> pandas.DataFrame:
    """One line per method of the runs, the highest `quality` first; equal ones in the order of the runs.

    runs: as of `lab.read`, with columns task and method. costs: as of `lab.costs`; a method that is not in it has nan.

    Columns. One per task: mean test accuracy (0 to 1) over the seeds, at the rate chosen on VALID. "<task> / full": the
    same as a share of full fine-tuning's. quality: the mean of these shares; low, high: the lowest and highest share of
    one seed on one task, always of full fine-tuning's mean, so that full fine-tuning itself has a range too.
    parameters: trained. percent: of those that full fine-tuning trains. bytes: of the stored file. step: time of a
    training step beside full fine-tuning; prefill, decode: beside the bare base, unmerged. mergeable.

    Where guessing is worth something, so is its share: on two classes no method has less than half of the accuracy.
    A method that lacks a task has no quality (nan) and stands last: a mean over other tasks would be another figure.
    Raises ValueError if full fine-tuning is missing on a task, or has an accuracy of 0 there: no shares of that.
    """
    import pandas

    chosen = lab.chosen(runs, ["task", "method"])
    means = chosen.groupby(["task", "method"], sort=False)["test_accuracy"].mean()
    tasks, methods = (list(dict.fromkeys(runs[column])) for column in ("task", "method"))
    for task in tasks:
        if not means.get((task, FULL), 0.0) > 0:
            raise ValueError(f"full fine-tuning ({FULL!r}) has no accuracy above 0 on {task!r} to measure others by")
    full, lines = int(chosen.loc[chosen["method"] == FULL, "parameters"].iloc[0]), {}
    for name in methods:
        mine = chosen[chosen["method"] == name]
        shares = mine["test_accuracy"] / mine["task"].map(lambda task: means[task, FULL])
        parameters = int(mine["parameters"].iloc[0])
        line = {task: float(means.get((task, name), float("nan"))) for task in tasks}
        line |= {f"{task} / full": line[task] / float(means[task, FULL]) for task in tasks}
        whole = set(mine["task"]) == set(tasks)
        line["quality"] = sum(line[f"{task} / full"] for task in tasks) / len(tasks)
        line |= {"low": shares.min(), "high": shares.max()} if whole else dict.fromkeys(("low", "high"), float("nan"))
        line |= {"parameters": parameters, "percent": 100 * parameters / full}
        lines[name] = line
    board = pandas.DataFrame.from_dict(lines, orient="index").rename_axis("method")
    board = board.join(costs[list(COSTS)])
    return board.sort_values("quality", ascending=False, kind="stable", na_position="last")


def pareto(table: pandas.DataFrame, quality: str, *costs: str) -> pandas.Series:
    """Which lines no other line dominates: a boolean column, with the table's index.

    A line dominates another if it is at least as good in all the named columns and better in one; `quality` is better
    when it is higher, each of `costs` when it is lower. Equal lines do not dominate each other. A line with a missing
    figure (nan) cannot be compared: it is not on the front and keeps nobody from it.
    Raises ValueError for a column that the table does not have.
    """
    import pandas

    if missing := [column for column in (quality, *costs) if column not in table]:
        raise ValueError(f"the table has no column {missing[0]!r}; it has {', '.join(table)}")
    figures = table[[quality, *costs]].astype(float).to_numpy() * [-1, *[1] * len(costs)]  # lower is better in all
    front = []
    for line in figures:
        dominates = (figures <= line).all(1) & (figures < line).any(1)  # nan compares false
        front.append(not dominates.any() and (line == line).all())
    return pandas.Series(front, index=table.index, name="pareto", dtype=bool)
