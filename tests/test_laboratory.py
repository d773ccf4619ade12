"""The laboratory: what is run and what is skipped, how the rate is chosen, what a table of runs says and may claim."""

import contextlib
import io
import math
import os
import random
import runpy
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from itertools import combinations, product
from types import SimpleNamespace

import pandas as pd
import psutil
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


def plan(execute=measured, steps=250, methods=("a", "b"), sweep=None):
    cases = [lab.Case({"task": "sql", "method": name}, {"steps": steps}, GRID, BEYOND) for name in methods]
    return lab.Experiment(tuple(cases), MEASURED, execute, SEEDS, sweep)


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


# --- what is done again, and what never is ---


def test_a_deleted_row_comes_back_as_it_was(file):
    """Bytes and all: what is measured is the same for the same run, and the origin is fixed here."""

    def execute(run):
        return measured(run) | {column: "as before" for column in lab.ORIGIN}

    conduct(file, plan(execute))
    before, text = rows(file), file.read_text()
    for gone in ({0}, {4, 7}, {5, 11}):
        lab.write(file, [row for at, row in enumerate(before) if at not in gone], plan().columns)
        assert len(conduct(file, plan(execute))) == len(gone)
        assert file.read_text() == text


def test_a_sweep_runs_all_seeds_at_all_rates_and_reads_like_any_table(file, monkeypatch):
    monkeypatch.setitem(BEST, "a", 1e-3)  # one rate more
    assert lab.left([], plan(sweep=0.0)) == 3 * (4 + 4) and lab.left([], plan()) == 2 * (4 + 2)
    done = conduct(file, plan(sweep=0.0))
    assert len(done) == len(names(done)) == 3 * (5 + 4) and lab.left(rows(file), plan(sweep=0.0)) == 0
    runs = lab.read(file)
    assert [(r.method, r.learning_rate, r.seed) for r in lab.chosen(runs, by="method").itertuples()] == [
        (name, BEST[name], seed) for name in "ab" for seed in SEEDS
    ]
    found = lab.summary(runs, by="method")
    assert list(found.rates) == [5, 4] and list(found.seeds) == [3, 3]


def test_a_sweep_with_a_bar_is_for_cases_that_reach_it(file):
    def execute(run):
        top = {"a": 0.5, "b": 0.49}[run.case.key["method"]]
        return measured(run, valid=top if run.learning_rate == BEST[run.case.key["method"]] else 0.01)

    done = conduct(file, plan(execute, sweep=0.5))
    later = {name: [run for run in done if run.seed and run.case.key["method"] == name] for name in "ab"}
    assert len(later["a"]) == 2 * 4 and {run.learning_rate for run in later["b"]} == {BEST["b"]}
    assert len(later["b"]) == 2 and lab.left(rows(file), plan(execute, sweep=0.5)) == 0


