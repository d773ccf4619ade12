"""Does a 4-bit base cost quality? LoRA on a float32 base, on an NF4 base, on an INT4 base, and started by LoftQ.

    python benchmarks/qlora.py --jobs 2           # writes data/results/qlora.csv; goes on where it was stopped
    python benchmarks/qlora.py --tasks voices --methods QLoRA --steps 3 --out /tmp/try.csv

All is as in classic.py: its tasks, its budgets, its LoRA (rank 8, α = 16, all linear layers). What differs is the base
under the adapter, see METHODS; embeddings, norms and the head are float32 in all of them. Each method and task has its
own learning rate: the same four rates are tried for each with seed 0 and judged on the VALID set, and a best one at the
edge extends the grid. Seeds 1 and 2 then run at the best rate; TEST is only reported. A seed draws A and the order of
the rows, so the methods of one seed start from the same A (LoftQ fills its own) and see the same batches.

The trained model is judged in float32 with its adapter merged into the dequantised weights, which is what it was
trained as, up to rounding (merged_error). Two more merges of the same adapter are judged beside it:
requantised, the merged weights packed again as the base was (for LoRA on a float32 base: packed now, as NF4);
original, the adapter merged into the float32 weights that the base had before it was packed.

Each finished run is one row of the file. A row counts as done only for the settings that it was made with.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: each worker process computes with one thread

import classic  # noqa: E402  # the experiment beside this file

from peftlab import lab  # noqa: E402
from peftlab.paths import DATA  # noqa: E402

OUT, SEEDS = DATA / "results" / "qlora.csv", (0, 1, 2)
GRID = (1e-3, 3e-3, 1e-2, 3e-2)
BEYOND = (1e-4, 3e-4, 1e-1, 3e-1)
PROBE = 16  # valid rows on whose logits the merges are compared
MEASURED = (
    "parameters", "bits", "untrained_loss", "untrained_accuracy", "train_loss", "early_loss", "valid_loss",
    "valid_accuracy", "test_accuracy", "test_form", "merged_error", "requantised_error", "original_error",
    "requantised_loss", "original_loss", "requantised_accuracy", "original_accuracy", "seconds",
)  # fmt: skip


class Method(NamedTuple):
    """The base under LoRA: how it is packed (None: it is not), and whether LoftQ starts the adapter."""

    packing: dict[str, Any] | None
    loftq: int = 0  # iterations


NF4 = {"kind": "nf4", "block": 64, "double": True}
METHODS = {
    "LoRA": Method(None),
    "QLoRA": Method(NF4),
    "QLoRA INT4": Method({"kind": "int4", "block": 64, "double": False}),
    "LoftQ": Method(NF4, 5),
}


def experiment(
    tasks: Sequence[str] = ("voices", "sql", "reviews"), methods: Sequence[str] = tuple(METHODS),
    steps: int | None = None,
) -> lab.Experiment:  # fmt: skip
    """All methods on all tasks, with the base model and the tasks as they lie here."""
    cases = []
    for name in methods:
        packing, iterations = METHODS[name]
        for task in tasks:
            own = {"packing": "" if packing is None else " ".join(map(str, packing.values())), "loftq": iterations}
            budget = lab.budget(task, steps or classic.STEPS[task], classic.BATCH)
            cases.append(lab.Case({"task": task, "method": name}, own | budget, GRID, BEYOND))
    return lab.Experiment(tuple(cases), MEASURED, execute, SEEDS)


# ------------------------------------------------------------------------------------------------------- the models


def prepared(name: str, seed: int = 0):
    """A fresh copy of the base, packed as the method says, with the untrained adapter on it."""
    import torch

    import peftlab as pl
    from peftlab.inits import loftq

    packing, iterations = METHODS[name]
    model, lora = copy.deepcopy(classic.base()[0]), classic.METHODS["LoRA"]
    torch.manual_seed(seed)
    pl.attach(model, pl.LoRA, targets=lora.targets, name="task", **lora.hyper)
    if iterations:
        return loftq(model, "task", iterations, **packing)
    return model if packing is None else pl.quantize(model, **packing)


def on_original(model):
    """The adapter of a trained model, on a fresh float32 base."""
    import peftlab as pl

    fresh, trained = prepared("LoRA"), pl.adapters(model)["task"]
    for path, adapter in pl.adapters(fresh)["task"].items():
        adapter.load_state_dict(trained[path].state_dict())
    return fresh


def dense(model):
    """The same model with each packed layer put back in dense form: the same numbers, written faster."""
    import peftlab as pl
    from peftlab.layers import dense as dense_layer

    for host in pl.hosts(model).values():
        if isinstance(host.layer, pl.NF4Linear):
            host.layer = dense_layer(host.layer)
    return model


def bits(model) -> float:
    """Bits that a weight of the adapted layers takes, scales included."""
    import peftlab as pl

    layers = [host.layer for host in pl.hosts(model).values()]
    sizes = [layer.n_weights if hasattr(layer, "n_weights") else layer.weight.numel() for layer in layers]
    each = [layer.packed.bits if hasattr(layer, "packed") else 32 for layer in layers]
    return sum(size * one for size, one in zip(sizes, each, strict=True)) / sum(sizes)


# ------------------------------------------------------------------------------------------------------- measuring


@cache
def batches(task: str) -> tuple[dict, ...]:
    """The valid rows of a task, ready for the model."""
    import torch

    from peftlab.rows import collate, encode

    model, tokenizer = classic.base()
    rows = encode(model, classic.rows(task)["valid"], tokenizer)
    cut = [rows[at : at + PROBE] for at in range(0, len(rows), PROBE)]
    return tuple(collate(part, tokenizer.pad_token_id, torch.device("cpu")) for part in cut)


def logits(model, task: str):
    """What the model says of the first valid rows, (tokens, words), padding left out."""
    import torch

    batch = batches(task)[0]
    with torch.no_grad():
        said = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return said[batch["attention_mask"].bool()]


def loss(model, task: str) -> float:
    """The mean loss of the valid rows' answers, nats per token."""
    import torch

    total = count = 0.0
    with torch.no_grad():
        for batch in batches(task):
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            total, count = total + tokens * model.eval()(**batch).loss.item(), count + tokens
    return total / count


