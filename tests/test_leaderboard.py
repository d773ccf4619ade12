"""The leaderboard: its figures by hand, what was recorded, and the laws of the Pareto front."""

import math

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftlab import lab
from peftlab.leaderboard import COSTS, leaderboard, pareto

TASKS = ("sql", "reviews", "voices")


def made(**accuracies):
    """Runs of two tasks: method -> {task: accuracies of seeds 0, 1, …}, at a rate of 1, and one run at a worse rate."""
    lines = []
    for method, tasks in accuracies.items():
        for task, seeds in tasks.items():
            shared = {"task": task, "method": method, "parameters": {"full": 1000}.get(method, 20)}
            for seed, value in enumerate(seeds):
                lines.append(shared | {"learning_rate": 1.0, "seed": seed, "valid_accuracy": 0.5, "valid_loss": 1.0,
                                       "test_accuracy": value})  # fmt: skip
            lines.append(shared | {"learning_rate": 9.0, "seed": 0, "valid_accuracy": 0.4, "valid_loss": 1.0,
                                   "test_accuracy": 1.0})  # fmt: skip
    return pandas.DataFrame(lines)


def priced(*methods):
    figures = [[80, 0.5, 1.5, 1.25, True] for _ in methods]
    return pandas.DataFrame(figures, index=pandas.Index(methods, name="method", dtype=object), columns=list(COSTS))


def test_figures_by_hand():
    runs = made(B={"x": [0.2, 0.4], "y": [0.5, 0.5]}, full={"x": [0.5, 0.7], "y": [1.0, 0.6]},
                A={"x": [0.6, 0.6], "y": [0.8, 0.8]})  # fmt: skip
    board = leaderboard(runs, priced("A", "full"))
    assert list(board.index) == ["full", "A", "B"], "equal ones in the order of the runs"
    assert list(board) == ["x", "y", "x / full", "y / full", "quality", "low", "high", "parameters", "percent", *COSTS]
    full, B = board.loc["full"], board.loc["B"]
    assert (full["quality"], full["x / full"], full["percent"]) == (1, 1, 100)
    assert (full["low"], full["high"]) == pytest.approx((0.6 / 0.8, 1.0 / 0.8))
    assert (B["x"], B["y"], B["x / full"], B["y / full"]) == pytest.approx((0.3, 0.5, 0.3 / 0.6, 0.5 / 0.8))
    assert B["quality"] == pytest.approx((0.3 / 0.6 + 0.5 / 0.8) / 2)
    assert (B["low"], B["high"]) == pytest.approx((0.2 / 0.6, 0.4 / 0.6))
    assert (B["parameters"], B["percent"]) == (20, pytest.approx(2))
    assert board.loc["A", list(COSTS)].tolist() == [80, 0.5, 1.5, 1.25, True] and B[list(COSTS)].isna().all()


def test_the_rate_is_chosen_on_valid_and_never_on_test():
    runs = made(full={"x": [0.5]}, A={"x": [0.1]})
    assert leaderboard(runs, priced()).loc["A", "x"] == 0.1
    runs.loc[runs.learning_rate == 9, "valid_accuracy"] = 0.6
    assert leaderboard(runs, priced()).loc["A", "x"] == 1.0


def test_a_method_that_lacks_a_task_has_no_quality_and_stands_last():
    board = leaderboard(made(A={"x": [0.9]}, full={"x": [0.5], "y": [0.5]}, B={"x": [0.0], "y": [0.0]}), priced())
    assert list(board.index) == ["full", "B", "A"]
    assert board.loc["A", ["quality", "low", "high", "y"]].isna().all() and board.loc["A", "x / full"] == 1.8


@pytest.mark.parametrize("full", [{"x": [0.5]}, {"x": [0.5], "y": [0.0]}])
def test_without_full_fine_tuning_there_is_no_share(full):
    with pytest.raises(ValueError, match="'full'.*'y'"):
        leaderboard(made(full=full, A={"x": [0.5], "y": [0.5]}), priced())


