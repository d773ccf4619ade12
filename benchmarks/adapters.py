"""The adapters that lessons 12 to 14 merge, serve and export: LoRA on the embedded base, one per task and per voice.

    python benchmarks/adapters.py --jobs 2         # writes data/results/adapters.csv; goes on where it was stopped
    python benchmarks/adapters.py --publish        # puts those of seed 0 into data/adapters, with a README.md

Each is LoRA with r = 8, α = 16 on all linear layers. Three rates are tried with seed 0 and judged on VALID (a best one
at the edge extends the grid); seeds 1 and 2 then run at the best rate. "sql+reviews" and "pirate+telegram" are trained
on the rows of both, for as many steps as the two together: what merging is compared with in merging.py. The trained
adapters lie in runs/adapters; one that is missing there is trained again when it is asked for, to the same values.
"""

from __future__ import annotations

import copy
import os
import random
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: each worker process computes with one thread

import classic  # noqa: E402  # the experiment beside this file: the base, scoring

from peftlab import lab  # noqa: E402
from peftlab.paths import DATA, atomic_folder, atomic_write  # noqa: E402

OUT, SEEDS = DATA / "results" / "adapters.csv", (0, 1, 2)
RUNS, PUBLISHED = DATA.parent / "runs" / "adapters", DATA / "adapters"
HYPER, BATCH = {"r": 8, "alpha": 16}, 16
VOICES = ("telegram", "pirate", "letter", "curious", "list")
STEPS = {"sql": 300, "reviews": 300} | dict.fromkeys(VOICES, 120)
MIXED = {"sql+reviews": ("sql", "reviews"), "pirate+telegram": ("pirate", "telegram")}
LADDER = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
MEASURED = ("parameters", "train_loss", "valid_loss", "valid_accuracy", "test_accuracy", "train_seconds", "seconds")


def parts(task: str) -> tuple[str, ...]:
    """The tasks that a mixed one is made of; any other is itself."""
    return MIXED.get(task, (task,))


def steps_of(task: str) -> int:
    return sum(STEPS[part] for part in parts(task))


def source(task: str) -> str:
    """The data set that a task's rows are from."""
    return "voices" if task in VOICES else task


@cache
def rows(task: str) -> dict[str, list[dict]]:
    """A task's rows by split; of sql's TEST those questions that are like the training's; of the voices, one."""
    import peftlab as pl

    if task in MIXED:
        found = {split: [row for part in MIXED[task] for row in rows(part)[split]] for split in pl.tasks.SPLITS}
        random.Random(0).shuffle(found["train"])
        return found
    kept = {split: [dict(row) for row in there] for split, there in pl.tasks.load(source(task)).items()}
    if task in VOICES:
        return {split: [row for row in there if row["voice"] == task] for split, there in kept.items()}
    return kept | {"test": [row for row in kept["test"] if row.get("split", "iid") == "iid"]}


def experiment(tasks: Sequence[str] = (*STEPS, *MIXED), seeds: Sequence[int] = SEEDS) -> lab.Experiment:
    """All adapters, at three rates each."""
    cases = []
    for task in tasks:
        settings = {"method": "LoRA"} | lab.budget(source(parts(task)[0]), steps_of(task), BATCH)
        settings["config"] = lab.config_hash({"task": task, **settings, **HYPER})
        cases.append(lab.Case({"task": task}, settings, LADDER[2:5], LADDER))
    return lab.Experiment(tuple(cases), MEASURED, execute, tuple(seeds))


def base():
    """(a fresh copy of the base, tokenizer)"""
    model, tokenizer = classic.base()
    return copy.deepcopy(model), tokenizer


def trained(task: str, rate: float, seed: int, valid: bool = False) -> tuple[Path, dict[str, float]]:
    """(folder of the trained adapter, its losses): trained now if it is not there."""
    import json

    import torch

    import peftlab as pl

    case = experiment([task]).cases[0]
    folder = RUNS / f"{task}-{rate:g}-{seed}-{case.settings['config']}"
    if (folder / "losses.json").is_file():
        return folder, json.loads((folder / "losses.json").read_text())
    model, tokenizer = base()
    torch.manual_seed(seed)
    pl.attach(model, pl.LoRA, targets="all-linear", name="adapter", **HYPER)
    found = {"train_loss": float("nan"), "valid_loss": float("nan")}
    steps, start = steps_of(task), time.perf_counter()
    try:
        log = pl.train(model, rows(task)["train"], tokenizer, steps=steps, batch_size=BATCH, lr=rate, seed=seed,
                       valid=rows(task)["valid"], valid_every=steps, progress=False)  # fmt: skip
        found = {"train_loss": lab.last(log.losses), "valid_loss": log.valid_losses[steps]}
    except FloatingPointError:
        pass  # diverged: the trained parameters are back at their start
    found["train_seconds"] = round(time.perf_counter() - start, 1)
    with atomic_folder(folder) as unfinished:
        pl.save_adapter(model, unfinished, name="adapter")
        atomic_write(unfinished / "losses.json", json.dumps(found) + "\n")
    return folder, found


