"""What the programs of benchmarks/ have in common: how they are called, and how they end."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .engine import ENGINES, work
from .plan import Experiment
from .table import made


def at_least(least: int) -> Callable[[str], int]:
    """For an option: `add_argument("--steps", type=at_least(1))`."""

    def whole(text: str) -> int:
        if (number := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {number}")
        return number

    return whole


def options(text: str | None, out: Path | None, jobs: int | None = None) -> argparse.ArgumentParser:
    """The options that all experiments have: where the rows are, and how the runs are done. Each adds its own."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out, help="the file to write, and of the runs to go on from")
    parser.add_argument("--jobs", type=at_least(1), default=jobs,
                        help=f"processes of one thread each (default: {jobs or 'as many as fit'})")  # fmt: skip
    parser.add_argument("--engine", choices=ENGINES, default="processes", help="ray: on a cluster")
    parser.add_argument("--address", help="of a running Ray cluster (default: one is started here)")
    return parser


def add_steps(parser: argparse.ArgumentParser, default: int | None) -> None:
    """How long a run trains; None: that depends on the task."""
    parser.add_argument("--steps", type=at_least(1), default=default,
                        help=f"optimizer steps per run (default: {default or 'each task has its own'})")  # fmt: skip


def carry_out(plan: Experiment, wanted: argparse.Namespace, table: Callable[[Any], str]) -> None:
    """Run what is missing, and print the table of what there is, also after an interruption.

    wanted: what `options` read. table: the plan's runs as a pandas table -> text.
    """
    try:
        work(plan, wanted.out, wanted.jobs, wanted.engine, wanted.address)
    finally:
        runs = made(wanted.out, plan)
        print(table(runs) if len(runs) else "no runs yet")
