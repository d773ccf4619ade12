"""The leaderboard: what each method gives on three tasks, and what it costs. It began with the classic methods.

    python benchmarks/classic.py --jobs 2          # writes data/results/classic.csv; goes on where it was stopped
    python benchmarks/classic.py --cost            # writes data/results/classic_cost.json
    python benchmarks/classic.py --tasks reviews --methods LoRA IA3 --steps 3 --out /tmp/try.csv

Who takes part. All of METHODS, and every other registered class that can be trained alone with its defaults: it joins
by being registered. EXCLUDED says which ones cannot, and why. `peftlab.leaderboard` ranks what was recorded.

Quality. Every method gets the same budget on a task: 100 steps of batch 16 on sql, 150 on reviews, 60 on voices (the
pirate's, one user's rows). Rates lie on one ladder with steps of about three. Three of them are tried for each method
and task with seed 0 and judged on the VALID set; a best one at the edge extends the grid. Seeds 1 and 2 then run at the
best rate. TEST is only reported. Hyper-parameters are each class's defaults except where METHODS says otherwise, and
are not tuned; a method that joined has its defaults, and JOINS_AT in the middle of its grid. A seed draws the adapter
and the order of the rows. Accuracy is: sql, the answer's rows are those of the gold query; reviews, the right class;
voices, the right sentence in the right voice. What can be merged is merged before it is evaluated. This is a small
model and a short budget: methods that learn slowly are shown as slow, not as useless.

Cost, measured once and apart, as ratios within one process (see `cost`).

Each finished run is one row of the file. A row counts as done only for the settings that it was made with.
"""

from __future__ import annotations

import copy
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: each worker process computes with one thread

from peftlab import lab  # noqa: E402
from peftlab.paths import DATA, atomic_write  # noqa: E402
from peftlab.provenance import provenance  # noqa: E402

OUT, COST = (DATA / "results" / name for name in ("classic.csv", "classic_cost.json"))
STEPS, BATCH, SEEDS = {"voices": 60, "reviews": 150, "sql": 100}, 16, (0, 1, 2)
EARLY = 20  # steps after which the loss is recorded too, so that a reader can check a row in seconds
VOICE = "pirate"
TOKENS = {"voices": 40, "reviews": 4, "sql": 48}  # the longest answer
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
MEASURED = ("parameters", "valid_accuracy", "valid_loss", "test_accuracy", "test_form", "train_loss", "early_loss",
            "seconds")  # fmt: skip


class Method(NamedTuple):
    """A class of peftlab (None: no adapter, all weights), where it differs from its defaults, and its middle rate."""

    of: str | None
    rate: float
    hyper: dict[str, Any]
    targets: str | None = None  # None: the method's own


# k = 20 trained vectors for all that have some. LLaMA-Adapter: the paper takes 30 of 32 layers, so here all six.
METHODS = {
    "full": Method(None, 3e-3, {}),
    "LoRA": Method("LoRA", 1e-2, {"r": 8, "alpha": 16}, "all-linear"),
    "Houlsby": Method("Houlsby", 1e-2, {}),
    "Pfeiffer": Method("Pfeiffer", 1e-2, {}),
    "ParallelAdapter": Method("ParallelAdapter", 3e-3, {}),
    "Compacter": Method("Compacter", 1e-2, {"bottleneck": 12}),  # Houlsby's; the default is no multiple of n here
    "PrefixTuning": Method("PrefixTuning", 3e-2, {"k": 20}),
    "PrefixTuning MLP": Method("PrefixTuning", 3e-3, {"k": 20, "projection": True}),
    "PromptTuning": Method("PromptTuning", 1e-1, {"k": 20}),
    "PTuning": Method("PTuning", 3e-3, {"k": 20}),
    "LlamaAdapter": Method("LlamaAdapter", 3e-2, {"k": 20, "layers": 6}),
    "BitFit": Method("BitFit", 3e-2, {}, "all-linear"),  # the base has no biases: each linear layer gets one
    "LNTuning": Method("LNTuning", 3e-2, {}),
    "IA3": Method("IA3", 3e-2, {}),
}

