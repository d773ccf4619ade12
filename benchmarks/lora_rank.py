"""How does quality on SQL depend on LoRA's rank, at each rank's own tuned learning rate, and how far is it from full
fine-tuning with the same budget?

    python benchmarks/lora_rank.py --jobs 2          # writes data/results/lora_rank.csv; goes on where it was stopped
    python benchmarks/lora_rank.py --steps 3 --out /tmp/try.csv

Budget: 250 steps of batch 16 on the sql task. LoRA of rank 1, 4 and 16 on all linear layers, and full fine-tuning. For
each of them, learning rates are tried with seed 0 and judged on the VALID set; a best rate at the edge of the grid
extends the grid by one more rate. Seeds 1 and 2 then run at the best rate. The TEST set is never used to choose
anything.
A seed draws A and the order of the rows (of full fine-tuning, only the order). alpha = 2r, so that the scale alpha/r is
2 at every rank and one grid suits all: with the rate tuned for each rank, a fixed alpha would say the same thing with
other rates. LoRA is merged before it is evaluated: the same answers, sooner.

Each finished run is one row of the file. A row counts as done only for the settings (base, task, steps, alpha …) that
it was made with; anything else is run again.
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import io
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: each worker process computes with one thread

from peftlab.paths import DATA, atomic_write  # noqa: E402
from peftlab.provenance import LIBRARIES, provenance  # noqa: E402

OUT = DATA / "results" / "lora_rank.csv"
RANKS, SEEDS = (1, 4, 16), (0, 1, 2)
STEPS, BATCH = 250, 16
EARLY = 50  # steps after which the loss is recorded too, so that a reader can check a row in seconds
TARGETS = "all-linear"
ALPHA_PER_RANK = 2
GRID = {"LoRA": (1e-3, 2e-3, 5e-3, 1e-2), "full": (1e-4, 3e-4, 1e-3, 3e-3)}
BEYOND = {"LoRA": (2e-4, 5e-4, 2e-2, 5e-2), "full": (1e-5, 3e-5, 1e-2, 3e-2)}  # if the best rate is at an edge

IDENTITY = ("method", "rank", "learning_rate", "seed")
SETTINGS = ("alpha", "targets", "steps", "batch_size", "base", "task")
MEASURED = ("parameters", "valid_accuracy", "valid_loss", "test_accuracy", "test_iid", "test_unseen", "test_phrasing",
            "test_exact", "train_loss", "early_loss", "seconds")  # fmt: skip
ORIGIN = ("date", "commit", "hardware", "threads", "python", *LIBRARIES)
COLUMNS = IDENTITY + SETTINGS + MEASURED + ORIGIN

Row = dict[str, str]  # as in the file: column -> text


class Run(NamedTuple):
    """One training run. rank is 0 for full fine-tuning."""

    method: str
    rank: int
    learning_rate: float
    seed: int

    def __str__(self) -> str:
        name = f"LoRA r={self.rank}" if self.rank else "full"
        return f"{name} lr={self.learning_rate:g} seed={self.seed}"


class Budget(NamedTuple):
    """What all runs of an experiment share."""

    steps: int
    batch_size: int
    base: str  # fingerprints: another base model or task makes other rows
    task: str


# ------------------------------------------------------------------------------------------------- bookkeeping


def wanted(run: Run, budget: Budget) -> Row:
    """The identity and settings of a run as they stand in the file."""
    lora = run.method == "LoRA"
    values = (*run, ALPHA_PER_RANK * run.rank if lora else "", TARGETS if lora else "", *budget)
    return {column: str(value) for column, value in zip(IDENTITY + SETTINGS, values, strict=True)}


def find(rows: Sequence[Row], run: Run, budget: Budget) -> Row | None:
    """The row of a run that was made with these very settings."""
    want = wanted(run, budget)
    return next((row for row in rows if all(row[column] == want[column] for column in want)), None)


def put(rows: Sequence[Row], new: Row) -> list[Row]:
    """The rows with `new` in the place of one of the same identity, in the order of the file."""
    kept = [row for row in rows if any(row[column] != new[column] for column in IDENTITY)]
    return sorted([*kept, new], key=lambda row: (row["method"], *(float(row[c]) for c in IDENTITY[1:])))


def best(rows: Sequence[Row]) -> Row:
    """The row with the highest accuracy on the valid set; of equal ones, that with the lower valid loss."""
    return max(rows, key=lambda row: (float(row["valid_accuracy"]), -_finite(row["valid_loss"])))


def _finite(text: str) -> float:
    return value if math.isfinite(value := float(text)) else math.inf


def tried(rows: Sequence[Row], method: str, rank: int, seed: int, budget: Budget) -> dict[float, Row]:
    """learning rate -> row, of those that were run for a method and rank with one seed."""
    ladder = sorted(GRID[method] + BEYOND[method])
    found = {rate: find(rows, Run(method, rank, rate, seed), budget) for rate in ladder}
    return {rate: row for rate, row in found.items() if row is not None}


def pending(rows: Sequence[Row], method: str, rank: int, seeds: Sequence[int], budget: Budget) -> list[Run]:
    """The runs of a method and rank that can be started now: first the grid, then what lies beyond it, then seeds."""
    done = tried(rows, method, rank, seeds[0], budget)
    if missing := [rate for rate in GRID[method] if rate not in done]:
        return [Run(method, rank, rate, seeds[0]) for rate in missing]
    chosen, ladder = float(best(list(done.values()))["learning_rate"]), sorted(GRID[method] + BEYOND[method])
    at = ladder.index(chosen)
    if beside := [rate for rate in ladder[max(at - 1, 0) : at + 2] if rate not in done]:
        return [Run(method, rank, rate, seeds[0]) for rate in beside]
    runs = [Run(method, rank, chosen, seed) for seed in seeds[1:]]
    return [run for run in runs if find(rows, run, budget) is None]


def summary(rows: Sequence[Row], ranks: Sequence[int], seeds: Sequence[int], budget: Budget) -> list[dict]:
    """For each rank, and 0 for full fine-tuning: the rate chosen on VALID, and TEST accuracy over the seeds at it."""
    found = []
    for method, rank in settings(ranks):
        if not (done := tried(rows, method, rank, seeds[0], budget)):
            continue
        rate = float(best(list(done.values()))["learning_rate"])
        at = [row for seed in seeds if (row := find(rows, Run(method, rank, rate, seed), budget)) is not None]
        test = [float(row["test_accuracy"]) for row in at]
        found.append({
            "method": method, "rank": rank, "learning_rate": rate, "parameters": int(at[0]["parameters"]),
            "rates": len(done), "seeds": len(at), "test": statistics.mean(test), "low": min(test), "high": max(test),
            "exact": statistics.mean(float(row["test_exact"]) for row in at),
            "train_loss": statistics.mean(float(row["train_loss"]) for row in at),
        })  # fmt: skip
    return found


def settings(ranks: Sequence[int]) -> list[tuple[str, int]]:
    return [("full", 0), *(("LoRA", rank) for rank in ranks)]


def read(path: Path) -> list[Row]:
    """The rows of a file; none if it does not exist. ValueError if it is another kind of file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as f:
        reader = csv.DictReader(f, strict=True)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != COLUMNS or any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path} is not a table of this experiment, or it is damaged: its columns should be "
                         f"{', '.join(COLUMNS)}. Move it away, or name another file with --out")  # fmt: skip
    return rows


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write all rows; a crash leaves the old file or the new one, never half of one."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    atomic_write(path, text.getvalue())


