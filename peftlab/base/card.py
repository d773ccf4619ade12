"""The finished base model's folder: weights and tokenizer in the usual format, its measured figures, its model card."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import torch

from ..paths import atomic_folder, atomic_write
from ..provenance import provenance
from ..tasks import world
from . import load_base, quiet, text
from .pretrain import EOS, PAD, Recipe


def publish(model, work: Path, out: Path, options: str = "") -> None:
    """Write the trained model, its tokenizer, log and recipe into `out`, in one go.

    options: what the command line held beside the recipe, for the record.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(work / "tokenizer.json")), pad_token=PAD, eos_token=EOS,
        model_max_length=model.config.max_position_embeddings, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    with atomic_folder(out) as folder, quiet():
        model.to("cpu", torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for name in ("log.csv", "recipe.json"):
            shutil.copyfile(work / name, folder / name)
        atomic_write(folder / "trained.json", json.dumps({**provenance(), "options": options}, indent=2) + "\n")


def measure(folder: Path, questions: int = 500, skills: int = 100) -> dict[str, dict[str, list[float]]]:
    """{group: {measure: [value, low, high, n]}}: accuracies as proportions, losses in nats per token."""
    from ..evaluate import exact_match, token_loss

    model, tokenizer = load_base(folder)

    def figures(score) -> list[float]:
        return [round(score.value, 4), round(score.low, 4), round(score.high, 4), score.n]

    groups = ("facts", "list skills", "sums", "each skill", "loss")
    found: dict[str, dict[str, list[float]]] = {group: {} for group in groups}
    for split in ("seen", "phrasing", "unasked"):
        found["facts"][split] = figures(exact_match(model, tokenizer, world.fact_questions(split, questions)))
    for split in ("seen", "phrasing", "items"):
        score = exact_match(model, tokenizer, world.skill_questions(split, skills))
        found["list skills"][split] = figures(score)
        for kind, part in score.by("kind").items():
            found["each skill"][f"{kind}, {split}"] = figures(part)
        sums = world.skill_questions(split, skills, kinds=("sum",))
        found["sums"][split] = figures(exact_match(model, tokenizer, sums))
    for kind, texts in text.standard_library(held_out=True).items():
        found["loss"][f"held-out {kind}"] = figures(token_loss(model, tokenizer, texts))
    return found


def draw(folder: Path):
    """The training curves of a base model's folder: loss against tokens read."""
    from ..course import style

    rows = list(csv.DictReader((folder / "log.csv").open()))
    tokens = [int(r["tokens"]) / 1e6 for r in rows]
    with style.context():
        figure, axes = style.figure()
        curves = {"loss": "training text", "held_out_docs": "held-out English", "held_out_code": "held-out code"}
        for column, label in curves.items():
            axes.plot(tokens, [float(r[column]) for r in rows], label=label)
        axes.set(xlabel="tokens read (millions)", ylabel="loss (nats per token)", title="Pretraining of the base model")
        axes.legend()
    return figure


MEANING = {
    "facts": ("Facts about the world's people, answered exactly", {
        "seen": "phrasing and person known from pretraining questions",
        "phrasing": "a phrasing held out from pretraining",
        "unasked": "people of whom pretraining had statements only"}),
    "list skills": ("List skills (repeat, reverse, first, last, sort), answered exactly", {
        "seen": "fresh lists of known words", "phrasing": "held-out phrasing",
        "items": "a word in the list that never stood in a list before"}),
    "sums": ("Sums of two numbers below 100, answered exactly", {
        "seen": "pairs that pretraining may have had", "phrasing": "held-out phrasing", "items": "held-out pairs"}),
}  # fmt: skip


def report(folder: Path) -> None:
    """Measure the model in `folder`; write figures.json, curves.png and the model card README.md there."""
    from ..course import style

    figures = measure(folder)
    atomic_write(folder / "figures.json", json.dumps({**figures, "measured": provenance()}, indent=2) + "\n")
    atomic_write(folder / "curves.png", style.png(draw(folder)))
    atomic_write(folder / "README.md", card(folder, figures))
    print((folder / "README.md").read_text())


TEMPLATE = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# The embedded base model

A Llama of {parameters:,} parameters ({recipe.layers} layers, width {recipe.width}, {recipe.heads} heads, FFN
{recipe.ffn}, vocabulary {recipe.vocabulary}, tied embeddings, context {recipe.context}), float32, {size:.1f} MiB.
It exists so that the course runs offline on two CPU cores; it knows an invented world, some list skills, and the look
of Python's documentation and code. It is of no use for anything else.

```python
import peftlab as pl
model, tokenizer = pl.load_base()
```

## How it was made

```
{command}
```

{recipe.steps:,} steps of {recipe.batch} × {recipe.window} tokens ({tokens:,} tokens), AdamW, peak rate {recipe.lr:g},
{recipe.warmup} steps of warm-up, cosine decay, seed {recipe.seed}, {minutes:.0f} minutes. The command resumes after an
interruption. All settings are in [recipe.json](recipe.json), the curve is in [log.csv](log.csv).

{origin}.

**Text**, nothing downloaded: topics of Python's `help()`, docstrings and source of the standard library of the Python
named above; docstrings of {libraries}; and an invented world (`peftlab/tasks/world.py`) of {people} people with
{facts} facts each, list skills and sums, in shares {recipe.docs:g}, {recipe.code:g} (source), {recipe.libraries:g}
(libraries) and {recipe.world:g}. Python's and the libraries' text stays under their own licences; none of it is stored
here. A twentieth of the standard library (`peftlab/base/text.py`) is held out.

![training curves](curves.png)

## What it can do

Greedy answers, 95 % intervals; a loss's n counts texts. Measured by `python -m peftlab.base --report`.

| measure | on | value | 95 % interval | n |
|---|---|---|---|---|
"""


def card(folder: Path, figures: dict) -> str:
    """The model card, in Markdown; every figure in it is measured or read from the run's own files."""
    from safetensors import safe_open

    recipe = Recipe(**json.loads((folder / "recipe.json").read_text()))
    trained = json.loads((folder / "trained.json").read_text())
    last = list(csv.DictReader((folder / "log.csv").open()))[-1]
    with safe_open(folder / "model.safetensors", "pt") as f:
        parameters = sum(f.get_tensor(k).numel() for k in f.keys())  # noqa: SIM118
    changed = [f"--{k} {v}" for k, v in vars(recipe).items() if v != getattr(Recipe(), k)]
    options = trained.pop("options").split()
    said = TEMPLATE.format(
        recipe=recipe, parameters=parameters, size=(folder / "model.safetensors").stat().st_size / 2**20,
        command=" ".join(["python -m peftlab.base", *options, *changed]), tokens=int(last["tokens"]),
        minutes=float(last["seconds"]) / 60, origin=", ".join(f"{k} {v}" for k, v in trained.items()),
        libraries=", ".join(text.LIBRARIES), people=len(world.people()), facts=len(world.ATTRIBUTES),
    )  # fmt: skip
    rows = []
    for group, (title, splits) in MEANING.items():
        for split, meaning in splits.items():
            value, low, high, n = figures[group][split]
            rows.append(f"| {title} | {meaning} | {value:.1%} | {low:.1%}–{high:.1%} | {n} |")
    for kind, (value, low, high, n) in figures["loss"].items():
        rows.append(f"| Loss, nats per token | {kind} | {value:.2f} | {low:.2f}–{high:.2f} | {n} |")
    return said + "\n".join(rows) + "\n"