# Registered classes that do not join: class -> why. One belongs here if `attach` refuses it without hyper-parameters or
# without other adapters, or if with its defaults it is another method of the table.
EXCLUDED = {
    "ALoRA": "acts from its invocation on, which the tasks' texts do not have",
    "AdapterFusion": "reads two or more adapters that are trained already",
    "CPT": "needs the tokens of its examples, and what each of them is",
    "FishMask": "takes its places from data: inits.fish, lottery and project attach it",
    "Gated": "opens and closes another adapter of the same layers",
    "LoRASoup": "weighs two or more LoRAs that are trained already",
    "ModuleCopy": "is full fine-tuning of the modules that are named",
    "MultitaskPromptTuning": "shares a prompt among tasks; with one task it is prompt tuning",
    "Poly": "shares skills among tasks; with one task it is a LoRA with more parameters",
    "TrainableTokens": "needs the tokens whose vectors are trained",
    "XLoRA": "mixes two or more adapters that are trained already",
}
JOINS_AT = 1e-2


def joined() -> dict[str, Method]:
    """The registered classes that neither METHODS nor EXCLUDED names, each with its defaults, in registry order."""
    import peftlab as pl

    named = {method.of for method in METHODS.values()} | set(EXCLUDED)
    return {name: Method(name, JOINS_AT, {}) for name in pl.METHODS if name not in named}


def everyone() -> dict[str, Method]:
    """All that take part: METHODS first, in its order, so that what is recorded stays as it is."""
    return METHODS | joined()


def experiment(
    tasks: Sequence[str] = tuple(STEPS), methods: Sequence[str] | None = None, steps: int | None = None
) -> lab.Experiment:
    """The methods (all that take part) on all tasks, with the base model and the tasks as they lie here."""
    there = everyone()
    cases = []
    for task in tasks:
        budget = lab.budget(task, steps or STEPS[task], BATCH)
        for name in there if methods is None else methods:
            _, rate, hyper, targets = there[name]
            own = {"hyper": json.dumps(hyper), "targets": targets or ""}
            at = LADDER.index(rate)
            grid, beyond = LADDER[at - 1 : at + 2], LADDER[max(at - 3, 0) : at + 4]
            cases.append(lab.Case({"task": task, "method": name}, own | budget, grid, beyond))
    return lab.Experiment(tuple(cases), MEASURED, execute, SEEDS)


# ---------------------------------------------------------------------------------------------------- quality


@cache
def base():
    """(model, tokenizer), loaded once per process."""
    import torch

    import peftlab as pl

    torch.set_num_threads(1)
    return pl.load_base(DATA / "base", device=os.environ.get("PEFTLAB_DEVICE", "cpu"))


@cache
def rows(task: str) -> dict[str, list[dict]]:
    """A task's rows by split; of the five voices, one."""
    import peftlab as pl

    kept = {split: [dict(row) for row in found] for split, found in pl.tasks.load(task).items()}
    return {split: [row for row in found if row.get("voice", VOICE) == VOICE] for split, found in kept.items()}


def prepared(name: str, seed: int = 0):
    """A fresh copy of the base with the method on it, ready to be trained."""
    return adapted(everyone()[name], "classic", seed)


def adapted(method: Method, name: str, seed: int):
    """A fresh copy of the base with a method on it as the adapter `name`; full fine-tuning has none."""
    import torch

    import peftlab as pl

    model = copy.deepcopy(base()[0])
    torch.manual_seed(seed)
    if method.of is None:
        return pl.full_finetuning(model)
    return pl.attach(model, method.of, targets=method.targets, name=name, **method.hyper)