def test_recorded():
    runs, costs = lab.read("classic"), lab.costs("classic")
    board = leaderboard(runs, costs)
    assert sorted(board.index) == sorted(set(runs.method)) and set(board.index) <= set(costs.index)
    full = board.loc["full"]
    assert full["quality"] == 1 and all(full[f"{task} / full"] == 1 for task in TASKS) and full["percent"] == 100
    assert full["step"] == 1 and full["low"] < 1 < full["high"] and not full["mergeable"]
    assert board["quality"].is_monotonic_decreasing and board["quality"].notna().all()
    assert (board["low"] <= board["quality"]).all() and (board["quality"] <= board["high"]).all()
    summary = lab.summary(runs, ["task", "method"])
    for name, line in board.iterrows():
        assert all(line[task] == pytest.approx(summary.loc[(task, name), "mean"]) for task in TASKS)
        assert line["parameters"] == summary.loc[("sql", name), "parameters"]
    assert (board["parameters"] == costs["parameters"].reindex(board.index))[board["step"].notna()].all()
    front = board[pareto(board, "quality", "parameters", "bytes")]
    assert front.index[0] == board.index[0] and board["parameters"].idxmin() in front.index
    field = leaderboard(lab.read("field").query("kind == 'method'").assign(task="voices"), costs)
    assert field[["quality", "step", "bytes"]].notna().all().all(), "whoever is in the field has its costs measured"
    assert front["parameters"].is_monotonic_decreasing, "along the front, what is worse is smaller"


# ----------------------------------------------------------------------------------------------------- Pareto front


def front(lines, *costs, columns=("q", "c", "d")):
    table = pandas.DataFrame(lines, columns=list(columns)[: len(lines[0])] if lines else list(columns))
    return pareto(table, "q", *costs).tolist()


def test_front_by_hand():
    lines = [(9, 5), (8, 5), (9, 6), (7, 1), (7, 1), (6, 1), (1, 2)]
    assert front(lines, "c") == [True, False, False, True, True, False, False], "equal lines stay together"
    assert front(lines) == [True, False, True, False, False, False, False], "quality alone: the highest"
    assert front([], "c", "d") == [] and front([(1, 2, 3)], "c", "d") == [True]
    two = [(1, 2, 3), (1, 3, 2)]
    assert front(two, "c", "d") == [True, True] and front(two, "c") == [True, False]


def test_what_is_not_known_is_not_on_the_front_and_keeps_nobody_from_it():
    lines = [(9, math.nan, 1), (5, 5, 5), (math.nan, 0, 0), (4, 6, 6)]
    assert front(lines, "c", "d") == [False, True, False, False]
    assert front(lines, "d") == [True, False, False, False], "a column that is not asked for does not count"


def test_columns_that_are_not_there_are_refused_and_the_index_stays():
    table = pandas.DataFrame({"q": [1, 2], "c": [1, 2]}, index=["a", "b"])
    found = pareto(table, "q", "c")
    assert found.dtype == bool and list(found.index) == ["a", "b"] and list(table[found].index) == ["a", "b"]
    with pytest.raises(ValueError, match="'speed'.*q, c"):
        pareto(table, "q", "speed")


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_laws_of_the_front(lines, draw):
    """Small integers, so that ties are common."""
    found = front(lines, "c", "d")

    def beats(a, b):
        return a != b and a[0] >= b[0] and a[1] <= b[1] and a[2] <= b[2]

    on = [line for line, kept in zip(lines, found, strict=True) if kept]
    assert on, "there is always one"
    assert not any(beats(a, b) for a in on for b in on), "no line of the front dominates another"
    assert all(kept or any(beats(a, line) for a in on) for line, kept in zip(lines, found, strict=True))
    order = draw.sample(range(len(lines)), len(lines))
    assert front([lines[i] for i in order], "c", "d") == [found[i] for i in order], "whatever the order of the lines"
    scaled = [(10 * q + 7, c / 3, d) for q, c, d in lines]
    assert front(scaled, "c", "d") == found, "units do not matter"
    assert front([*lines, lines[0]], "c", "d") == [*found, found[0]], "a twin changes nothing"
