"""The laboratory: experiments of many training runs, recorded one row per run, and what they say.

    runs = lab.read("classic")                         # a pandas table of data/results/classic.csv
    lab.summary(runs, by=["task", "method"])           # rate chosen on VALID; TEST: mean, low, high over the seeds

An experiment is data: cases (a method on a task, a rank, …) and a function that does one run. For each case, learning
rates are tried with the first seed and judged on the VALID set; a best rate at the edge of the grid extends the grid.
The other seeds then run at the best rate. The TEST set is never used to choose anything.

Each finished run is one row of a CSV file, written at once, so that a killed experiment goes on where it was. A row
counts as done only for the settings that it was made with; made with others, it is run again and replaced.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .paths import DATA, atomic_write
from .provenance import LIBRARIES, provenance

RESULTS = DATA / "results"
ORIGIN = ("date", "commit", "hardware", "threads", "python", *LIBRARIES)

Row = dict[str, str]  # as in the file: column -> text


@dataclass(frozen=True)
class Case:
    """One of the things that an experiment compares."""

    key: dict[str, Any]  # columns that name it: {"method": "LoRA", "rank": 4}
    settings: dict[str, Any]  # columns that its rows must have been made with: {"steps": 250, …}
    grid: tuple[float, ...]  # learning rates tried with the first seed
    beyond: tuple[float, ...] = ()  # the next ones, if the best is at an edge

    @property
    def ladder(self) -> list[float]:
        return sorted({*self.grid, *self.beyond})

    def __str__(self) -> str:
        return " ".join(map(str, self.key.values()))


class Run(NamedTuple):
    """One training run."""

    case: Case
    learning_rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.case} lr={self.learning_rate:g} seed={self.seed}"


@dataclass(frozen=True)
class Experiment:
    """Cases, what is measured of each run, and how: `execute` gives those columns (see `measured_row`).

    It runs in other processes, so it is a function of a module, not a lambda. All cases have the same columns, among
    `measured` are valid_accuracy and valid_loss.
    """

    cases: tuple[Case, ...]
    measured: tuple[str, ...]
    execute: Callable[[Run], Row]
    seeds: tuple[int, ...] = (0, 1, 2)  # the first one chooses the learning rate
    sweep: bool = False  # the other seeds run at every rate that the first one ran at, not only at the best

    @property
    def identity(self) -> tuple[str, ...]:
        return (*self.cases[0].key, "learning_rate", "seed")

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.identity, *self.cases[0].settings, *self.measured, *ORIGIN)


# ------------------------------------------------------------------------------------------------- reading results


def read(name: str | Path):
    """The recorded runs of an experiment as a pandas table: a name (of data/results) or a CSV file.

    Raises FileNotFoundError with the names that there are.
    """
    import pandas

    path = RESULTS / f"{name}.csv" if isinstance(name, str) and not name.endswith(".csv") else Path(name)
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in RESULTS.glob("*.csv"))) or "none"
        raise FileNotFoundError(f"there is no recorded experiment {str(name)!r}; in {RESULTS} there are: {there}")
    return pandas.read_csv(path)


def costs(name: str):
    """What each method of an experiment costs, from data/results/<name>_cost.json: a pandas table, method by method.

    parameters: trained. bytes: of the stored file. context: positions taken from the text. mergeable. step, prefill,
    decode: median time ratios, with _low and _high as quartiles; `attrs` says to what, and where it was measured.
    """
    import pandas

    found = json.loads((RESULTS / f"{name}_cost.json").read_text(encoding="utf-8"))
    table = pandas.DataFrame(found.pop("methods")).set_index("method")
    table.attrs = found
    return table


def chosen(runs, by: str | Sequence[str]):
    """The rows of a table of runs at the learning rate chosen for their group: with all seeds, in the table's order.

    `by` names the columns that make a group. Chosen is the rate with the highest valid_accuracy of the group's lowest
    seed; of equal ones, that with the lowest valid_loss.
    """
    groups = [by] if isinstance(by, str) else list(by)
    if wrong := [name for name in (*groups, "learning_rate", "seed") if name not in runs]:
        raise ValueError(f"the table has no column {wrong[0]!r}; it has {', '.join(runs)}")
    kept: list[Any] = []
    for _, group in runs.groupby(groups, sort=False):
        first = group[group["seed"] == group["seed"].min()]
        rate = best(first.to_dict("records"))["learning_rate"]
        kept += list(group.index[group["learning_rate"] == rate])
    return runs.loc[sorted(kept)]


def summary(runs, by: str | Sequence[str], metric: str = "test_accuracy", also: Sequence[str] = ()):
    """What a table of runs says, one line per group: a pandas table with the groups as its index, in the runs' order.

    parameters: trained. learning_rate: chosen on VALID with the first seed. rates: tried. seeds: run at the chosen
    rate. mean, low, high: of `metric` over those seeds. `also`: means of more columns over the same seeds.
    """
    import pandas

    groups = [by] if isinstance(by, str) else list(by)
    picked = chosen(runs, groups)
    if wrong := [name for name in (metric, *also) if name not in runs]:
        raise ValueError(f"the table has no column {wrong[0]!r}; it has {', '.join(runs)}")
    lines = {}
    for name, at in picked.groupby(groups, sort=False):
        same = (runs[groups] == at[groups].iloc[0]).all(axis=1)
        lines[name if len(groups) > 1 else name[0]] = {
            "parameters": at["parameters"].iloc[0], "learning_rate": at["learning_rate"].iloc[0],
            "rates": runs.loc[same, "learning_rate"].nunique(), "seeds": at["seed"].nunique(),
            "mean": at[metric].mean(), "low": at[metric].min(), "high": at[metric].max(),
        } | {column: at[column].mean() for column in also}  # fmt: skip
    found = pandas.DataFrame.from_dict(lines, orient="index")
    found = found.astype({"parameters": int, "rates": int, "seeds": int})
    found.index = pandas.MultiIndex.from_tuples(lines, names=groups) if len(groups) > 1 else found.index.rename(by)
    return found


def best(rows: Sequence[Mapping[Any, Any]]) -> Mapping[Any, Any]:
    """The row with the highest accuracy on the valid set; of equal ones, that with the lower valid loss."""
    return max(rows, key=lambda row: (float(row["valid_accuracy"]), -_finite(row["valid_loss"])))


def _finite(value: str | float) -> float:
    """A diverged run's loss counts as infinite."""
    return number if math.isfinite(number := float(value)) else math.inf