def merged(model) -> bool:
    """Merge the adapter if there is one that can be; whether it could."""
    import peftlab as pl

    try:
        pl.merge(model)
    except ValueError:
        return False
    return True


def scored(model, task: str, some: Sequence[dict]):
    """The Score of some of a task's rows: the share that is answered right."""
    from peftlab.evaluate import exact_match, execution_accuracy

    measure = execution_accuracy if task == "sql" else exact_match
    return measure(model, base()[1], some, max_new_tokens=TOKENS[task])


def judge(model, task: str, split: str) -> tuple[float, float]:
    """(accuracy, share of answers of the right form: SQL that runs, one of the classes, the right voice)."""
    from peftlab.tasks.voices import style_of

    score = scored(model, task, rows(task)[split])
    form = {
        "sql": lambda answer: not answer["error"],
        "reviews": lambda answer: answer["got"] in ("positive", "negative"),
        "voices": lambda answer: style_of(answer["got"]) == VOICE,
    }[task]
    return score.value, statistics.mean(map(form, score.predictions))


def execute(run: lab.Run) -> lab.Row:
    """Train and evaluate; the measured columns and where they come from."""
    start, task, name = time.perf_counter(), *run.case.key.values()
    return record(run, prepared(name, run.seed), task, start)


def record(run: lab.Run, model, task: str, start: float, optimizer: Any = "adamw") -> lab.Row:
    """Train a prepared model as the run says, merge what can be merged, judge it."""
    found = trained(run, model, task, optimizer)
    merged(model)
    found |= judged(model, task)
    return lab.measured_row(MEASURED, found | {"seconds": round(time.perf_counter() - start, 1)})


def trained(run: lab.Run, model, task: str, optimizer: Any = "adamw") -> dict[str, float]:
    """Train a prepared model as the run says; how many numbers that were, and the losses."""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"parameters": count} | lab.train_run(run, model, rows(task), base()[1], EARLY, optimizer)


def judged(model, task: str) -> dict[str, float]:
    """Accuracy on VALID and TEST, and the form of TEST's answers."""
    test, form = judge(model, task, "test")
    return {"valid_accuracy": judge(model, task, "valid")[0], "test_accuracy": test, "test_form": form}


# ------------------------------------------------------------------------------------------------------- cost


class Subject:
    """A model with its optimizer, and the three things that are timed."""

    def __init__(self, model, ids):
        import torch

        self.model, self.ids = model, ids
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True) if trained else None

    def step(self) -> None:
        """Forward, backward and AdamW on 16 × 64 tokens."""
        self.model.train()
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def answer(self, tokens: int) -> None:
        """Four prompts of 64 tokens and `tokens` new ones, with the cache."""
        self.model.eval()
        ids = self.ids[:4]
        self.model.generate(input_ids=ids, attention_mask=ids > 0, do_sample=False, pad_token_id=0, eos_token_id=None,
                            min_new_tokens=tokens, max_new_tokens=tokens)  # fmt: skip


def seconds(subject: Subject, decoded: int = 32) -> dict[str, float]:
    """Processor time of one training step, of reading a prompt (prefill) and of each further token (decode)."""
    found = {}
    if subject.optimizer is not None:
        start = time.process_time()
        subject.step()
        found["step"] = time.process_time() - start
    at = [time.process_time()]
    for tokens in (1, 1 + decoded):
        subject.answer(tokens)
        at.append(time.process_time())
    return found | {"prefill": at[1] - at[0], "decode": (at[2] - 2 * at[1] + at[0]) / decoded}


def context_used(model, ids) -> int:
    """By how many positions the text is moved, seen by the module that turns positions into angles."""
    seen: list[int] = []

    def look(module, args, kwargs):
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        seen.append(int(positions.max()) + 1)

    rotary = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    hooks = [module.register_forward_pre_hook(look, with_kwargs=True) for module in rotary]
    model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return max(seen) - ids.shape[1]


