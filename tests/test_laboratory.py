"""The laboratory: what is run and what is skipped, how the rate is chosen, what a table of runs says."""

import math
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest

from peftlab import lab

GRID, BEYOND, SEEDS = (1e-3, 3e-3, 1e-2, 3e-2), (1e-4, 3e-4, 1e-1, 3e-1), (0, 1, 2)
BEST = {"a": 3e-3, "b": 1e-2}  # inside of the grid
MEASURED = ("parameters", "valid_accuracy", "valid_loss", "test_accuracy", "seconds")


def measured(run, valid=None, test=0.5):
    """A made-up result. By default, accuracy on VALID falls with the distance from the rate in BEST."""
    ladder = run.case.ladder
    away = abs(ladder.index(run.learning_rate) - ladder.index(BEST[run.case.key["method"]]))
    found = {"valid_accuracy": 1 - away / 10 if valid is None else valid, "test_accuracy": test}
    return lab.measured_row(MEASURED, {"parameters": 7, "valid_loss": 0.1, "seconds": 1.5} | found)


def plan(execute=measured, steps=250, methods=("a", "b")):
    cases = [lab.Case({"task": "sql", "method": name}, {"steps": steps}, GRID, BEYOND) for name in methods]
    return lab.Experiment(tuple(cases), MEASURED, execute, SEEDS)


def conduct(file, experiment=None, jobs=2, stop=None):
    """The runs that were executed, in order of completion."""
    experiment, done = experiment or plan(), []
    with ThreadPoolExecutor(jobs) as pool:
        for run, _, rest in lab.conduct(experiment, file, pool, jobs):
            done.append(run)
            assert rest == lab.left(rows(file), experiment)
            if len(done) == stop:
                break
    return done


def rows(file):
    return lab.rows_of(file, plan().columns)


def names(runs):
    return {str(run) for run in runs}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "rows.csv"


def test_grid_on_the_first_seed_then_the_other_seeds_at_the_best_rate(file):
    done = conduct(file)
    assert len(done) == len(names(done)) == 2 * (4 + 2)
    for case in plan().cases:
        mine = [run for run in done if run.case == case]
        assert [run.seed for run in mine[:4]] == [0] * 4 and {run.learning_rate for run in mine[:4]} == set(GRID)
        rate = BEST[case.key["method"]]
        assert {(run.seed, run.learning_rate) for run in mine[4:]} == {(1, rate), (2, rate)}
    assert len(rows(file)) == len(done)
    assert not list(file.parent.glob(".*")), "a temporary file was left"


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_resume_skips_finished_rows(file, stop):
    first = conduct(file, stop=stop, jobs=1)
    kept = rows(file)
    assert len(first) == len(kept) == stop
    second = conduct(file)
    assert not names(first) & names(second) and len(first) + len(second) == 12
    assert all(row in rows(file) for row in kept)
    assert conduct(file) == []


def test_a_changed_setting_reruns_only_its_row(file):
    conduct(file)
    before = rows(file)
    at = next(i for i, row in enumerate(before) if row["method"] == "b" and row["seed"] == "1")
    others = before[:at] + before[at + 1 :]
    before[at] |= {"steps": "99", "test_accuracy": "0.123"}
    lab.write(file, before, plan().columns)
    assert names(conduct(file)) == {"sql b lr=0.01 seed=1"}
    again = rows(file)
    assert [row for row in again if row in others] == others and len(again) == len(others) + 1
    assert "99" not in [row["steps"] for row in again]


def test_another_budget_makes_all_rows_anew_in_their_places(file):
    conduct(file)
    assert len(conduct(file, plan(steps=300))) == 12
    assert {row["steps"] for row in rows(file)} == {"300"} and len(rows(file)) == 12
    assert len(lab.made(file, plan())) == 0 and len(lab.made(file, plan(steps=300))) == 12


def test_old_rows_at_rates_no_longer_tried_leave_when_their_case_is_complete(file, monkeypatch):
    monkeypatch.setitem(BEST, "a", 1e-3)  # the grid is extended to 3e-4
    conduct(file)
    monkeypatch.setitem(BEST, "a", 1e-2)
    conduct(file, plan(steps=300), stop=3, jobs=1)
    assert [row["learning_rate"] for row in rows(file) if row["steps"] == "250" and row["method"] == "a"][0] == "0.0003"
    conduct(file, plan(steps=300))
    assert {row["steps"] for row in rows(file)} == {"300"} and len(rows(file)) == 12


def test_rows_of_cases_outside_the_plan_are_kept(file):
    conduct(file)
    conduct(file, plan(methods=("b",), steps=300))
    assert [row["steps"] for row in rows(file)] == ["250"] * 6 + ["300"] * 6