# ------------------------------------------------------------------------------------------------- bookkeeping


def wanted(run: Run) -> Row:
    """The identity and settings of a run as they stand in the file."""
    values = run.case.key | {"learning_rate": run.learning_rate, "seed": run.seed} | run.case.settings
    return {column: str(value) for column, value in values.items()}


def find(rows: Sequence[Row], run: Run) -> Row | None:
    """The row of a run that was made with these very settings."""
    want = wanted(run).items()
    return next((row for row in rows if want <= row.items()), None)


def put(rows: Sequence[Row], new: Row, identity: Sequence[str]) -> list[Row]:
    """The rows with `new` in the place of one of the same identity, in the order of the file."""
    kept = [row for row in rows if any(row[column] != new[column] for column in identity)]
    return sorted([*kept, new], key=lambda row: [_sortable(row[column]) for column in identity])


def _sortable(text: str) -> tuple[float, str]:
    try:
        return float(text), ""
    except ValueError:
        return math.inf, text


def without_old(rows: Sequence[Row], case: Case) -> list[Row]:
    """The rows without those of a case that were made with other settings: at a rate that is not tried any more."""
    key, settings = (
        {column: str(value) for column, value in part.items()}.items() for part in (case.key, case.settings)
    )
    return [row for row in rows if not key <= row.items() or settings <= row.items()]


def tried(rows: Sequence[Row], case: Case, seed: int) -> dict[float, Row]:
    """learning rate -> row, of those that were run for a case with one seed."""
    found = {rate: find(rows, Run(case, rate, seed)) for rate in case.ladder}
    return {rate: row for rate, row in found.items() if row is not None}