def accuracy(model, task: str, split: str) -> float:
    """Mean over the parts of a task of the share answered right."""
    scores = [classic.scored(model, source(part), rows(part)[split]).value for part in parts(task)]
    return sum(scores) / len(scores)


def execute(run: lab.Run) -> lab.Row:
    """Train one adapter, keep it, and measure it."""
    import peftlab as pl

    begin, task = time.perf_counter(), run.case.key["task"]
    folder, losses = trained(task, run.learning_rate, run.seed)
    model, _ = base()
    pl.load_adapter(model, folder, name="adapter")
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    pl.merge(model)
    found = {"parameters": parameters, **losses, "valid_accuracy": accuracy(model, task, "valid"),
             "test_accuracy": accuracy(model, task, "test")}  # fmt: skip
    return lab.measured_row(MEASURED, found | {"seconds": round(time.perf_counter() - begin, 1)})


def best_rate(task: str, path: Path = OUT) -> float:
    """The rate chosen on VALID with seed 0, from the recorded runs."""
    runs = lab.read(path)
    mine = runs[runs["task"] == task]
    if not len(mine):
        raise SystemExit(f"{path} has no run of {task!r}: run benchmarks/adapters.py first")
    return float(lab.chosen(mine, "task")["learning_rate"].iloc[0])


def table(runs) -> str:
    """Each task at its best rate."""
    found = lab.summary(runs, "task")
    body = [(task, f"{one['learning_rate']:g}", f"{one.rates:.0f}", f"{one.seeds:.0f}", lab.seeds_range(one))
            for task, one in found.iterrows()]  # fmt: skip
    return lab.markdown(("task", "best rate", "rates", "seeds", "TEST"), body)


README = """# Trained adapters

LoRA (r = {r}, α = {alpha}, all linear layers) on the embedded base, float32, in HF PEFT's file format: what lessons 12
to 14 merge, serve and export.

    python benchmarks/adapters.py --publish        # seed 0; trains what is missing in runs/adapters

| adapter | trained on | steps × batch | rate | TEST, seed 0 |
|---|---|---|---|---|
{rows}

Accuracy: sql, the answer's rows are those of the gold query, on questions like the training's; reviews, the right
class; a voice, the right sentence in the right voice. Rates and the other seeds are in `data/results/adapters.csv`,
with hardware, versions, commit and date of each run.
"""


def publish() -> None:
    """Seed 0 of each task at its best rate, into data/adapters."""
    import shutil

    from peftlab.files import CONFIG, WEIGHTS

    lines, runs = [], lab.read(OUT)
    with atomic_folder(PUBLISHED) as unfinished:
        for task in STEPS:
            rate = best_rate(task)
            folder, _ = trained(task, rate, 0)
            (unfinished / task).mkdir()
            for file in (CONFIG, WEIGHTS):
                shutil.copyfile(folder / file, unfinished / task / file)
            mine = runs[(runs["task"] == task) & (runs["learning_rate"] == rate) & (runs["seed"] == 0)].iloc[0]
            words = f"{task} | {source(task)}{f', the rows of {task}' if task in VOICES else ''}"
            lines.append(f"| {words} | {mine['steps']} × {BATCH} | {rate:g} | {100 * mine['test_accuracy']:.1f} % |")
        atomic_write(unfinished / "README.md", README.format(**HYPER, rows="\n".join(lines)))
    print(f"{PUBLISHED}: {', '.join(STEPS)}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = lab.options(__doc__, OUT)
    parser.add_argument("--tasks", nargs="+", choices=(*STEPS, *MIXED), default=(*STEPS, *MIXED))
    parser.add_argument("--publish", action="store_true", help="put seed 0 of each task into data/adapters, and end")
    options = parser.parse_args(arguments)
    if options.publish:
        return publish()
    lab.carry_out(experiment(options.tasks), options, table)


if __name__ == "__main__":
    main()
