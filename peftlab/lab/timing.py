"""Works timed side by side: they take turns in random order, and ratios are formed within a round.

Whatever else the machine does then hits all of them. Times are told as (first quartile, median, third quartile).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..paths import atomic_write
from ..provenance import provenance
from .commands import at_least

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Name = TypeVar("Name")
Works = TypeVar("Works")


def take_turns(
    works: Mapping[Name, Works], rounds: int, seconds: Callable[[Works], float]
) -> dict[Name, list[float]]:  # fmt: skip
    """name -> `seconds(work)` of each round: in a round every work once, in random order, garbage collected before."""
    found: dict[Name, list[float]] = {name: [] for name in works}
    draw, names = random.Random(0), list(works)
    gc.disable()
    try:
        for _ in range(rounds):
            gc.collect()
            for name in draw.sample(names, len(names)):
                found[name].append(seconds(works[name]))
    finally:
        gc.enable()
    return found


def stopwatch(clock: Callable[[], float]) -> Callable[[Callable[[], Any]], float]:
    """For `take_turns`: how long a call takes by one of CLOCKS."""

    def seconds(work: Callable[[], Any]) -> float:
        start = clock()
        work()
        return clock() - start

    return seconds


def quartiles(values: Sequence[float]) -> list[float]:
    """First quartile, median, third quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")


def ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """Quartiles of time / other, formed within each round."""
    return quartiles([time / other for time, other in zip(times, others, strict=True)])


def spread(found: Sequence[float] | None, digits: int) -> str:
    """Quartiles as text: "1.02 (0.99–1.05)"; a dash for none."""
    return "–" if found is None else f"{found[1]:.{digits}f} ({found[0]:.{digits}f}–{found[2]:.{digits}f})"


def machine() -> dict[str, Any]:
    """Where a timing comes from: versions, hardware, system, and what else the machine was busy with."""
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return {**provenance(), "system": platform.platform(terse=True), "load": load}


def timing_options(text: str, rounds: int, out: Path | None = None) -> argparse.ArgumentParser:
    """The options that all timings have. Each adds its own."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--rounds", type=at_least(2), default=rounds,
                        help=f"rounds that are timed; one has no spread (default {rounds})")  # fmt: skip
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall or this process's cpu (default wall)")
    parser.add_argument("--out", "--json", type=Path, default=out, metavar="FILE",
                        help=f"for the numbers, with machine and versions (default {out.name if out else 'none'})")
    return parser


def report(words: str, here: Mapping[str, Any], table: str, rows: Sequence[dict], settings: Mapping[str, Any],
           out: Path | None) -> None:  # fmt: skip
    """Print what was measured and where, and write it to a JSON file if one is wanted."""
    print(f"{words}; " + ", ".join(f"{key} {value}" for key, value in here.items()) + "\n")
    print(table)
    if out is not None:
        content = json.dumps({"settings": settings, "machine": here, "rows": rows}, indent=1, ensure_ascii=False)
        atomic_write(out, content + "\n")
