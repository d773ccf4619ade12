"""The whole field on one task: every method, initialisation and optimizer, with one budget and each its own tuned rate.

    python benchmarks/field.py --jobs 2          # writes data/results/field.csv; goes on where it was stopped
    python benchmarks/field.py --only DoRA pissa --steps 3 --out /tmp/try.csv

Question: how far does each get from the same base with the same 60 steps, and how many numbers does it train for that?

Task: voices, one user's 240 questions, answered in a pirate's voice; 60 steps of batch 8. Accuracy is the share of 80
held-out questions with the right sentence in the right voice. Methods: all registered classes that can be trained alone
with their defaults (`classic.everyone`, where EXCLUDED says which cannot, and why). Initialisations and LoRA's
optimizers: LoRA of rank 8, alpha 16, on all linear layers, as the method LoRA beside them; GaLore, LISA and BAdam: full
fine-tuning. Hyper-parameters are defaults, and are not tuned; the learning rate is: on the ladder of classic.py, three
rates with seed 0 are judged on VALID, a best one at the edge extends the grid, seeds 1 and 2 run at the best. A seed
draws the adapter and the order of the rows. A small model and a short budget: who learns slowly is shown as slow.

Each finished run is one row of the file. A row counts as done only for the settings that it was made with.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: each worker process computes with one thread

import classic  # noqa: E402

from peftlab import lab  # noqa: E402
from peftlab.inits import INITS  # noqa: E402
from peftlab.optim import OPTIMIZERS  # noqa: E402
from peftlab.paths import DATA  # noqa: E402

OUT = DATA / "results" / "field.csv"
TASK, STEPS, BATCH, SEEDS = "voices", 60, 8, (0, 1, 2)
CALIBRATION = 32  # training rows that an initialisation from data may look at
# name -> why it does not take part
LEFT_OUT = {
    "kaiming": "LoRA's default start",
    "loftq": "packs the base in four bits: another base",
    "qpissa": "packs the base in four bits: another base",
    "relora": "restarts on a learning-rate schedule of its own",
}
OF_ALL_WEIGHTS = ("galore", "lisa", "badam")  # optimizers for full fine-tuning
HYPER: dict[str, dict[str, Any]] = {  # where a function has no default, or one for much longer runs than this
    "lisa": {"every": 10}, "badam": {"every": 10}, "galore": {"r": 8, "every": 20},
}  # fmt: skip


class Entrant(NamedTuple):
    kind: str  # method, initialisation or optimizer
    method: classic.Method
    start: Callable | None = None
    optimizer: Callable | None = None


def entrants() -> dict[str, Entrant]:
    """All that take part, by name."""
    lora, full = classic.METHODS["LoRA"], classic.METHODS["full"]
    found = {name: Entrant("method", method) for name, method in classic.everyone().items()}
    for name, start in INITS.items():
        if name not in LEFT_OUT:
            found[name] = Entrant("initialisation", lora, start=start)
    for name, optimizer in OPTIMIZERS.items():
        if name not in LEFT_OUT:
            method = full if name in OF_ALL_WEIGHTS else lora
            found[name] = Entrant("optimizer", method, optimizer=optimizer)
    return found


def experiment(names: Sequence[str] | None = None, steps: int = STEPS) -> lab.Experiment:
    budget, cases = lab.budget(TASK, steps, BATCH), []
    for name, (kind, (_, rate, hyper, targets), _, _) in entrants().items():
        if names is None or name in names:
            own = {"hyper": json.dumps(hyper | HYPER.get(name, {})), "targets": targets or ""}
            at = classic.LADDER.index(rate)
            grid, beyond = classic.LADDER[at - 1 : at + 2], classic.LADDER  # C3A likes rates above 1
            cases.append(lab.Case({"kind": kind, "method": name}, own | budget, grid, beyond))
    return lab.Experiment(tuple(cases), classic.MEASURED, execute, SEEDS)


def prepared(name: str, rows: Sequence[dict], seed: int = 0):
    """A fresh copy of the base with the entrant on it, started as it starts."""
    import inspect

    entrant = entrants()[name]
    model = classic.adapted(entrant.method, "field", seed)
    if entrant.start is not None:
        takes = inspect.signature(entrant.start).parameters
        data = {"data": list(rows[:CALIBRATION]), "tokenizer": classic.base()[1]} if "data" in takes else {}
        drawn = {"seed": seed} if "seed" in takes else {}
        entrant.start(model, name="field", **data, **drawn)
    return model


def execute(run: lab.Run) -> lab.Row:
    """Train as the leaderboard does, from the entrant's start and with its optimizer."""
    start, name = time.perf_counter(), run.case.key["method"]
    model, own = prepared(name, classic.rows(TASK)["train"], run.seed), entrants()[name].optimizer
    optimizer = "adamw" if own is None else own(model, lr=run.learning_rate, **HYPER.get(name, {}))
    return classic.record(run, model, TASK, start, optimizer)


def table(runs) -> str:
    lines = ["| kind | name | trained | best rate | rates | test accuracy, mean (lowest–highest) | seeds | loss |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for (kind, name), one in lab.summary(runs, ["kind", "method"], also=["valid_loss"]).iterrows():
        lines.append(f"| {kind} | {name} | {one['parameters']:,.0f} | {one['learning_rate']:g} | {one['rates']:.0f} | "
                     f"{lab.seeds_range(one)} | {one['seeds']:.0f} | {one['valid_loss']:.3f} |")  # fmt: skip
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    there = tuple(entrants())
    parser = lab.options(__doc__, OUT, jobs=1)
    parser.add_argument("--only", nargs="+", choices=there, metavar="NAME", help=f"of {', '.join(there)}")
    lab.add_steps(parser, STEPS)
    options = parser.parse_args(arguments)
    lab.carry_out(experiment(options.only, options.steps), options, table)


if __name__ == "__main__":
    main()
