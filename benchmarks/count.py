"""Counting parameters without weights, side by side in one process: ours and peft's, for a 7B and a 70B model.

    python benchmarks/count.py [--rounds 15] [--clock wall|cpu] [--json FILE]

Each builds the model on torch's meta device, attaches LoRA and counts; all take turns, and ratios are formed within a
round. peft makes its adapters in main memory, with numbers in them, unless low_cpu_mem_usage=True asks for less: both
are timed. "model" is building the bare model alone, which is the same for all and is in their times.
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
from collections.abc import Callable

from peftlab import lab
from peftlab.paths import atomic_write
from peftlab.provenance import provenance

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SHAPES = ("llama-2-7b", "llama-3.1-70b")
TARGETS = {"q,v": ["q_proj", "v_proj"], "all linears": "all-linear"}
RANK = 8


def ours(shape: str, targets) -> tuple[int, int]:
    """(trained, all) by peftlab."""
    import peftlab as pl

    counted = pl.count(shape, pl.LoRA, targets=targets, r=RANK)
    return counted.trainable, counted.total


def theirs(shape: str, targets, frugal: bool) -> tuple[int, int]:
    """(trained, all) by the reference: what its print_trainable_parameters prints."""
    import peft

    config = peft.LoraConfig(r=RANK, target_modules=targets, task_type="CAUSAL_LM")
    return peft.get_peft_model(bare(shape), config, low_cpu_mem_usage=frugal).get_nb_trainable_parameters()


def bare(shape: str):
    from peftlab.shapes import meta_model

    return meta_model(shape)


def quartiles(values: list[float]) -> list[float]:
    """First quartile, median, third quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")


def measure(shape: str, label: str, rounds: int, clock: Callable[[], float]) -> dict:
    targets = TARGETS[label]
    works: dict[str, Callable] = {
        "model": lambda: bare(shape), "peft": lambda: theirs(shape, targets, False),
        "peft_frugal": lambda: theirs(shape, targets, True), "ours": lambda: ours(shape, targets),
    }  # fmt: skip
    counts = {name: work() for name, work in works.items()}  # first calls: imports, caches
    if not counts["ours"] == counts["peft"] == counts["peft_frugal"]:
        raise SystemExit(f"{shape}, {label}: ours counts {counts['ours']}, peft {counts['peft']}: nothing to compare")
    seconds: dict[str, list[float]] = {name: [] for name in works}
    draw = random.Random(0)
    for _ in range(rounds):
        for name in draw.sample(list(works), len(works)):
            gc.collect()
            start = clock()
            works[name]()
            seconds[name].append(clock() - start)
    ratios = {f"ratio_to_{name}": quartiles([o / p for o, p in zip(seconds["ours"], seconds[name], strict=True)])
              for name in ("peft", "peft_frugal")}  # fmt: skip
    return {"model": shape, "targets": label, "trained": counts["ours"][0], "parameters": counts["ours"][1],
            **{f"{name}_seconds": quartiles(times) for name, times in seconds.items()}, **ratios}  # fmt: skip


def table(rows: list[dict]) -> str:
    def spread(values: list[float], digits: int = 3) -> str:
        return f"{values[1]:.{digits}f} ({values[0]:.{digits}f}–{values[2]:.{digits}f})"

    head = ("model", "LoRA r=8 on", "trained", "peft s (IQR)", "peft, frugal s", "ours s (IQR)", "ours / peft",
            "ours / frugal", "model s")  # fmt: skip
    body = [
        (row["model"], row["targets"], f"{row['trained']:,}",
         *(spread(row[f"{key}_seconds"]) for key in ("peft", "peft_frugal", "ours")),
         spread(row["ratio_to_peft"]), spread(row["ratio_to_peft_frugal"]), f"{row['model_seconds'][1]:.3f}")
        for row in rows
    ]  # fmt: skip
    return lab.markdown(head, body)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description="Seconds to count parameters without weights, ours beside peft.")
    parser.add_argument("--rounds", type=int, default=15, help="counts of each that are timed (default 15)")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help=f"built-in shapes (default {' '.join(SHAPES)})")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall or this process's cpu (default wall)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers, with machine and versions, to FILE")
    args = parser.parse_args(argv)
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: one round has no spread")
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    here = {**provenance(), "system": platform.platform(terse=True), "load": load}
    rows = [measure(shape, label, args.rounds, CLOCKS[args.clock]) for shape in args.shapes for label in TARGETS]
    print(f"{args.rounds} rounds, {args.clock} clock; {', '.join(f'{key} {value}' for key, value in here.items())}\n")
    print(table(rows))
    if args.json:
        settings = {"rounds": args.rounds, "clock": args.clock, "rank": RANK}
        content = json.dumps({"settings": settings, "machine": here, "rows": rows}, indent=1, ensure_ascii=False)
        atomic_write(args.json, content + "\n")
    return rows


if __name__ == "__main__":
    main()