@pytest.mark.parametrize(
    "peak, extra", [(1e-3, {3e-4}), (3e-4, {3e-4, 1e-4}), (3e-1, {1e-1, 3e-1}), (1e-1, {1e-1, 3e-1})]
)
def test_best_rate_at_an_edge_extends_the_grid(file, monkeypatch, peak, extra):
    monkeypatch.setitem(BEST, "a", peak)
    done = [run for run in conduct(file) if run.case.key["method"] == "a"]
    assert {run.learning_rate for run in done if run.seed == 0} == {*GRID, *extra}
    assert {run.learning_rate for run in done if run.seed} == {peak}


def test_rate_is_chosen_on_valid_and_test_is_only_reported(file):
    test = {1e-3: 0.9, 3e-3: 0.2, 1e-2: 0.99, 3e-2: 0.7}  # TEST prefers another rate than VALID does
    conduct(file, plan(lambda run: measured(run, test=test[run.learning_rate] + run.seed / 100)))
    found = lab.summary(lab.read(file), by=["task", "method"], also=["seconds"]).loc["sql", "a"]
    assert (found.learning_rate, found.seeds, found.rates, found.parameters) == (3e-3, 3, 4, 7)
    assert [found.low, found["mean"], found.high, found.seconds] == pytest.approx([0.20, 0.21, 0.22, 1.5])


def test_choice_in_a_table_is_the_choice_of_the_runs(file):
    conduct(file)
    picked = lab.chosen(lab.read(file), by="method")
    assert [(r.method, r.learning_rate, r.seed) for r in picked.itertuples()] == [
        (name, BEST[name], seed) for name in "ab" for seed in SEEDS
    ]


def test_summary_of_an_unfinished_experiment_counts_the_seeds_that_are_there(file):
    conduct(file, stop=9, jobs=1)  # all rates of both, then one more seed of the first
    found = lab.summary(lab.read(file), by="method")
    assert found.index.name == "method" and list(found.seeds) == [2, 1] and list(found.rates) == [4, 4]


def test_equal_accuracies_are_decided_by_the_loss_and_a_diverged_run_is_last():
    def row(loss):
        return {"valid_accuracy": "0.9", "valid_loss": loss}

    some = [row("nan"), row("0.3"), row("0.1"), row("inf")]
    assert lab.best(some) is some[2]
    assert lab.best([row("nan"), some[1]]) is some[1]
    runs = pd.DataFrame({"m": "x", "learning_rate": [1.0, 2.0], "seed": 0, "valid_accuracy": 0.5,
                         "valid_loss": [math.nan, 3.0]})  # fmt: skip
    assert list(lab.chosen(runs, "m").learning_rate) == [2.0]


def test_a_failing_case_is_named_and_the_others_are_finished(file, capsys):
    def execute(run):
        if run.case.key["method"] == "a":
            raise MemoryError("no room")
        return measured(run)

    with pytest.raises(RuntimeError, match="sql a: MemoryError: no room"):
        conduct(file, plan(execute), jobs=1)
    assert {row["method"] for row in rows(file)} == {"b"} and len(rows(file)) == 6
    assert len(conduct(file)) == 6, "the next start takes up what failed"


def test_foreign_and_damaged_files_are_refused_and_left_alone(file):
    conduct(file)
    text = file.read_text()
    for wrong in ("a,b\n1,2\n", text[: len(text) * 2 // 3 - 40]):
        file.write_text(wrong)
        with pytest.raises(ValueError, match="Move it away"):
            conduct(file)
        assert file.read_text() == wrong


def test_processes_do_the_runs_and_a_line_is_printed_for_each(file, capsys):
    lab.work(plan(), file, jobs=2)
    out = capsys.readouterr().out
    assert len(rows(file)) == 12 and out.startswith("12 runs to do") and out.count("sql a") == 6 and "; 0 to go" in out
    lab.work(plan(), file, jobs=1)
    assert capsys.readouterr().out == "0 runs to do, 1 at a time\n"


def test_wrong_names_are_answered_with_what_there_is(file):
    with pytest.raises(FileNotFoundError, match="lora_rank"):
        lab.read("no_such_experiment")
    conduct(file)
    runs = lab.read(file)
    with pytest.raises(ValueError, match="no column 'methud'"):
        lab.chosen(runs, by="methud")
    with pytest.raises(ValueError, match="no column 'speed'"):
        lab.summary(runs, by="method", metric="speed")
    with pytest.raises(ValueError, match="seconds"):
        lab.measured_row(MEASURED, {"parameters": 7})


def test_recorded_rank_experiment_reads_as_lesson_02_reads_it():
    runs = lab.read("lora_rank")
    tuning = runs[runs.seed == 0].sort_values(["valid_accuracy", "valid_loss"], ascending=[False, True])
    best = tuning.groupby("rank")["learning_rate"].first()
    assert lab.chosen(runs, "rank").equals(runs[runs["learning_rate"] == runs["rank"].map(best)])
