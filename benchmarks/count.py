"""Counting parameters without weights, side by side in one process: ours and peft's, for a 7B and a 70B model.

    python benchmarks/count.py [--rounds 15] [--clock wall|cpu] [--json FILE]

Each builds the model on torch's meta device, attaches LoRA and counts; all take turns, and ratios are formed within a
round. peft makes its adapters in main memory, with numbers in them, unless low_cpu_mem_usage=True asks for less: both
are timed. "model" is building the bare model alone, which is the same for all and is in their times.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable

from peftlab import lab

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
    ratios = {f"ratio_to_{name}": lab.ratios(seconds["ours"], seconds[name]) for name in ("peft", "peft_frugal")}
    return {"model": shape, "targets": label, "trained": counts["ours"][0], "parameters": counts["ours"][1],
            **{f"{name}_seconds": lab.quartiles(times) for name, times in seconds.items()}, **ratios}  # fmt: skip


def table(rows: list[dict]) -> str:
    head = ("model", "LoRA r=8 on", "trained", "peft s (IQR)", "peft, frugal s", "ours s (IQR)", "ours / peft",
            "ours / frugal", "model s")  # fmt: skip
    body = [
        (row["model"], row["targets"], f"{row['trained']:,}",
         *(lab.spread(row[f"{key}_seconds"], 3) for key in ("peft", "peft_frugal", "ours")),
         *(lab.spread(row[f"ratio_to_{key}"], 3) for key in ("peft", "peft_frugal")), f"{row['model_seconds'][1]:.3f}")
        for row in rows
    ]  # fmt: skip
    return lab.markdown(head, body)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = lab.timing_options("Seconds to count parameters without weights, ours beside peft.", rounds=15)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help=f"built-in shapes (default {' '.join(SHAPES)})")
    args = parser.parse_args(argv)
    here = lab.machine()
    rows = [measure(shape, label, args.rounds, lab.CLOCKS[args.clock]) for shape in args.shapes for label in TARGETS]
    settings = {"rounds": args.rounds, "clock": args.clock, "rank": RANK}
    lab.report(f"{args.rounds} rounds, {args.clock} clock", here, table(rows), rows, settings, args.out)
    return rows


if __name__ == "__main__":
    main()