def conduct(
    path: Path,
    ranks: Sequence[int],
    seeds: Sequence[int],
    budget: Budget,
    execute: Callable[[Run, Budget], Row],
    pool: Executor,
    jobs: int,
) -> Iterator[tuple[Run, Row, int]]:
    """Run what the file lacks, `jobs` at a time, each row written as it comes; gives (run, row, runs left).

    `execute` does one run. Runs that depend on others (more rates, seeds) are planned as results come in.
    """
    rows = read(path)
    busy: dict[Future, Run] = {}
    while True:
        ready = [pending(rows, *setting, seeds, budget) for setting in settings(ranks)]
        for run in (run for runs in ready for run in runs if run not in busy.values()):
            if len(busy) < jobs:
                busy[pool.submit(execute, run, budget)] = run
        if not busy:
            return
        done, _ = wait(busy, return_when=FIRST_COMPLETED)
        for future in done:
            run = busy.pop(future)
            row = wanted(run, budget) | future.result()
            rows = put(read(path), row)
            write(path, rows)
            yield run, row, left(rows, ranks, seeds, budget)


def left(rows: Sequence[Row], ranks: Sequence[int], seeds: Sequence[int], budget: Budget) -> int:
    """How many runs are to come, if no grid is extended further."""
    total = 0
    for method, rank in settings(ranks):
        runs = pending(rows, method, rank, seeds, budget)
        total += len(runs) + (len(seeds) - 1 if runs and runs[0].seed == seeds[0] else 0)
    return total


# ---------------------------------------------------------------------------------------------- one training run


