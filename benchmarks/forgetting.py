"""Does parameter-efficient fine-tuning forget less? Methods × learning rates × seeds, each run a curve.

    python benchmarks/forgetting.py --jobs 2       # writes data/results/forgetting.csv; goes on where it was stopped
    python benchmarks/forgetting.py --methods full --rates 2e-4 --seeds 0 1 2 3 4 5 6 7     # more seeds at one rate
    PEFTLAB_DEVICE=cuda python benchmarks/forgetting.py --jobs 4 --out data/results/forgetting_gpu.csv
    python benchmarks/forgetting.py --methods DoRA --steps 3 --out /tmp/try.csv     # any registered method, by its name

The question: when a method has learned the new task to some degree, how much of what the base knew is left, and does
that depend on the method or on the learning rate? And: what did it learn at its best rate, beside full fine-tuning?

Every run gets the same budget on the task: 200 steps of batch 8 (5 % warm-up, then cosine), AdamW. Every method runs at
five rates of the ladder 1-2-5-10, which end above its best one; if, with the first seed, the best (by VALID accuracy)
is at an edge, the ladder is followed further. Then all other seeds run at all of these rates; of methods that get fewer
than a tenth of the questions right at every rate, at the best one. Hyper-parameters are not tuned: α = 2r for LoRA, or
each class's defaults except where METHODS says otherwise. A seed draws the adapter and the order of the rows.

What is measured, always beside the bare base (method "base"): the task (sql: the answer's rows are those of the gold
query; reviews: the right class), facts and list skills that the base was trained on, loss on held-out documentation
and code; after 25, 50, 100 and 200 steps on VALID (columns sql@25, facts@25, …), and at the end on TEST. Besides:
drift of the hidden states, and size, effective rank and intruder dimensions of the weights' change.
"""

from __future__ import annotations

import copy
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: each worker process computes with one thread

import classic  # noqa: E402  # the experiment beside this file: the base, the tasks' rows

from peftlab import lab  # noqa: E402
from peftlab.paths import DATA  # noqa: E402

OUT, SEEDS, STEPS, BATCH = DATA / "results" / "forgetting.csv", (0, 1, 2), 200, 8
CHECKPOINTS = (25, 50, 100, 200)
SWEEP = 0.1  # accuracy on VALID from which a method runs all seeds at all its rates
TASKS = ("sql", "reviews")
LADDER = tuple(round(digit * 10.0**power, 5) for power in range(-5, 1) for digit in (1, 2, 5))
RETAINED = ("facts", "lists", "docs", "code")
MEASURED = (
    "parameters",
    *(f"{what}@{step}" for step in CHECKPOINTS for what in ("target", *RETAINED)),
    "train_loss", "valid_loss", "valid_accuracy", "test_accuracy", *(f"test_{name}" for name in RETAINED),
    "drift", "drift_middle", "delta_norm", "delta_rank", "intruders", "train_seconds", "seconds",
)  # fmt: skip


class Method(NamedTuple):
    """A class of peftlab or what its name says, where it differs from its defaults, its second highest rate."""

    of: str
    rate: float
    hyper: dict[str, Any] = {}
    targets: str | None = None  # None: the method's own
    quantized: bool = False  # the base is packed in NF4


def lora(r: int, targets: str, rate: float, quantized: bool = False) -> Method:
    return Method("LoRA", rate, {"r": r, "alpha": 2 * r}, targets, quantized)


METHODS = {
    "base": Method("base", 0.0),
    "full": Method("full", 1e-3),
    "LoRA r=8 all": lora(8, "all-linear", 1e-2),
    "last 2 layers": Method("last_layers", 2e-3, {"n": 2}),
    "LoRA r=2 all": lora(2, "all-linear", 1e-2),
    "LoRA r=64 all": lora(64, "all-linear", 5e-3),
    "LoRA r=8 q,v": lora(8, "q_proj|v_proj", 2e-2),
    "LoRA r=8 last 2": lora(8, r"layers\.[45]\..*_proj", 2e-2),  # all linear layers of the last two blocks of six
    "QLoRA r=8 all": lora(8, "all-linear", 1e-2, quantized=True),
    "Houlsby": Method("Houlsby", 1e-2),
    "PrefixTuning": Method("PrefixTuning", 1e-1, {"k": 20}),
    "PromptTuning": Method("PromptTuning", 1e-1, {"k": 20}),
    "BitFit": Method("BitFit", 5e-2, {}, "all-linear"),  # the base has no biases: each linear layer gets one
    "LNTuning": Method("LNTuning", 1e-1),
    "IA3": Method("IA3", 2e-1),
}


