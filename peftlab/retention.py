"""What a fine-tuned model still knows and can do, and how far it has moved: always measured against the bare base.

    exam = Exam.of("test")                          # facts, list skills, documentation, code: from before fine-tuning
    before, after = exam.take(base, tokenizer), exam.take(model, tokenizer)
    retained(after, before)                         # 1.0: everything the base could, 0.0: nothing of it
    hidden_drift(model, base, tokenizer, texts)     # layer by layer, relative length of what changed in the states
    weight_change(weights(base), weights(model))    # norm, effective rank and intruder dimensions of ΔW, per matrix

A method that does not start as the base (a random soft prompt) is measured against the base too, not against itself
before training: what its user had before is the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .core import Adapted
from .evaluate import Score, exact_match, token_loss
from .layers import is_linear, weight_of
from .runtime import mode
from .sites import bare, sites

DOCS, CODE = 600, 1500  # characters of a text that are read: many short texts say more than few long ones


@dataclass(frozen=True)
class Exam:
    """Questions and texts about what the base learned before it was fine-tuned.

    facts, lists: rows with prompt and completion, answered exactly or not. docs, code: texts never trained on.
    """

    facts: list[dict]
    lists: list[dict]
    docs: list[str]
    code: list[str]

    @classmethod
    def of(cls, split: str = "test", facts: int = 200, lists: int = 30, texts: int = 40) -> Exam:
        """For the embedded base. "valid" and "test" share no question, list or text.

        facts: people and phrasings known from pretraining. lists: exercises of each of the five skills. texts: pieces
        of English documentation, and half as many of code, of the held-out modules of the running Python.
        Raises ValueError for another split or for more facts than there are.
        """
        from .tasks.world import fact_questions, skill_questions

        if split not in ("valid", "test"):
            raise ValueError(f"an exam is of 'valid' or 'test', not of {split!r}")
        known = fact_questions("seen")  # shuffled, the same every time
        half = known[: len(known) // 2] if split == "valid" else known[len(known) // 2 :]
        if facts > len(half):
            raise ValueError(f"there are {len(half)} facts for {split}, not {facts}")
        docs, code = _held_out(split)
        exercises = skill_questions("seen", lists, seed=1 if split == "valid" else 2)
        return cls(half[:facts], exercises, _spread(docs, texts), _spread(code, texts // 2))

    def take(self, model: nn.Module, tokenizer) -> dict[str, Score]:
        """facts, lists: share answered exactly. docs, code: nats per token, each token predicted from those before."""
        return {
            "facts": exact_match(model, tokenizer, self.facts, max_new_tokens=8),
            "lists": exact_match(model, tokenizer, self.lists, max_new_tokens=40),
            "docs": token_loss(model, tokenizer, self.docs),
            "code": token_loss(model, tokenizer, self.code),
        }


def retained(after: Mapping[str, Score | float], before: Mapping[str, Score | float]) -> float:
    """The mean of facts and list skills, each as a share of what the base could."""
    return sum(float(after[name]) / float(before[name]) for name in ("facts", "lists")) / 2


@lru_cache(maxsize=1)
def _library() -> dict[str, list[str]]:
    from .base.text import standard_library

    return standard_library(held_out=True)


def _held_out(split: str) -> tuple[list[str], list[str]]:
    """(docs, code): every second of the held-out texts, and every second piece of the held-out modules."""
    start, texts = int(split == "test"), _library()
    pieces = [module[at : at + CODE] for module in texts["code"] for at in range(0, len(module) - CODE // 2, CODE)]
    return [text[:DOCS] for text in texts["docs"][start::2]], pieces[start::2]


def _spread(texts: Sequence[str], n: int) -> list[str]:
    """At most n of the texts, evenly spread."""
    step = max(1, len(texts) // n) if n else 1
    return list(texts[::step][:n])


# ------------------------------------------------------------------------------------------------- recorded runs


def with_retained(runs):
    """A table of recorded runs (`lab.read("forgetting")`) with a column `retained`, of TEST: see `retained`.

    ValueError if the table has no run of the bare base ("base") on one of its tasks.
    """
    return runs.assign(retained=_retained(runs, _before(runs), "test_{}"))


def curves(runs):
    """Every run as a curve: a long table with task, method, learning_rate, seed, step, and what VALID said then.

    Measured are target, facts, lists, docs, code; retained beside them. Step 0 is the bare base.
    """
    import pandas

    base = _before(runs)
    steps = sorted(int(column.partition("@")[2]) for column in runs if column.startswith("target@"))
    key, measures = ["task", "method", "learning_rate", "seed"], ["target", "facts", "lists", "docs", "code"]
    start = runs[key].assign(step=0)
    for measure in measures:
        start[measure] = runs["task"].map(base[f"{measure}@{steps[-1]}"])
    parts = [start.assign(retained=1.0)]
    for step in steps:
        values = runs[[f"{measure}@{step}" for measure in measures]].set_axis(measures, axis=1)
        now = runs[key].assign(step=step).join(values)
        parts.append(now.assign(retained=_retained(runs, base, f"{{}}@{step}", f"@{steps[-1]}")))
    return pandas.concat(parts).sort_values([*key, "step"], kind="stable", ignore_index=True)


def at_equal_learning(runs, level: float):
    """What is retained where `level` was learned (test_accuracy): a table with task, method, seed, retained.

    The runs of a method and seed, by rising learning rate, are points (learned, retained) on a path that begins at the
    base, (0, 1). Between two of them the line is straight. Taken is the first place on the path with this level, so no
    rate has to be chosen. A seed that never reaches the level has no row.
    """
    import pandas

    rows = []
    for key, mine in with_retained(runs).query("method != 'base'").groupby(["task", "method", "seed"], sort=False):
        mine = mine.sort_values("learning_rate")
        path = [(0.0, 1.0), *zip(mine["test_accuracy"], mine["retained"], strict=True)]
        for (t0, r0), (t1, r1) in pairwise(path):
            if t0 < level <= t1:
                rows.append((*key, r0 + (level - t0) / (t1 - t0) * (r1 - r0)))
                break
    found = pandas.DataFrame(rows, columns=["task", "method", "seed", "retained"])
    return found.astype({"seed": int, "retained": float})  # also where there is no row


def _before(runs):
    """task -> what the bare base could, as a table."""
    bare = runs[runs["method"] == "base"]
    if missing := sorted(set(runs["task"]) - set(bare["task"])):
        raise ValueError(f"there is no run of the bare base on {missing[0]!r} to compare with: add its method 'base'")
    return bare.groupby("task").mean(numeric_only=True)


def _retained(runs, before, column: str, of_base: str = ""):
    names = [(column.format(name), name + of_base if of_base else column.format(name)) for name in ("facts", "lists")]
    return sum(runs[now] / runs["task"].map(before[then]) for now, then in names) / 2


# ------------------------------------------------------------------------------------------------- hidden states


@torch.no_grad()
def hidden_drift(model: nn.Module, base: nn.Module, tokenizer, texts: Sequence[str], tokens: int = 128) -> Tensor:
    """‖h − h₀‖ / ‖h₀‖ per layer (layers + 1,): embeddings first, what enters the head last; mean over all tokens.

    h₀ are the base's hidden states (T, d) of a text, h the model's at the same tokens: positions that a soft prompt
    puts before the text are left out. A text is cut after `tokens` of its tokens.
    """
    sums, count = None, 0
    with mode(model, training=False), mode(base, training=False):
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"][:tokens]], device=next(base.parameters()).device)
            h0, h = (
                torch.stack([state[0, -ids.shape[1] :] for state in one(
                    input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states]).float()
                for one in (base, model)
            )  # fmt: skip  # (layers + 1, T, d)
            away = ((h - h0).norm(dim=-1) / h0.norm(dim=-1)).sum(-1)
            sums, count = away if sums is None else sums + away, count + ids.shape[1]
    if sums is None:
        raise ValueError("no text to look at")
    return (sums / count).cpu()


# ------------------------------------------------------------------------------------------------------- weights


class Change(NamedTuple):
    """What became of one matrix W₀ (out, in): W = W₀ + ΔW."""

    norm: float  # ‖ΔW‖ / ‖W₀‖, Frobenius
    rank: float  # effective rank of ΔW
    intruders: int  # new directions among the largest of W


def weights(model: nn.Module) -> dict[str, Tensor]:
    """bare path -> W (out, in) of each linear layer inside the blocks, as the layer computes now.

    Merge an adapter first (`pl.merge`); ValueError for a linear layer with an active adapter that is not merged. What
    an adapter does to other modules (a prompt, a norm) is in none of these matrices. Copies.
    """
    from .baselines import stacks

    inside, found = {id(module) for blocks in stacks(model).values() for module in blocks.modules()}, {}
    for path, site in sites(model).items():
        if not is_linear(layer := bare(site)) or id(layer) not in inside:
            continue
        if isinstance(site, Adapted):
            if left := [n for n in site.switch.active if n in site.adapters and n not in site.merged]:
                raise ValueError(f"{path!r} has {left[0]!r} active and not merged: its weights are not all that it "
                                 "computes with; pl.merge(model) first")  # fmt: skip
        found[path] = weight_of(layer).detach().float().clone()
    return found


def weight_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor], k: int = 10) -> dict[str, Change]:
    """path -> Change of every matrix that is in both and not equal in both."""
    return {
        path: Change(float((after[path] - W).norm() / W.norm()), effective_rank(after[path] - W),
                     intruders(W, after[path], k))
        for path, W in before.items() if path in after and not torch.equal(W, after[path])
    }  # fmt: skip


def relative_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """‖ΔW‖ / ‖W₀‖ over all matrices together (Frobenius)."""
    moved = sum(float((after[path] - W).square().sum()) for path, W in before.items())
    return math.sqrt(moved / sum(float(W.square().sum()) for W in before.values()))


def effective_rank(W: Tensor) -> float:
    """exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ / Σσ: 1 if one direction carries all, min(out, in) if all carry the same.

    0 for a matrix of zeros. Source: Roy and Vetterli 2007, "The effective rank", EUSIPCO, definition 1.
    """
    sigma = torch.linalg.svdvals(W.detach().double())
    p = sigma[sigma > sigma.max() * 1e-12] / sigma.sum()  # what rounding leaves carries nothing
    return float(torch.exp(-(p * p.log()).sum())) if len(p) and math.isfinite(float(sigma.sum())) else 0.0


def intruders(before: Tensor, after: Tensor, k: int = 10, similar: float = 0.5) -> int:
    """How many of the k largest left singular vectors of W are unlike every one of W₀'s: max |cos| < `similar`.

    Fine-tuning that turns the large directions a little has none; new directions with large singular values are
    intruders. Their number depends on k and on the threshold.
    Source: Shuttleworth et al. 2024, "LoRA vs full fine-tuning: an illusion of equivalence", arXiv:2410.21228, sec. 3.
    """
    U0, U = (torch.linalg.svd(W.double(), full_matrices=False)[0] for W in (before, after))
    closest = (U0.T @ U[:, :k]).abs().amax(0)
    return int((closest < similar).sum())
