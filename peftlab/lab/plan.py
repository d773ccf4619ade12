"""What is to be run: cases, runs, experiments; which runs are done, which can be started now, how many are left."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..provenance import LIBRARIES

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
    `measured` are valid_accuracy and valid_loss, and for `work` test_accuracy and seconds (those of the run).
    """

    cases: tuple[Case, ...]
    measured: tuple[str, ...]
    execute: Callable[[Run], Row]
    seeds: tuple[int, ...] = (0, 1, 2)  # the first one chooses the learning rate
    # The other seeds run at the best rate. Where that has at least this accuracy on VALID, at all others too.
    sweep: float | None = None

    @property
    def identity(self) -> tuple[str, ...]:
        return (*self.cases[0].key, "learning_rate", "seed")

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.identity, *self.cases[0].settings, *self.measured, *ORIGIN)


def wanted(run: Run) -> Row:
    """The identity and settings of a run as they stand in the file."""
    values = run.case.key | {"learning_rate": run.learning_rate, "seed": run.seed} | run.case.settings
    return {column: str(value) for column, value in values.items()}


def find(rows: Sequence[Row], run: Run) -> Row | None:
    """The row of a run that was made with these very settings."""
    want = wanted(run).items()
    return next((row for row in rows if want <= row.items()), None)


def tried(rows: Sequence[Row], case: Case, seed: int) -> dict[float, Row]:
    """learning rate -> row, of those that were run for a case with one seed."""
    found = {rate: find(rows, Run(case, rate, seed)) for rate in case.ladder}
    return {rate: row for rate, row in found.items() if row is not None}


def best(rows: Sequence[Mapping[Any, Any]]) -> Mapping[Any, Any]:
    """The row with the highest accuracy on the valid set; of equal ones, that with the lower valid loss."""
    return max(rows, key=lambda row: (float(row["valid_accuracy"]), -_finite(row["valid_loss"])))


def _finite(value: str | float) -> float:
    """A diverged run's loss counts as infinite."""
    return number if math.isfinite(number := float(value)) else math.inf


def pending(rows: Sequence[Row], case: Case, seeds: Sequence[int], sweep: float | None = None) -> list[Run]:
    """The runs of a case that can be started now: first the grid, then what lies beyond it, then the other seeds."""
    done = tried(rows, case, seeds[0])
    if missing := [rate for rate in case.grid if rate not in done]:
        return [Run(case, rate, seeds[0]) for rate in missing]
    top = best(list(done.values()))
    rate, everywhere = float(top["learning_rate"]), sweep is not None and float(top["valid_accuracy"]) >= sweep
    at = case.ladder.index(rate)
    if beside := [rate for rate in case.ladder[max(at - 1, 0) : at + 2] if rate not in done]:
        return [Run(case, rate, seeds[0]) for rate in beside]
    runs = [Run(case, each, seed) for seed in seeds[1:] for each in (sorted(done) if everywhere else [rate])]
    return [run for run in runs if find(rows, run) is None]


def left_of(rows: Sequence[Row], case: Case, seeds: Sequence[int], sweep: float | None = None) -> int:
    """How many runs of a case are to come, if its grid is not extended further and a sweep is worth its while."""
    runs = pending(rows, case, seeds, sweep)
    if not runs or runs[0].seed != seeds[0]:
        return len(runs)
    rates = {run.learning_rate for run in runs} | set(tried(rows, case, seeds[0]))
    return len(runs) + (len(seeds) - 1) * (1 if sweep is None else len(rates))  # the other seeds' runs come on top


def left(rows: Sequence[Row], experiment: Experiment) -> int:
    """How many runs are to come, if no grid is extended further."""
    return sum(left_of(rows, case, experiment.seeds, experiment.sweep) for case in experiment.cases)


def without_old(rows: Sequence[Row], case: Case) -> list[Row]:
    """The rows without those of a case that were made with other settings: at a rate that is not tried any more."""
    key, settings = (
        {column: str(value) for column, value in part.items()}.items() for part in (case.key, case.settings)
    )
    return [row for row in rows if not key <= row.items() or settings <= row.items()]