def pending(rows: Sequence[Row], case: Case, seeds: Sequence[int], sweep: bool = False) -> list[Run]:
    """The runs of a case that can be started now: first the grid, then what lies beyond it, then the other seeds."""
    done = tried(rows, case, seeds[0])
    if missing := [rate for rate in case.grid if rate not in done]:
        return [Run(case, rate, seeds[0]) for rate in missing]
    rate = float(best(list(done.values()))["learning_rate"])
    at = case.ladder.index(rate)
    if beside := [rate for rate in case.ladder[max(at - 1, 0) : at + 2] if rate not in done]:
        return [Run(case, rate, seeds[0]) for rate in beside]
    runs = [Run(case, each, seed) for seed in seeds[1:] for each in (sorted(done) if sweep else [rate])]
    return [run for run in runs if find(rows, run) is None]


def left(rows: Sequence[Row], experiment: Experiment) -> int:
    """How many runs are to come, if no grid is extended further."""
    total, seeds = 0, experiment.seeds
    for case in experiment.cases:
        runs = pending(rows, case, seeds, experiment.sweep)
        total += len(runs)
        if runs and runs[0].seed == seeds[0]:  # the other seeds' runs will come on top
            rates = {run.learning_rate for run in runs} | set(tried(rows, case, seeds[0]))
            total += (len(seeds) - 1) * (len(rates) if experiment.sweep else 1)
    return total


def rows_of(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a file; none if it does not exist. ValueError if it is another kind of file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as f:
        reader = csv.DictReader(f, strict=True)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != tuple(columns) or any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path} is not a table of this experiment, or it is damaged: its columns should be "
                         f"{', '.join(columns)}. Move it away, or name another file with --out")  # fmt: skip
    return rows


def made(path: Path, experiment: Experiment):
    """The rows of a file that were made with the experiment's settings, as a pandas table in the order of its cases."""
    import pandas

    rows = rows_of(path, experiment.columns)
    want = [{column: str(value) for column, value in (case.key | case.settings).items()} for case in experiment.cases]
    mine = [row for one in want for row in rows if one.items() <= row.items()]
    return pandas.read_csv(io.StringIO(_csv(mine, experiment.columns)))


def write(path: Path, rows: Iterable[Row], columns: Sequence[str]) -> None:
    """Write all rows; a crash leaves the old file or the new one, never half of one."""
    atomic_write(path, _csv(rows, columns))