def stored(model) -> int:
    """Bytes of the safetensors file: of the adapter, or of the whole model if there is none."""
    import peftlab as pl

    with tempfile.TemporaryDirectory() as folder:
        if pl.hosts(model):
            pl.save_adapter(model, Path(folder), "classic")
        else:
            model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def cost(names: Sequence[str] | None = None, rounds: int = 15) -> dict:
    """What each method costs beside full fine-tuning (a step) and the bare base (prefill and decode, unmerged).

    names: of the methods; all that take part, if left out.
    All models live in one process and take turns in random order; a ratio is formed within each round and given as
    (first quartile, median, third quartile). The clock counts this process's own computing, one thread, so that other
    work on the machine disturbs little.
    """
    import torch

    ids = torch.randint(2, 4096, (16, 64), generator=torch.Generator().manual_seed(0))
    chosen = list(dict.fromkeys(["full", *(everyone() if names is None else names)]))
    models = {name: prepared(name) for name in chosen}
    subjects = {name: Subject(model, ids) for name, model in models.items()}
    subjects["base"] = Subject(copy.deepcopy(base()[0]).requires_grad_(False), ids)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in subjects}
    draw = random.Random(0)
    for turn in range(rounds + 1):
        for name in draw.sample(list(subjects), len(subjects)):
            found = seconds(subjects[name])
            if turn:  # the first is warming up
                times[name].append(found)
    lines = []
    for name in chosen:
        model = models[name]
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        line = {"method": name, "parameters": parameters, "bytes": stored(model), "context": context_used(model, ids)}
        line["mergeable"] = merged(model)
        for what, beside in (("step", "full"), ("prefill", "base"), ("decode", "base")):
            own, other = ([turn[what] for turn in times[one]] for one in (name, beside))
            low, middle, high = lab.ratios(own, other)
            line |= {what: round(middle, 3), f"{what}_low": round(low, 3), f"{what}_high": round(high, 3)}
        lines.append(line)
    shapes = {"step": "16 × 64 tokens", "prefill": "4 × 64 tokens", "decode": "1 of 32 tokens, 4 rows at once"}
    clock = "processor time; step: ratio to full fine-tuning, prefill and decode: to the bare base, unmerged"
    return {"rounds": rounds, "clock": clock, "shapes": shapes, "origin": provenance(), "methods": lines}


# ------------------------------------------------------------------------------------------------ command line


def table(runs) -> str:
    found = lab.summary(runs, ["task", "method"], also=["test_form"])
    lines = ["| task | method | trained | best rate | rates | test accuracy, mean (lowest–highest) | seeds | form |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for (task, name), one in found.iterrows():
        lines.append(f"| {task} | {name} | {one['parameters']:,.0f} | {one['learning_rate']:g} | {one['rates']:.0f} | "
                     f"{lab.seeds_range(one)} | {one['seeds']:.0f} | {100 * one['test_form']:.1f} % |")  # fmt: skip
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    methods = everyone()
    parser = lab.options(__doc__, None, jobs=1)
    parser.add_argument("--tasks", nargs="+", choices=tuple(STEPS), default=tuple(STEPS))
    parser.add_argument("--methods", nargs="+", choices=tuple(methods), default=tuple(methods), metavar="METHOD",
                        help=f"of {', '.join(methods)}")  # fmt: skip
    lab.add_steps(parser, None)
    parser.add_argument("--cost", action="store_true", help="measure costs instead of quality")
    parser.add_argument("--rounds", type=lab.at_least(2), default=15, help="of the cost's measurement")
    options = parser.parse_args(arguments)
    options.out = options.out or (COST if options.cost else OUT)
    if options.cost:
        found = cost(options.methods, options.rounds)
        atomic_write(options.out, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        print(json.dumps(found["methods"], indent=1))
        return
    lab.carry_out(experiment(options.tasks, options.methods, options.steps), options, table)


if __name__ == "__main__":
    main()
