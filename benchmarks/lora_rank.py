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

import copy
import os
import statistics
import time
from collections.abc import Sequence
from functools import cache

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: each worker process computes with one thread

from peftlab import lab  # noqa: E402
from peftlab.paths import DATA  # noqa: E402

OUT = DATA / "results" / "lora_rank.csv"
RANKS, SEEDS = (1, 4, 16), (0, 1, 2)
STEPS, BATCH = 250, 16
EARLY = 50  # steps after which the loss is recorded too, so that a reader can check a row in seconds
TARGETS = "all-linear"
ALPHA_PER_RANK = 2
GRID = {"LoRA": (1e-3, 2e-3, 5e-3, 1e-2), "full": (1e-4, 3e-4, 1e-3, 3e-3)}
BEYOND = {"LoRA": (2e-4, 5e-4, 2e-2, 5e-2), "full": (1e-5, 3e-5, 1e-2, 3e-2)}  # if the best rate is at an edge
MEASURED = ("parameters", "valid_accuracy", "valid_loss", "test_accuracy", "test_iid", "test_unseen", "test_phrasing",
            "test_exact", "train_loss", "early_loss", "seconds")  # fmt: skip


def experiment(ranks: Sequence[int] = RANKS, seeds: Sequence[int] = SEEDS, steps: int = STEPS) -> lab.Experiment:
    """Full fine-tuning (rank 0) and LoRA of each rank, with the base model and the task as they lie here."""
    base, task = lab.fingerprints("sql")
    shared = {"steps": steps, "batch_size": BATCH, "base": base, "task": task}
    full = lab.Case({"method": "full", "rank": 0}, {"alpha": "", "targets": ""} | shared, GRID["full"], BEYOND["full"])
    lora = [lab.Case({"method": "LoRA", "rank": rank}, {"alpha": ALPHA_PER_RANK * rank, "targets": TARGETS} | shared,
                     GRID["LoRA"], BEYOND["LoRA"]) for rank in ranks]  # fmt: skip
    return lab.Experiment((full, *lora), MEASURED, execute, tuple(seeds))


@cache
def materials():
    """(model, tokenizer, data), loaded once per process."""
    import torch

    import peftlab as pl

    torch.set_num_threads(1)
    return *pl.load_base(DATA / "base", device="cpu"), pl.tasks.load("sql")


def prepared(run: lab.Run):
    """A fresh copy of the base, ready to be trained as the run says; the seed draws A."""
    import torch

    import peftlab as pl

    model, rank = copy.deepcopy(materials()[0]), run.case.key["rank"]
    torch.manual_seed(run.seed)
    if rank == 0:
        return pl.full_finetuning(model)
    return pl.attach(model, pl.LoRA, targets=TARGETS, name="sql", r=rank, alpha=ALPHA_PER_RANK * rank)


def execute(run: lab.Run) -> lab.Row:
    """Train and evaluate; the measured columns and where they come from."""
    import peftlab as pl
    from peftlab.evaluate import execution_accuracy

    _, tokenizer, data = materials()
    start = time.perf_counter()
    model = prepared(run)
    found = {"parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    found |= lab.train_run(run, model, data, tokenizer, EARLY)
    if run.case.key["rank"]:
        pl.merge(model)
    valid = execution_accuracy(model, tokenizer, data["valid"])
    test = execution_accuracy(model, tokenizer, data["test"])
    found |= {"valid_accuracy": valid.value, "test_accuracy": test.value}
    found |= {f"test_{name}": score.value for name, score in test.by("split").items()}
    found["test_exact"] = statistics.mean(case["exact"] for case in test.predictions)
    return lab.measured_row(MEASURED, found | {"seconds": round(time.perf_counter() - start, 1)})


def table(runs) -> str:
    lines = ["| setting | trained | best rate | rates tried | test accuracy, mean (lowest–highest) | seeds | exact |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for (_, rank), one in lab.summary(runs, ["method", "rank"], also=["test_exact"]).iterrows():
        name = f"LoRA r = {rank}" if rank else "full fine-tuning"
        lines.append(f"| {name} | {one['parameters']:,.0f} | {one['learning_rate']:g} | {one['rates']:.0f} | "
                     f"{lab.seeds_range(one)} | {one['seeds']:.0f} | {100 * one['test_exact']:.1f} % |")  # fmt: skip
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = lab.options(__doc__, OUT, jobs=1)
    lab.add_steps(parser, STEPS)
    parser.add_argument("--ranks", type=lab.at_least(1), nargs="+", default=RANKS, help="ranks (default 1 4 16)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="the first one chooses the rate")
    options = parser.parse_args(arguments)
    lab.carry_out(experiment(options.ranks, options.seeds, options.steps), options, table)


if __name__ == "__main__":
    main()