def method_of(name: str) -> Method:
    """By its name in METHODS, or any registered class with its defaults."""
    return METHODS[name] if name in METHODS else Method(name, 1e-2)


def rates_of(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(the five that are always run, three more on each side)"""
    if method_of(name).of == "base":
        return (0.0,), ()
    at = LADDER.index(method_of(name).rate)
    return LADDER[at - 3 : at + 2], LADDER[max(at - 6, 0) : at + 5]


def experiment(
    tasks: Sequence[str] = ("sql",), methods: Sequence[str] = tuple(METHODS), seeds: Sequence[int] = SEEDS,
    steps: int = STEPS, rates: Sequence[float] = (),
) -> lab.Experiment:  # fmt: skip
    """All methods on the tasks, at all their rates (or just these), with all seeds; base and tasks as they lie here."""
    cases = []
    for task in tasks:
        for name in methods:
            of, _, hyper, targets, quantized = method_of(name)
            own = {"of": of, "hyper": json.dumps(hyper), "targets": targets or "", "quantized": int(quantized)}
            settings = own | lab.budget(task, steps, BATCH)
            settings["config"] = lab.config_hash({"task": task, "method": name, **settings})
            grid, beyond = (tuple(rates), ()) if rates else rates_of(name)
            cases.append(lab.Case({"task": task, "method": name}, settings, grid, beyond))
    return lab.Experiment(tuple(cases), MEASURED, execute, tuple(seeds), SWEEP)


def prepared(name: str, seed: int = 0):
    """A fresh copy of the base, ready to be trained by the method."""
    import torch

    import peftlab as pl

    of, _, hyper, targets, quantized = method_of(name)
    model = copy.deepcopy(classic.base()[0])
    torch.manual_seed(seed)
    if of == "base":
        return model.requires_grad_(False)
    if of == "full":
        return pl.full_finetuning(model)
    if of == "last_layers":
        return pl.last_layers(model, **hyper)
    pl.attach(model, of, targets=targets, name="task", **hyper)
    return pl.quantize(model) if quantized else model


@cache
def exams():
    from peftlab.retention import Exam

    return Exam.of("valid", facts=100, lists=20, texts=30), Exam.of("test", facts=200, lists=30, texts=40)


def glance(model, task: str) -> dict[str, float]:
    """The task and what is retained, on (half of) the VALID sets."""
    found = {"target": classic.scored(model, task, classic.rows(task)["valid"][:100]).value}
    return found | {name: score.value for name, score in exams()[0].take(model, classic.base()[1]).items()}


def tested(model, task: str) -> dict[str, float]:
    """The same on the TEST sets; of sql those questions that are like the training's (the split `iid`)."""
    rows = [row for row in classic.rows(task)["test"] if task != "sql" or row["split"] == "iid"]
    found = {"test_accuracy": classic.scored(model, task, rows).value}
    return found | {f"test_{name}": score.value for name, score in exams()[1].take(model, classic.base()[1]).items()}


def settled(model) -> bool:
    """Bring a trained model into the form it is used in: packed layers dense, adapters merged; whether that worked."""
    import peftlab as pl
    from peftlab.layers import dense

    for host in pl.hosts(model).values():
        if isinstance(host.layer, pl.NF4Linear):
            host.layer = dense(host.layer)
    return not pl.hosts(model) or classic.merged(model)


def moved(model, start, mergeable: bool) -> dict[str, float]:
    """How far hidden states and weights have gone; no figures for the weights if the change is not one of weights."""
    from peftlab.retention import hidden_drift, relative_change, weight_change, weights

    drift = hidden_drift(model, classic.base()[0], classic.base()[1], exams()[1].docs[:20])
    found = {"drift": float(drift[-1]), "drift_middle": float(drift[len(drift) // 2])}
    end = weights(model) if mergeable else {}
    changes = list(weight_change(start, end).values())
    found["delta_norm"] = relative_change(start, end) if mergeable else math.nan
    found["delta_rank"] = statistics.mean(change.rank for change in changes) if changes else math.nan
    found["intruders"] = statistics.mean(change.intruders for change in changes) if changes else math.nan
    return found


def execute(run: lab.Run) -> lab.Row:
    """Train and evaluate on the way; the measured columns and where they come from."""
    begin, (task, name) = time.perf_counter(), run.case.key.values()
    return record(run, prepared(name, run.seed), classic.rows(task)["train"], begin)


def record(run: lab.Run, model, rows, begin: float, finish: Callable[[Any], Any] | None = None, **training) -> lab.Row:
    """Train a prepared model on rows as the run says, and judge it on the way and at the end, after `finish(model)`."""
    import peftlab as pl
    from peftlab.retention import weights

    task, steps, tokenizer = run.case.key["task"], run.case.settings["steps"], classic.base()[1]
    trained = [p for p in model.parameters() if p.requires_grad]
    with pl.using(model) if pl.hosts(model) else nullcontext():
        start = weights(model)
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in trained), "train_loss": math.nan}
    found["valid_loss"], spent = math.nan, 0.0
    looks = {min(step, steps): step for step in CHECKPOINTS}
    seen: dict[int, dict[str, float]] = {}
    if trained:
        try:
            since = time.perf_counter()
            for log in pl.train_steps(model, rows, tokenizer, steps=steps, batch_size=run.case.settings["batch_size"],
                                      lr=run.learning_rate, seed=run.seed, valid=classic.rows(task)["valid"],
                                      valid_every=steps, **training):  # fmt: skip
                spent += time.perf_counter() - since
                if len(log) in looks and len(log) < steps:
                    seen[looks[len(log)]] = glance(model, task)
                since = time.perf_counter()
            found |= {"train_loss": lab.last(log.losses), "valid_loss": log.valid_losses[steps]}
            if finish is not None:
                finish(model)
        except FloatingPointError:
            seen = {}  # the trained parameters are back at their start, and are judged like that
    mergeable = settled(model)
    last = glance(model, task)
    for step in CHECKPOINTS:
        found |= {f"{what}@{step}": value for what, value in seen.get(step, last).items()}
    found |= {"valid_accuracy": last["target"]} | tested(model, task) | moved(model, start, mergeable)
    found |= {"train_seconds": round(spent, 1), "seconds": round(time.perf_counter() - begin, 1)}
    return lab.measured_row(MEASURED, found)


def table(runs) -> str:
    """Each method at its best rate."""
    also = [f"test_{name}" for name in RETAINED]
    found = lab.summary(runs, ["task", "method"], also=also)
    head = ("task", "method", "trained", "best rate", "rates", "seeds", "target", "facts", "lists", "docs", "code")
    body = []
    for key, one in found.iterrows():
        counts = (f"{one['parameters']:,.0f}", f"{one['learning_rate']:g}", f"{one.rates:.0f}", f"{one.seeds:.0f}")
        kept = [f"{100 * one[name]:.1f} %" for name in also[:2]] + [f"{one[name]:.2f}" for name in also[2:]]
        body.append((*key, *counts, lab.seeds_range(one), *kept))
    return lab.markdown(head, body)


def main(arguments: Sequence[str] | None = None) -> None:
    import peftlab as pl

    parser = lab.options(__doc__, OUT)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=("sql",))
    parser.add_argument("--methods", nargs="+", default=tuple(METHODS), metavar="METHOD",
                        help=f"of {', '.join(METHODS)}, or a registered class")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="the first one finds the rates")
    parser.add_argument("--rates", type=float, nargs="+", default=(), help="just these (default: each method's own)")
    lab.add_steps(parser, STEPS)
    options = parser.parse_args(arguments)
    if wrong := [name for name in options.methods if name not in METHODS and name not in pl.METHODS]:
        parser.error(f"there is no method {wrong[0]!r}; there are {', '.join([*METHODS, *pl.METHODS])}")
    plan = experiment(options.tasks, options.methods, options.seeds, options.steps, options.rates)
    lab.carry_out(plan, options, table)


if __name__ == "__main__":
    main()
