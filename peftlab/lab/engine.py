"""Doing the runs of an experiment: in processes of this machine, or on a cluster; and one run of training."""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from statistics import fmean
from typing import Any

from .cluster import RayExecutor
from .plan import Experiment, Row, Run, left, left_of, pending, wanted, without_old
from .table import put, rows_of, write

ENGINES = ("processes", "ray")
WORKER_MEMORY = 2**30  # bytes; a worker of benchmarks/forgetting.py, which holds two models, takes 0.85 GiB


def conduct(experiment: Experiment, path: Path, pool: Executor, jobs: int) -> Iterator[tuple[Run, Row, int]]:
    """Run what the file lacks, `jobs` at a time, each row written as it comes; gives (run, row, runs left).

    Runs that depend on others (more rates, seeds) are planned as results come in. A run that raises takes its case
    out of the plan; when all others are done, RuntimeError says which ones failed. Is a worker killed, and with it its
    pool, BrokenExecutor is raised at once. Whatever ends it, all rows but those of the runs in flight are in the file.
    """
    rows, seeds = rows_of(path, experiment.columns), experiment.seeds
    busy: dict[Future, Run] = {}
    failed: dict[str, BaseException] = {}  # case -> why
    while True:
        open_cases = [case for case in experiment.cases if str(case) not in failed]
        can = [run for case in open_cases for run in pending(rows, case, seeds, experiment.sweep)]
        for run in sorted(can, key=lambda run: seeds.index(run.seed)):  # a first look at all cases before any is whole
            if len(busy) < jobs and run not in busy.values():
                try:
                    busy[pool.submit(experiment.execute, run)] = run
                except BrokenExecutor:
                    if not busy:
                        raise
                    break  # one of those in flight may have ended well; the others say what happened
        if not busy:
            break
        done, _ = wait(busy, return_when=FIRST_COMPLETED)
        for future in sorted(done, key=lambda future: future.exception() is not None):  # rows first: they are kept
            run = busy.pop(future)
            if isinstance(error := future.exception(), BrokenExecutor):
                raise error  # a worker was killed: none is left to go on with
            if error is not None:
                failed.setdefault(str(run.case), error)
                _say(f"{run} failed: {type(error).__name__}: {error}", sys.stderr)
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


def work(
    experiment: Experiment, path: Path, jobs: int | None = None, engine: str = "processes", address: str | None = None
) -> None:
    """`conduct` in `jobs` processes of one thread each, with a line per run; Ctrl-C keeps what is done.

    jobs: None takes as many as fit this machine (`fitting_jobs`), or all cores of a cluster. engine: "processes", or
    "ray" where that library is installed; `address` is that of a running Ray cluster, None starts one here. On a
    terminal, a bar shows the time that is left.
    Raises
      ValueError: a setting or a file that cannot be right.
      RuntimeError: cases that failed; all others are done.
      BrokenExecutor: a worker was killed, most often for want of memory; what is done is kept.
      ImportError: ray is not installed.
    """
    from tqdm import tqdm

    if engine not in ENGINES:
        raise ValueError(f"there is no engine {engine!r}; there are {', '.join(ENGINES)}")
    if address is not None and engine != "ray":
        raise ValueError("an address is that of a Ray cluster: say engine='ray' too")
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1, not {jobs}")
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the workers
    rows = rows_of(path, experiment.columns)
    pool: Executor
    if engine == "ray":
        pool = RayExecutor(address, jobs or fitting_jobs())
        jobs = jobs or pool.cores
    else:
        jobs = jobs or fitting_jobs()
        pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _end_with_parent)
    print(f"{left(rows, experiment)} runs to do, {jobs} at a time", flush=True)
    spent: dict[str, list[float]] = {}  # case -> seconds of each run that was done now
    done = 0
    shown = sys.stdout.isatty() and left(rows, experiment) > 0
    form = "{percentage:3.0f} %|{bar}| {n_fmt} of {total_fmt} runs, {elapsed} so far{postfix}"
    try:
        with tqdm(total=left(rows, experiment), bar_format=form, file=sys.stdout, disable=not shown) as bar:
            for run, row, rest in conduct(experiment, path, pool, jobs):
                done += 1
                spent.setdefault(str(run.case), []).append(float(row["seconds"]))
                rows = rows_of(path, experiment.columns)
                ahead = {str(case): left_of(rows, case, experiment.seeds, experiment.sweep)
                         for case in experiment.cases}  # fmt: skip
                minutes = time_left(ahead, spent, jobs) / 60
                _say(f"{run}: valid {100 * float(row['valid_accuracy']):.1f} %, test "
                     f"{100 * float(row['test_accuracy']):.1f} %, {row['seconds']} s; {rest} to go, "
                     f"about {minutes:.0f} min", sys.stdout)  # fmt: skip
                bar.total = done + rest  # a grid that was extended has more
                bar.set_postfix_str(f"about {minutes:.0f} min left", refresh=False)
                bar.update()
    except BrokenExecutor as error:
        why = f"a worker was killed, perhaps for want of memory; {done} new rows are in {path}, the same command goes"
        raise type(error)(f"{why} on from there, with fewer than {jobs} jobs if memory is short") from error
    except KeyboardInterrupt:
        print(f"stopped; {done} new rows are in {path}, the same command goes on from there", file=sys.stderr)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def fitting_jobs() -> int:
    """How many workers this machine (or this container) has the cores and the free memory for, each with 1 GiB."""
    from ..course.machine import check_machine

    machine = check_machine()
    return max(1, min(machine.cores, machine.free_memory // WORKER_MEMORY))


def time_left(ahead: Mapping[str, int], spent: Mapping[str, Sequence[float]], jobs: int) -> float:
    """Seconds until all is done: each run takes its case's mean so far, or all runs' mean if its case had none yet.

    ahead: case -> runs to come. spent: case -> seconds of each finished run, alone. nan before the first one.
    """
    finished = [seconds for each in spent.values() for seconds in each]
    if not (total := sum(ahead.values())):
        return 0.0
    if not finished:
        return math.nan
    work = sum(count * fmean(spent.get(case) or finished) for case, count in ahead.items())
    return work / min(jobs, total)


def _say(words: str, file) -> None:
    """A line above the bar, or just a line."""
    from tqdm import tqdm

    tqdm.write(words, file=file)
    file.flush()


def _end_with_parent() -> None:
    """In a worker: end when the process that started it is gone, killed or not, instead of computing on for nobody."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def train_run(
    run: Run, model, data: Mapping[str, Any], tokenizer, early: int, optimizer: Any = "adamw"
) -> dict[str, float]:
    """Train as a run's settings say; its train_loss, valid_loss and early_loss, which is that of the first steps.

    optimizer: as `train` takes it. A run that diverged has no losses (nan): its trained parameters are back at their
    start, and are judged like that.
    """
    import peftlab as pl

    settings = run.case.settings
    try:
        log = pl.train(model, data["train"], tokenizer, steps=settings["steps"], batch_size=settings["batch_size"],
                       lr=run.learning_rate, seed=run.seed, valid=data["valid"], valid_every=settings["steps"],
                       progress=False, optimizer=optimizer)  # fmt: skip
        losses = last(log.losses), log.valid_losses[settings["steps"]], last(log.losses[:early])
    except FloatingPointError:
        losses = (math.nan,) * 3
    return dict(zip(("train_loss", "valid_loss", "early_loss"), losses, strict=True))


def last(losses: Sequence[float], n: int = 10) -> float:
    """The mean of the last n losses: one batch's loss says as much of the batch as of the model."""
    return fmean(losses[-n:])