@cache
def untrained(task: str, name: str) -> dict[str, float]:
    """What the base gives before any training; the same for all seeds, for B or what LoftQ fills in is."""
    model = dense(prepared(name))
    return {"untrained_loss": loss(model, task), "untrained_accuracy": classic.judge(model, task, "test")[0]}


def execute(run: lab.Run) -> lab.Row:
    """Train, evaluate and merge in three ways; the measured columns and where they come from."""
    import peftlab as pl

    start, task, name = time.perf_counter(), run.case.key["task"], run.case.key["method"]
    model = prepared(name, run.seed)
    found = {"bits": bits(model)} | untrained(task, name) | classic.trained(run, model, task)
    trained = logits(model, task)

    def error(merged) -> float:
        return (logits(merged, task) - trained).abs().max().item()

    original = pl.merge(on_original(model))
    pl.merge(model)
    found |= {"merged_error": error(model), "original_error": error(original)} | classic.judged(model, task)
    again = dense(pl.quantize(model, **(METHODS[name].packing or NF4)))
    found["requantised_error"] = error(again)
    for what, merged in (("requantised", again), ("original", original)):
        found[f"{what}_loss"], found[f"{what}_accuracy"] = loss(merged, task), classic.judge(merged, task, "test")[0]
    return lab.measured_row(MEASURED, found | {"seconds": round(time.perf_counter() - start, 1)})


# ------------------------------------------------------------------------------------------------------- command line


def table(runs) -> str:
    columns = ("bits", "untrained_accuracy", "requantised_accuracy", "original_accuracy")
    found = lab.summary(runs, ["task", "method"], also=columns)
    lines = [
        [task, name, f"{one['bits']:.2f}", f"{one['learning_rate']:g}", f"{one['rates']:.0f}", f"{one['seeds']:.0f}",
         f"{100 * one['untrained_accuracy']:.1f}", lab.seeds_range(one), f"{100 * one['requantised_accuracy']:.1f}",
         f"{100 * one['original_accuracy']:.1f}"]
        for (task, name), one in found.iterrows()
    ]  # fmt: skip
    head = ["task", "method", "bits", "best rate", "rates", "seeds", "untrained %", "test accuracy (lowest–highest)",
            "requantised %", "original %"]  # fmt: skip
    return lab.markdown(head, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = lab.options(__doc__, OUT, jobs=1)
    parser.add_argument("--tasks", nargs="+", choices=tuple(classic.STEPS), default=("voices", "sql", "reviews"))
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS), metavar="METHOD",
                        help=f"of {', '.join(METHODS)}")  # fmt: skip
    lab.add_steps(parser, None)
    options = parser.parse_args(arguments)
    lab.carry_out(experiment(options.tasks, options.methods, options.steps), options, table)


if __name__ == "__main__":
    main()
