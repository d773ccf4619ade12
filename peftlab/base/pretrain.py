"""Pretraining of the embedded base model, from text to weights, reproducibly.

Half of every batch is real text (English and code of the running Python and its libraries), half is the invented world.
What a step sees follows from (seed, step) alone, so that a run can be killed and resumed at any checkpoint.
"""

from __future__ import annotations

import csv
import json
import math
import random
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from tqdm.auto import tqdm

from ..paths import atomic_write
from ..tasks import world
from . import text

PAD, EOS = "<pad>", "<eos>"


@dataclass
class Recipe:
    """Everything that decides the result, with the values of the shipped model."""

    steps: int = 10_000
    batch: int = 8  # windows per step
    window: int = 256  # tokens per window
    lr: float = 2e-3  # peak; linear warm-up, cosine to a hundredth
    warmup: int = 200
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 0
    vocabulary: int = 4096
    width: int = 192
    layers: int = 6
    heads: int = 6
    ffn: int = 512
    context: int = 512
    # shares of the windows: standard-library English, library docstrings, standard-library code, the world
    docs: float = 0.17
    libraries: float = 0.08
    code: float = 0.28
    world: float = 0.47


def train_tokenizer(corpus: list[str], vocabulary: int):
    """Byte-level BPE; digits stay single tokens, so that sums and years are spelled the same way everywhere."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[PAD, EOS], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def _encode(tokenizer, documents: list[str]) -> torch.Tensor:
    """Documents one after the other, each closed by <eos>, as one row of token ids."""
    end = tokenizer.token_to_id(EOS)
    return torch.tensor([i for e in tokenizer.encode_batch(documents) for i in (*e.ids, end)], dtype=torch.int32)


def prepare(recipe: Recipe, folder: Path) -> None:
    """Read the text, train the tokenizer, write tokenizer.json and tokens.safetensors into `folder` (once)."""
    if (folder / "tokens.safetensors").exists():
        return
    rng = random.Random(recipe.seed)
    kept, held = text.standard_library(), text.standard_library(held_out=True)
    library = text.library_docstrings()
    for documents in (kept["docs"], kept["code"], library):
        rng.shuffle(documents)
    invented = [world.document(rng, world.people()) for _ in range(20_000)]
    tokenizer = train_tokenizer(kept["code"][::3] + kept["docs"] + invented, recipe.vocabulary)
    tokens = {
        "docs": kept["docs"], "code": kept["code"], "libraries": library,
        "held_out_docs": held["docs"], "held_out_code": held["code"],
    }  # fmt: skip
    atomic_write(folder / "tokenizer.json", tokenizer.to_str())
    atomic_write(folder / "tokens.safetensors", save({k: _encode(tokenizer, v) for k, v in tokens.items()}))


class Batches:
    """The windows of each step, a function of (seed, step) only."""

    def __init__(self, recipe: Recipe, folder: Path):
        from tokenizers import Tokenizer

        self.recipe, self.tokens = recipe, load_file(folder / "tokens.safetensors")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.people, self.end = world.people(), int(self.tokenizer.token_to_id(EOS) or 0)

    def _invented(self, rng: random.Random) -> torch.Tensor:
        row: list[int] = []
        while len(row) < self.recipe.window:
            row += [*self.tokenizer.encode(world.document(rng, self.people)).ids, self.end]
        return torch.tensor(row[: self.recipe.window], dtype=torch.int32)

    def step(self, step: int) -> torch.Tensor:
        """(batch, window) token ids."""
        r = self.recipe
        rng = random.Random(f"{r.seed}/{step}")
        kinds = rng.choices(("docs", "libraries", "code", "world"), (r.docs, r.libraries, r.code, r.world), k=r.batch)
        rows = []
        for kind in kinds:
            if kind == "world":
                rows.append(self._invented(rng))
            else:
                start = rng.randrange(len(self.tokens[kind]) - r.window)
                rows.append(self.tokens[kind][start : start + r.window])
        return torch.stack(rows).long()

    def held_out(self, kind: str, most: int = 64) -> torch.Tensor:
        """Evenly spread windows of held-out text."""
        tokens, window = self.tokens[f"held_out_{kind}"], self.recipe.window
        starts = torch.linspace(0, len(tokens) - window, min(most, len(tokens) // window)).long().tolist()
        return torch.stack([tokens[s : s + window] for s in starts]).long()


def build(recipe: Recipe, eos: int | None, pad: int | None):
    """A Llama of the recipe's shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocabulary, hidden_size=recipe.width, intermediate_size=recipe.ffn,
            num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads,
            max_position_embeddings=recipe.context, tie_word_embeddings=True,
            pad_token_id=pad, eos_token_id=eos, bos_token_id=eos,
        )
    )  # fmt: skip