GRID_PROGRAM = """
import sys, time
from pathlib import Path
from peftlab import lab

HERE = Path(__file__).parent
MEASURED = ("valid_accuracy", "valid_loss", "test_accuracy", "seconds")

def execute(run):
    with open(HERE / "started.txt", "a") as f:
        f.write(f"{run}\\n")
    time.sleep(0.2)
    while run.seed and not (HERE / "go").exists():  # the grid cannot be over before it is killed
        time.sleep(0.05)
    found = {"valid_accuracy": 0.5 + run.learning_rate, "valid_loss": 0.1, "test_accuracy": 0.5, "seconds": 0.2}
    return {name: str(value) for name, value in found.items()} | {name: "" for name in lab.ORIGIN}

def experiment():
    cases = tuple(lab.Case({"method": name}, {"steps": 3}, (0.1, 0.2, 0.3, 0.4)) for name in "ab")
    return lab.Experiment(cases, MEASURED, execute, (0, 1, 2))

if __name__ == "__main__":
    lab.work(experiment(), HERE / "rows.csv", jobs=2)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("victim", ["all processes", "the first process"])
def test_a_kill_in_the_middle_of_a_grid_loses_at_most_the_runs_in_flight(tmp_path, victim):
    program, file, started = (tmp_path / name for name in ("grid.py", "rows.csv", "started.txt"))
    program.write_text(GRID_PROGRAM)
    experiment = runpy.run_path(str(program))["experiment"]()

    def named(row):
        return f"{row['method']} lr={float(row['learning_rate']):g} seed={row['seed']}"

    with (tmp_path / "said.txt").open("w") as said:
        grid = subprocess.Popen([sys.executable, str(program)], stdout=said, stderr=said, start_new_session=True)
    try:
        end = time.monotonic() + 300  # importing torch three times takes long on a busy machine
        while len(lab.rows_of(file, experiment.columns)) < 3:
            assert grid.poll() is None and time.monotonic() < end, (tmp_path / "said.txt").read_text()
            time.sleep(0.02)
        workers = psutil.Process(grid.pid).children(recursive=True)
        os.kill(grid.pid, signal.SIGKILL) if victim == "the first process" else os.killpg(grid.pid, signal.SIGKILL)
        grid.wait()
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert not alive, "workers compute on for nobody, and would do so beside those of the next start"
    finally:
        with contextlib.suppress(ProcessLookupError):  # whoever is left of the group if an assertion failed
            os.killpg(grid.pid, signal.SIGKILL)

    kept = lab.rows_of(file, experiment.columns)  # raises if the file is not whole
    first = Counter(started.read_text().splitlines())
    in_flight = set(first) - set(map(named, kept))
    assert len(kept) >= 3 and set(map(named, kept)) <= set(first)
    assert set(first.values()) == {1} and len(in_flight) <= 2

    (tmp_path / "go").touch()
    with ThreadPoolExecutor(2) as pool:
        again = [str(run) for run, _, _ in lab.conduct(experiment, file, pool, 2)]
    whole = lab.rows_of(file, experiment.columns)
    assert len(whole) == 2 * (4 + 2) and all(row in whole for row in kept)
    assert len(again) == len(whole) - len(kept) and in_flight <= set(again)
    total = Counter(started.read_text().splitlines())
    assert set(total) == set(map(named, whole))
    assert total == Counter({name: 2 if name in in_flight else 1 for name in total})


# --- the processes ---


def test_processes_do_the_runs_and_a_line_is_printed_for_each(file, capsys):
    lab.work(plan(), file, jobs=2)
    out = capsys.readouterr().out
    assert len(rows(file)) == 12 and out.startswith("12 runs to do") and out.count("sql a") == 6 and "; 0 to go" in out
    assert len(out.splitlines()) == 13, "where no terminal is, there is no bar"
    lab.work(plan(), file, jobs=1)
    assert capsys.readouterr().out == "0 runs to do, 1 at a time\n"


def dies_once(run):
    """The worker is killed, as the system does for want of memory."""
    if str(run) == "sql b lr=0.01 seed=2":
        os.kill(os.getpid(), signal.SIGKILL)
    return measured(run)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_killed_worker_ends_the_grid_with_its_rows_kept_and_a_cure_named(file):
    with pytest.raises(BrokenExecutor, match="new rows are in .* goes on from there, with fewer than 2 jobs"):
        lab.work(plan(dies_once), file, jobs=2)
    assert 8 <= len(rows(file)) <= 11
    kept = rows(file)
    conduct(file)
    assert len(rows(file)) == 12 and all(row in rows(file) for row in kept)


class Breaking(Executor):
    """All runs end at once; the first is the one whose worker is killed, or the fourth finds no workers any more."""

    def __init__(self, refuses):
        self.refuses, self.runs = refuses, []

    def submit(self, function, run):
        self.runs.append(run)
        if self.refuses and len(self.runs) > 3:
            raise BrokenExecutor("no workers")
        future = Future()
        if len(self.runs) == 1 and not self.refuses:
            future.set_exception(BrokenExecutor("killed"))
        else:
            future.set_result(function(run))
        return future


@pytest.mark.parametrize("refuses, kept", [(False, 7), (True, 3)])
def test_runs_that_ended_beside_a_killed_worker_are_kept(file, refuses, kept):
    pool = Breaking(refuses)
    with pytest.raises(BrokenExecutor):
        list(lab.conduct(plan(), file, pool, 8))
    assert len(rows(file)) == kept


class Pool(ThreadPoolExecutor):
    """Threads in the place of processes, which take seconds to start."""

    def __init__(self, jobs, context, initializer):
        super().__init__(jobs)


def test_a_terminal_gets_a_bar_that_follows_the_plan(file, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("peftlab.lab.engine.ProcessPoolExecutor", Pool)
    monkeypatch.setitem(BEST, "a", 1e-3)  # the grid is extended by one run on the way
    monkeypatch.setattr(sys, "stdout", Terminal())
    lab.work(plan(), file, jobs=1)
    out = sys.stdout.getvalue()
    assert "0 of 12 runs" in out and "13 of 13 runs" in out and "about 0 min left" in out
    assert out.count("sql a lr=") == 7 and "; 0 to go" in out


def test_time_left_counts_each_case_at_its_own_speed():
    assert math.isnan(lab.time_left({"a": 3}, {}, 2))
    assert lab.time_left({"a": 0}, {"a": [5.0]}, 2) == 0
    spent = {"slow": [100.0, 140.0], "fast": [10.0, 10.0]}
    assert lab.time_left({"slow": 1, "fast": 6}, spent, 1) == pytest.approx(120 + 6 * 10)
    assert lab.time_left({"slow": 1, "fast": 6}, spent, 3) == pytest.approx((120 + 6 * 10) / 3)
    assert lab.time_left({"unknown": 2}, spent, 1) == pytest.approx(2 * 65), "the mean of all runs"
    assert lab.time_left({"slow": 1}, spent, 8) == pytest.approx(120), "one run is not done by eight"


@pytest.mark.parametrize("cores, gib, jobs", [(16, 64, 16), (16, 5.5, 5), (4, 0.3, 1), (1, 64, 1)])
def test_as_many_jobs_as_there_are_cores_and_memory(monkeypatch, file, capsys, cores, gib, jobs):
    machine = SimpleNamespace(cores=cores, free_memory=int(gib * 2**30))
    monkeypatch.setattr("peftlab.course.machine.check_machine", lambda: machine)
    monkeypatch.setattr("peftlab.lab.engine.ProcessPoolExecutor", Pool)
    assert lab.fitting_jobs() == jobs
    lab.work(plan(), file)
    assert capsys.readouterr().out.startswith(f"12 runs to do, {jobs} at a time")


def test_engines_that_cannot_be_are_refused_with_the_cure(file, monkeypatch):
    with pytest.raises(ValueError, match="there are processes, ray"):
        lab.work(plan(), file, jobs=1, engine="rey")
    with pytest.raises(ValueError, match="engine='ray'"):
        lab.work(plan(), file, jobs=1, address="auto")
    with pytest.raises(ValueError, match="at least 1"):
        lab.work(plan(), file, jobs=0)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'peftlab\[ray\]'"):
        lab.work(plan(), file, jobs=1, engine="ray")
    assert not file.exists()


# --- what a table says ---


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


# --- intervals and tests ---


@pytest.mark.parametrize("n, truly", [(3, 0.756), (10, 0.910)])
def test_bootstrap_covers_the_truth_as_often_as_its_docstring_says(n, truly):
    """500 samples: the share found is within three standard errors (0.06 and 0.04) of that of a larger simulation."""
    draw, hits = random.Random(0), 0
    for _ in range(500):
        _, low, high = lab.bootstrap([draw.gauss(5, 2) for _ in range(n)], draws=400)
        hits += low <= 5 <= high
    assert abs(hits / 500 - truly) < 3 * math.sqrt(truly * (1 - truly) / 500)


def test_bootstrap_of_three_is_their_range_and_of_one_is_unknown():
    assert lab.bootstrap([0.2, 0.5, 0.3]) == pytest.approx((1 / 3, 0.2, 0.5))
    value, low, high = lab.bootstrap([0.5])
    assert value == 0.5 and math.isnan(low) and math.isnan(high)
    assert lab.bootstrap([1, 2, 9], statistics.median) == (2, 1, 9)
    assert lab.bootstrap([1, 2, 4, 8], seed=1) == lab.bootstrap([1, 2, 4, 8], seed=1)


def test_bootstrap_in_two_levels_knows_that_runs_of_a_group_are_alike():
    """Ten equal runs in each of three groups say as much as three runs; drawn one by one, they pretend to be thirty."""
    values, groups = [0.0] * 10 + [1.0] * 10 + [2.0] * 10, ["x"] * 10 + ["y"] * 10 + ["z"] * 10
    assert lab.bootstrap(values, groups=groups) == (1, 0, 2)
    _, low, high = lab.bootstrap(values)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(2 / 3 / 30), rel=0.1)  # of a normal distribution
    mixed = lab.bootstrap([0, 1, 2] * 10, groups=groups)  # groups that are alike: runs alone differ
    assert mixed.high - mixed.low < 1.0
    assert math.isnan(lab.bootstrap(values, groups=["x"] * 30).low), "of one group, nothing is known of others"


@pytest.mark.parametrize(
    "values, groups, words",
    [([], None, "at least one"), ([1, math.nan], None, "nan"), ([math.inf], None, "inf"), ([1, 2], ["x"], "one label")],
)
def test_bootstrap_refuses_what_has_no_mean(values, groups, words):
    with pytest.raises(ValueError, match=words):
        lab.bootstrap(values, groups=groups)


@pytest.mark.parametrize(
    "differences, p",
    [
        ((1, 2, 3), 2 / 8),  # only +++ and --- are as far
        ((3, 2, -1), 4 / 8),  # sums ±6 ±4 ±2 0 0; 4 was seen
        ((1, 2, -3), 1.0),
        ((0, 0, 0), 1.0),
        ((1, 1, 1, 1, 1, 1), 2 / 64),
        # Twentieths: 9, 2, 13, −15, sum 9; only ±(15 − 13 − 9 + 2) are nearer to 0. Rounding makes some 9 a bit less.
        ((0.9 - 0.45, 0.3 - 0.2, 0.8 - 0.15, 0.2 - 0.95), 14 / 16),
    ],
)
def test_p_of_pairs_is_that_of_a_count_by_hand(differences, p):
    found = lab.compare(differences, [0] * len(differences))
    assert found.p == p and found.n == len(differences) and found.smallest_p == 2 / 2**found.n <= p
    assert found.difference == pytest.approx(statistics.fmean(differences))


def test_three_pairs_cannot_give_a_small_p_and_say_so():
    found = lab.compare([0.9, 0.91, 0.92], [0.1, 0.12, 0.1])
    assert found.p == found.smallest_p == 0.25
    words = "+0.8033 (95 % interval +0.79 to +0.82), p = 0.25, 3 pairs; no p below 0.25 is possible with so few"
    assert str(found) == repr(found) == words
    assert "possible" not in str(lab.compare(range(1, 7), [0] * 6)), "six are enough for p < 0.05"
    assert str(lab.compare([1], [0])).startswith("+1 (no interval), p = 1, 1 pair;")


@pytest.mark.parametrize("m, n", [(3, 3), (2, 4), (5, 3), (1, 4), (1, 1)])
def test_p_of_two_groups_is_that_of_all_regroupings(m, n):
    draw = random.Random(m * 10 + n)
    a, b = [draw.randrange(6) for _ in range(m)], [draw.randrange(6) for _ in range(n)]  # with ties
    both, seen = a + b, abs(statistics.fmean(a) - statistics.fmean(b))
    as_far = []
    for picked in combinations(range(m + n), m):
        first = [both[i] for i in picked]
        rest = [both[i] for i in range(m + n) if i not in picked]
        as_far.append(abs(statistics.fmean(first) - statistics.fmean(rest)) >= seen - 1e-9)
    found = lab.compare(a, b, paired=False)
    assert found.p == pytest.approx(statistics.fmean(as_far)) and found.n == m + n
    assert found.difference == pytest.approx(statistics.fmean(a) - statistics.fmean(b))
    apart = lab.compare(range(100, 100 + m), range(n), paired=False)
    assert apart.p == pytest.approx(apart.smallest_p)


@pytest.mark.parametrize("paired", [True, False])
def test_compare_with_places_changed_changes_only_signs(paired):
    draw = random.Random(0)
    for m, n in ((4, 4), (3, 3)) if paired else ((4, 4), (5, 3), (1, 3)):
        a, b = [draw.random() for _ in range(m)], [draw.random() for _ in range(n)]
        x, y = lab.compare(a, b, paired), lab.compare(b, a, paired)
        turned = (-y.difference, -y.high, -y.low, y.p, y.n, y.smallest_p, paired)
        assert tuple(x) == pytest.approx(turned, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("paired, limit", [(True, "EXACT_PAIRS"), (False, "EXACT_GROUPINGS")])
def test_drawn_ways_agree_with_all_ways_and_never_give_zero(monkeypatch, paired, limit):
    a, b = [0.4, 0.9, 0.5, 0.8, 0.6, 0.7, 0.3, 0.9], [0.5, 0.6, 0.4, 0.5, 0.7, 0.4, 0.2, 0.6]
    exact, far = lab.compare(a, b, paired), lab.compare([10 + x for x in a] * 2, [0] * 16, paired)
    monkeypatch.setattr(f"peftlab.lab.statistics.{limit}", 2)
    drawn = lab.compare(a, b, paired)
    assert drawn != exact and drawn == lab.compare(a, b, paired)
    assert drawn.p == pytest.approx(exact.p, abs=4 * math.sqrt(exact.p * (1 - exact.p) / 10_000))
    few = lab.compare([10 + x for x in a] * 2, [0] * 16, paired, draws=99)
    assert far.p < 1e-4 and few.p == few.smallest_p == 0.01


def test_no_difference_is_found_significant_as_often_as_p_says():
    """Under the null hypothesis, p ≤ α in at most a share α of all cases: exactly, over all signs of 5 differences."""
    sizes = (1, 2, 4, 8, 16)  # all sums differ
    found = [lab.compare([s * d for s, d in zip(signs, sizes, strict=True)], [0] * 5, draws=1).p
             for signs in product((-1, 1), repeat=5)]  # fmt: skip
    assert sorted(found) == [2 * (i // 2 + 1) / 32 for i in range(32)]


def test_compare_refuses_what_does_not_match():
    with pytest.raises(ValueError, match="as many values in a .3. as in b .2."):
        lab.compare([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="b holds nan"):
        lab.compare([1, 2], [1, math.nan])
    with pytest.raises(ValueError, match="at least one"):
        lab.compare([], [], paired=False)


def two_methods():
    """Rows of two methods on two tasks with two seeds, in an order that does not match."""
    accuracy = {"x": (0.9, 0.8, 0.7, 0.6), "y": (0.5, 0.6, 0.4, 0.5)}
    keys = [("sql", 0), ("sql", 1), ("reviews", 0), ("reviews", 1)]
    lines = [(name, *key, value) for name, values in accuracy.items() for key, value in zip(keys, values, strict=True)]
    runs = pd.DataFrame(lines, columns=["method", "task", "seed", "test_accuracy"])
    return runs.sample(frac=1, random_state=0)


def test_methods_are_compared_pair_by_pair():
    found = lab.compare_methods(two_methods(), "x", "y")
    assert found.difference == pytest.approx((0.4 + 0.2 + 0.3 + 0.1) / 4) and (found.n, found.p) == (4, 2 / 16)
    assert 0.1 <= found.low < found.difference < found.high <= 0.4, "of the pairs' differences, not of all values"
    one = lab.compare_methods(two_methods().query("task == 'sql'"), "y", "x", pair="seed")
    assert one.difference == pytest.approx(-0.3) and one.n == 2


def test_methods_that_cannot_be_compared_are_named():
    runs = two_methods()
    with pytest.raises(ValueError, match="no row has method 'X'; did you mean 'x'"):
        lab.compare_methods(runs, "X", "y")
    with pytest.raises(ValueError, match="no column 'speed'"):
        lab.compare_methods(runs, "x", "y", "speed")
    with pytest.raises(ValueError, match="no column 'rank'"):
        lab.compare_methods(runs, "x", "y", pair=("task", "rank"))
    with pytest.raises(ValueError, match="several rows with task reviews.*choose one rate first"):
        lab.compare_methods(runs, "x", "y", pair="task")
    for name in "xy":
        lonely = runs[(runs.method == name) | (runs.seed == 0)]
        with pytest.raises(ValueError, match=f"'{name}' has a row with task reviews, seed 1 and 1 more"):
            lab.compare_methods(lonely, "x", "y")


def test_holm_of_an_example_by_hand_and_its_limits():
    """0.005·4, 0.01·3, 0.03·2, and 0.04·1, which is raised to the one before it."""
    assert lab.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert lab.holm([0.6, 0.9]) == [1, 1] and lab.holm([0.2]) == [0.2] and lab.holm([]) == []
    with pytest.raises(ValueError, match="between 0 and 1"):
        lab.holm([0.5, 1.5])


def test_summary_gives_the_range_unless_the_interval_of_the_mean_is_asked_for(file):
    test = {0: 0.1, 1: 0.2, 2: 0.6}
    conduct(file, plan(lambda run: measured(run, test=test[run.seed])))
    runs = pd.concat([lab.read(file), lab.read(file).assign(seed=lambda rows: rows.seed + 3)])  # six seeds
    runs = runs.reset_index(drop=True)
    plain, asked = lab.summary(runs, "method"), lab.summary(runs, "method", interval="bootstrap")
    assert list(plain.columns) == list(asked.columns)
    assert list(plain.low) == [0.1] * 2 and list(plain.high) == [0.6] * 2
    value, low, high = lab.bootstrap([0.1, 0.2, 0.6] * 2)
    assert 0.1 < low < value < high < 0.6
    for _, line in asked.iterrows():
        assert (line["mean"], line.low, line.high) == pytest.approx((value, low, high))
    with pytest.raises(ValueError, match="'range' or 'bootstrap'"):
        lab.summary(runs, "method", interval="sd")
