"""The same grid through Ray: two local workers do the runs, errors keep their names, what is done is not done again."""

import os

import pytest

from peftlab import lab

pytest.importorskip("ray", reason="the extra 'ray' is not installed")
pytestmark = pytest.mark.slow

MEASURED = ("parameters", "valid_accuracy", "valid_loss", "test_accuracy", "seconds", "process", "threads_asked")


def execute(run):
    process, threads = os.getpid(), os.environ.get("OMP_NUM_THREADS")
    found = {"parameters": 7, "valid_accuracy": 1 - abs(run.learning_rate - 2), "valid_loss": 0.1, "test_accuracy": 0.5}
    return lab.measured_row(MEASURED, found | {"seconds": 0.1, "process": process, "threads_asked": threads})


def fails_or_dies(run):
    if run.case.key["method"] == "a":
        raise MemoryError("no room")
    if run.case.key["method"] == "b":
        os._exit(9)
    return execute(run)


def plan(execute, methods="ab"):
    cases = [lab.Case({"task": "sql", "method": name}, {"steps": 3}, (1.0, 2.0, 3.0)) for name in methods]
    return lab.Experiment(tuple(cases), MEASURED, execute, (0, 1))


def test_grid_runs_in_two_local_workers_and_resumes(tmp_path, capsys):
    file = tmp_path / "rows.csv"
    lab.work(plan(execute), file, jobs=2, engine="ray")
    rows = lab.rows_of(file, plan(execute).columns)
    assert len(rows) == 2 * (3 + 1) and capsys.readouterr().out.startswith("8 runs to do, 2 at a time\n")
    assert str(os.getpid()) not in {row["process"] for row in rows}
    assert {row["threads_asked"] for row in rows} == {"1"}
    lab.work(plan(execute), file, jobs=2, engine="ray")
    assert capsys.readouterr().out == "0 runs to do, 2 at a time\n"
    assert lab.rows_of(file, plan(execute).columns) == rows


def test_cases_that_fail_or_whose_worker_dies_are_named_and_the_others_are_finished(tmp_path):
    file = tmp_path / "rows.csv"
    with pytest.raises(RuntimeError, match="sql a: MemoryError: no room") as failed:
        lab.work(plan(fails_or_dies, "abc"), file, jobs=2, engine="ray")
    assert "sql b: WorkerCrashedError" in str(failed.value)
    assert [row["method"] for row in lab.rows_of(file, plan(execute).columns)] == ["c"] * 4


def test_a_function_that_others_cannot_find_is_refused(tmp_path):
    with pytest.raises(ValueError, match="put it into a .py file"):
        lab.work(plan(lambda run: execute(run)), tmp_path / "rows.csv", jobs=1, engine="ray")
