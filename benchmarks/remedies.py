"""What helps against forgetting? Remedies beside doing nothing, for full fine-tuning and for LoRA.

    python benchmarks/remedies.py --jobs 2         # writes data/results/remedies.csv; goes on where it was stopped

Each method runs at the rate that served the task best in data/results/forgetting.csv (on VALID, with seed 0), with
the budget of that experiment; without a remedy, and at lower rates, its rows there are the comparison. Each remedy has
one or two strengths, chosen before the first run and not tuned:

- rehearsal: the share of the rows that are old text (5 and 20 %): half of it the invented world, half documentation and
  code. The steps stay the same, so the task gets that much less.
- decay: η·λ, the share of the way back to the start that each step goes at the peak rate (0.03).
- KL old: λ of the divergence from the base on 4 old texts a step (1). KL prompts: the same on the task's own questions,
  which needs no old text. Both nearly double the cost of a step.
- interpolation: after training, a of θ₀ + a·(θ − θ₀) (0.5): WiSE-FT; of LoRA, its scale times a.

What is measured is as in forgetting.py. Another remedy needs no experiment: the adapter is switched off for requests
that are not about the task, and the base is back, bit for bit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: each worker process computes with one thread

import classic  # noqa: E402  # the experiments beside this file
import forgetting  # noqa: E402

from peftlab import lab  # noqa: E402
from peftlab.paths import DATA  # noqa: E402

OUT, SEEDS = DATA / "results" / "remedies.csv", (0, 1, 2)
METHODS = ("full", "LoRA r=8 all")
REMEDIES = {
    "rehearsal": (0.05, 0.2),
    "decay": (0.03,),
    "KL old": (1.0,),
    "KL prompts": (1.0,),
    "interpolation": (0.5,),
}
OLD = 400  # old texts at hand


def experiment(
    task: str = "sql", methods: Sequence[str] = METHODS, steps: int = forgetting.STEPS, grid: Path = forgetting.OUT
) -> lab.Experiment:
    """All remedies for the methods, each at its own best rate in the recorded grid."""
    runs, cases = lab.read(grid), []
    for name in methods:
        mine = runs[(runs["task"] == task) & (runs["method"] == name)]
        rate = float(lab.chosen(mine, "method")["learning_rate"].iloc[0])
        for remedy, strengths in REMEDIES.items():
            for strength in strengths:
                key = {"task": task, "method": name, "remedy": remedy, "strength": strength}
                settings = lab.budget(task, steps, forgetting.BATCH)
                settings["config"] = lab.config_hash(key | settings | forgetting.method_of(name)._asdict())
                cases.append(lab.Case(key, settings, (rate,)))
    return lab.Experiment(tuple(cases), forgetting.MEASURED, execute, SEEDS)


@cache
def old() -> list[str]:
    from peftlab.remedies import old_texts

    return old_texts(OLD)


def execute(run: lab.Run) -> lab.Row:
    """One method with one remedy at one strength."""
    from peftlab import remedies

    begin, (task, name, remedy, strength) = time.perf_counter(), run.case.key.values()
    model, tokenizer, rows = forgetting.prepared(name, run.seed), classic.base()[1], classic.rows(task)["train"]
    training: dict[str, Any] = {}
    finish = None
    if remedy == "rehearsal":
        rows = remedies.rehearse(rows, old(), strength, run.seed)
    elif remedy == "decay":
        training["optimizer"] = remedies.decay_to_start(run.learning_rate, strength / run.learning_rate)
    elif remedy in ("KL old", "KL prompts"):
        texts = old() if remedy == "KL old" else [row["prompt"] for row in rows]
        base = classic.base()[0] if name == "full" else None
        training["penalty"] = remedies.KLToBase(model, [{"text": text} for text in texts], tokenizer, strength, base)
    elif name == "full":
        start = {n: p.detach().clone() for n, p in model.named_parameters()}

        def finish(trained):
            return remedies.interpolate(trained, start, strength)
    else:

        def finish(trained):
            return remedies.rescale(trained, "task", strength)

    return forgetting.record(run, model, rows, begin, finish, **training)


def table(runs) -> str:
    """Each remedy's means over the seeds."""
    columns = ["test_accuracy", *(f"test_{name}" for name in forgetting.RETAINED)]
    means = runs.groupby(["method", "remedy", "strength"], sort=False)[columns].mean()
    body = [(*map(str, key), *(f"{100 * one[c]:.1f} %" for c in columns[:3]), *(f"{one[c]:.2f}" for c in columns[3:]))
            for key, one in means.iterrows()]  # fmt: skip
    return lab.markdown(("method", "remedy", "strength", "target", "facts", "lists", "docs", "code"), body)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = lab.options(__doc__, OUT)
    parser.add_argument("--grid", type=Path, default=forgetting.OUT, help="where the best rates are read from")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    lab.add_steps(parser, forgetting.STEPS)
    options = parser.parse_args(arguments)
    plan = experiment(methods=options.methods, steps=options.steps, grid=options.grid)
    lab.carry_out(plan, options, table)


if __name__ == "__main__":
    main()