def _csv(rows: Iterable[Row], columns: Sequence[str]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


# ------------------------------------------------------------------------------------------------- doing the runs


def conduct(experiment: Experiment, path: Path, pool: Executor, jobs: int) -> Iterator[tuple[Run, Row, int]]:
    """Run what the file lacks, `jobs` at a time, each row written as it comes; gives (run, row, runs left).

    Runs that depend on others (more rates, seeds) are planned as results come in. A run that raises takes its case
    out of the plan; when all others are done, RuntimeError says which ones failed.
    """
    rows, seeds = rows_of(path, experiment.columns), experiment.seeds
    busy: dict[Future, Run] = {}
    failed: dict[str, BaseException] = {}  # case -> why
    while True:
        open_cases = [case for case in experiment.cases if str(case) not in failed]
        can = [run for case in open_cases for run in pending(rows, case, seeds, experiment.sweep)]
        for run in sorted(can, key=lambda run: seeds.index(run.seed)):  # a first look at all cases before any is whole
            if len(busy) < jobs and run not in busy.values():
                busy[pool.submit(experiment.execute, run)] = run
        if not busy:
            break
        done, _ = wait(busy, return_when=FIRST_COMPLETED)
        for future in done:
            run = busy.pop(future)
            if isinstance(error := future.exception(), BrokenExecutor):
                raise error  # a worker was killed: none is left to go on with
            if error is not None:
                failed.setdefault(str(run.case), error)
                print(f"{run} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                continue
            row = wanted(run) | future.result()
            rows = put(rows_of(path, experiment.columns), row, experiment.identity)
            if not pending(rows, run.case, seeds, experiment.sweep):
                rows = without_old(rows, run.case)
            write(path, rows, experiment.columns)
            yield run, row, left(rows, experiment)
    if failed:
        why = "; ".join(f"{case}: {type(error).__name__}: {error}" for case, error in failed.items())
        raise RuntimeError(f"all other runs are done and kept, but these cases failed: {why}")


def work(experiment: Experiment, path: Path, jobs: int) -> None:
    """`conduct` in `jobs` processes of one thread each, with a line per run; Ctrl-C keeps what is done."""
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the workers
    print(f"{left(rows_of(path, experiment.columns), experiment)} runs to do, {jobs} at a time", flush=True)
    start, done = time.perf_counter(), 0
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        for run, row, rest in conduct(experiment, path, pool, jobs):
            done += 1
            minutes = (time.perf_counter() - start) / done * rest / 60
            print(f"{run}: valid {100 * float(row['valid_accuracy']):.1f} %, test "
                  f"{100 * float(row['test_accuracy']):.1f} %, {row['seconds']} s; {rest} to go, "
                  f"about {minutes:.0f} min", flush=True)  # fmt: skip
    except KeyboardInterrupt:
        print(f"stopped; {done} new rows are in {path}, the same command goes on from there", file=sys.stderr)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def train_run(run: Run, model, data: Mapping[str, Any], tokenizer, early: int) -> dict[str, float]:
    """Train as a run's settings say; its train_loss, valid_loss and early_loss, which is that of the first steps.

    A run that diverged has no losses (nan): its trained parameters are back at their start, and are judged like that.
    """
    import peftlab as pl

    settings = run.case.settings
    try:
        log = pl.train(model, data["train"], tokenizer, steps=settings["steps"], batch_size=settings["batch_size"],
                       lr=run.learning_rate, seed=run.seed, valid=data["valid"], valid_every=settings["steps"],
                       progress=False)  # fmt: skip
        losses = last(log.losses), log.valid_losses[settings["steps"]], last(log.losses[:early])
    except FloatingPointError:
        losses = (math.nan,) * 3
    return dict(zip(("train_loss", "valid_loss", "early_loss"), losses, strict=True))


def measured_row(experiment_columns: Sequence[str], values: Mapping[str, Any]) -> Row:
    """The columns that `execute` gives: measured values as text, and where they come from."""
    if set(values) != set(experiment_columns):
        raise ValueError(f"measured were {sorted(values)}, but the table has {sorted(experiment_columns)}")
    shown = {column: f"{values[column]:.6g}" if isinstance(values[column], float) else str(values[column])
             for column in experiment_columns}  # fmt: skip
    origin = provenance()
    return shown | {column: str(origin.get(column, "")) for column in ORIGIN}


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table as text that is aligned and also Markdown."""
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in [head, rule, *body]
    )


def seeds_range(line) -> str:
    """Mean, lowest and highest of a line of `summary` that holds shares: "47.0 % (43.2–50.1)"."""
    return f"{100 * line['mean']:.1f} % ({100 * line['low']:.1f}–{100 * line['high']:.1f})"


def config_hash(values: Mapping[str, Any]) -> str:
    """The first twelve hex digits of the SHA-256 of settings, whatever their order: one name for all that a run was."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


def fingerprint(*files: Path) -> str:
    """The first twelve hex digits of the files' SHA-256."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def fingerprints(task: str) -> tuple[str, str]:
    """Those of the embedded base model and of a task, as they lie on this machine."""
    rows = [DATA / "tasks" / task / f"{split}.jsonl" for split in ("train", "valid", "test")]
    return fingerprint(DATA / "base" / "model.safetensors"), fingerprint(*rows)


def last(losses: Sequence[float], n: int = 10) -> float:
    """The mean of the last n losses: one batch's loss says as much of the batch as of the model."""
    return statistics.mean(losses[-n:])