def fingerprint(*files: Path) -> str:
    """The first twelve hex digits of the files' SHA-256."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def budget_here(steps: int = STEPS, batch_size: int = BATCH) -> Budget:
    """The budget with the embedded base model and task as they lie on this machine."""
    task = [DATA / "tasks" / "sql" / f"{split}.jsonl" for split in ("train", "valid", "test")]
    return Budget(steps, batch_size, fingerprint(DATA / "base" / "model.safetensors"), fingerprint(*task))


@cache
def materials():
    """(model, tokenizer, data), loaded once per process."""
    import torch

    import peftlab as pl

    torch.set_num_threads(1)
    return *pl.load_base(DATA / "base", device="cpu"), pl.tasks.load("sql")


def prepared(run: Run):
    """A fresh copy of the base, ready to be trained as the run says; the seed draws A."""
    import torch

    import peftlab as pl

    model = copy.deepcopy(materials()[0])
    torch.manual_seed(run.seed)
    if run.method == "full":
        return pl.full_finetuning(model)
    return pl.attach(model, pl.LoRA, targets=TARGETS, name="sql", r=run.rank, alpha=ALPHA_PER_RANK * run.rank)


def execute(run: Run, budget: Budget) -> Row:
    """Train and evaluate; the measured columns and where they come from."""
    import peftlab as pl
    from peftlab.evaluate import execution_accuracy

    _, tokenizer, data = materials()
    start = time.perf_counter()
    model = prepared(run)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    try:
        log = pl.train(model, data["train"], tokenizer, steps=budget.steps, batch_size=budget.batch_size,
                       lr=run.learning_rate, seed=run.seed, valid=data["valid"], valid_every=budget.steps,
                       progress=False)  # fmt: skip
        train_loss, valid_loss, early = last(log.losses), log.valid_losses[budget.steps], last(log.losses[:EARLY])
    except FloatingPointError:  # diverged: the trained parameters are back at their start, and are judged like that
        train_loss = valid_loss = early = math.nan
    if run.method == "LoRA":
        pl.merge(model)
    valid = execution_accuracy(model, tokenizer, data["valid"])
    test = execution_accuracy(model, tokenizer, data["test"])
    splits = {name: score.value for name, score in test.by("split").items()}
    exact = statistics.mean(case["exact"] for case in test.predictions)
    values = (valid.value, valid_loss, test.value, splits["iid"], splits["unseen"], splits["phrasing"], exact,
              train_loss, early)  # fmt: skip
    measured = [str(parameters), *(f"{value:.6g}" for value in values), f"{time.perf_counter() - start:.1f}"]
    origin = provenance()
    return dict(zip(MEASURED, measured, strict=True)) | {column: str(origin.get(column, "")) for column in ORIGIN}


def last(losses: Sequence[float], n: int = 10) -> float:
    """The mean of the last n losses: one batch's loss says as much of the batch as of the model."""
    return statistics.mean(losses[-n:])


# ------------------------------------------------------------------------------------------------- command line


def table(found: Sequence[dict]) -> str:
    lines = ["| setting | trained | best rate | rates tried | test accuracy, mean (lowest–highest) | seeds | exact |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for one in found:
        name = f"LoRA r = {one['rank']}" if one["rank"] else "full fine-tuning"
        spread = f"{100 * one['test']:.1f} % ({100 * one['low']:.1f}–{100 * one['high']:.1f})"
        lines.append(f"| {name} | {one['parameters']:,} | {one['learning_rate']:g} | {one['rates']} | {spread} | "
                     f"{one['seeds']} | {100 * one['exact']:.1f} % |")  # fmt: skip
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="the CSV file to write and to go on from")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps per run (default {STEPS})")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="ranks (default 1 4 16)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="the first one chooses the rate")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each (default 1)")
    options = parser.parse_args(arguments)
    if min(options.steps, options.jobs, *options.ranks) < 1:
        parser.error("--steps, --jobs and --ranks start at 1")

    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the workers
    budget = budget_here(options.steps)
    plan = options.ranks, options.seeds, budget
    print(f"{left(read(options.out), *plan)} runs to do, {options.jobs} at a time", flush=True)
    start, done = time.perf_counter(), 0
    pool = ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        for run, row, rest in conduct(options.out, *plan, execute, pool, options.jobs):
            done += 1
            minutes = (time.perf_counter() - start) / done * rest / 60
            print(f"{run}: valid {100 * float(row['valid_accuracy']):.1f} %, test "
                  f"{100 * float(row['test_accuracy']):.1f} %, {row['seconds']} s; {rest} to go, "
                  f"about {minutes:.0f} min", flush=True)  # fmt: skip
    except KeyboardInterrupt:
        print(f"stopped; {done} new rows are in {options.out}, the same command goes on from there", file=sys.stderr)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    print(table(summary(read(options.out), *plan)))


if __name__ == "__main__":
    main()