def loss_of(model, rows: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats of (B, T) token ids."""
    hidden = model.model(input_ids=rows).last_hidden_state[:, :-1]
    return F.cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), rows[:, 1:].flatten())


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine from `lr` down to a hundredth of it."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def _save_checkpoint(path: Path, model, optimizer, step: int) -> None:
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
    atomic_write(path, save({k: v.cpu().contiguous() for k, v in tensors.items()}, metadata={"step": str(step)}))


def _load_checkpoint(path: Path, model, optimizer) -> int:
    from safetensors import safe_open

    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    state: dict[int, dict] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    with safe_open(path, "pt") as f:
        return int(f.metadata()["step"])


def pretrain(recipe: Recipe, folder: Path, device: str, compiled: bool = False, every: int = 250):
    """Train (or resume) in `folder`; writes log.csv, checkpoint.safetensors and run.json, and returns the model."""
    folder.mkdir(parents=True, exist_ok=True)
    prepare(recipe, folder)
    settings = folder / "recipe.json"
    if settings.exists() and json.loads(settings.read_text()) != asdict(recipe):
        raise ValueError(f"{folder} holds a run of another recipe ({settings}); choose another --work folder")
    atomic_write(settings, json.dumps(asdict(recipe), indent=2))

    batches = Batches(recipe, folder)
    model = build(recipe, eos=batches.end, pad=batches.tokenizer.token_to_id(PAD)).to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.lr, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True
    )
    checkpoint, log = folder / "checkpoint.safetensors", folder / "log.csv"
    first = _load_checkpoint(checkpoint, model, optimizer) if checkpoint.exists() else 0
    columns = ["step", "tokens", "lr", "loss", "held_out_docs", "held_out_code", "seconds"]
    rows = [r for r in csv.DictReader(log.open()) if int(r["step"]) <= first] if log.exists() else []
    before = float(rows[-1]["seconds"]) if rows else 0.0
    objective = torch.compile(loss_of) if compiled else loss_of
    held_out = {kind: batches.held_out(kind).to(device) for kind in ("docs", "code")}

    start, recent = time.perf_counter(), []
    bar = tqdm(range(first, recipe.steps), initial=first, total=recipe.steps, desc="pretraining", mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss = objective(model, batches.step(step).to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.detach())
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            with torch.no_grad():
                unseen = {k: loss_of(model, v).item() for k, v in held_out.items()}
            mean = torch.stack(recent).mean().item()
            if not math.isfinite(mean):
                raise FloatingPointError(f"the loss is {mean} at step {step + 1}; lower --lr and start again")
            values = [step + 1, (step + 1) * recipe.batch * recipe.window, f"{learning_rate(recipe, step):.3e}",
                      f"{mean:.4f}", f"{unseen['docs']:.4f}", f"{unseen['code']:.4f}",
                      f"{before + time.perf_counter() - start:.0f}"]  # fmt: skip
            rows.append(dict(zip(columns, map(str, values), strict=True)))
            lines = [",".join(columns), *(",".join(r[c] for c in columns) for r in rows)]
            atomic_write(log, "\n".join(lines) + "\n")
            _save_checkpoint(checkpoint, model, optimizer, step + 1)
            bar.set_postfix(loss=f"{mean:.3f}", docs=f"{unseen['docs']:.3f}", code=f"{unseen['code']:.3f}")
            recent = []
    return model


def recipe_arguments(parser) -> None:
    """One command-line option per field of `Recipe`."""
    for f in fields(Recipe):
        parser.add_argument(f"--{f.name}", type=type(f.default), default=f.default, help=f"default {f.default}")
