"""From a data set's rows to batches: tokenised once, kept in memory, padded on the right."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

IGNORED = -100  # the label that torch's cross entropy, and so every transformers model, leaves out of the loss


class Row(NamedTuple):
    inputs: dict[str, Tensor]  # what the model is called with, without padding
    tokens: int  # input tokens
    trained: int  # labels that enter the loss


def kind_of(model: nn.Module) -> str:
    """How a model reads labels: "causal" (shifted by one), "seq2seq" (texts of their own) or "other" (as they are)."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "seq2seq"
    return "causal" if getattr(model, "can_generate", lambda: False)() else "other"


def encode(model: nn.Module, dataset: Any, tokenizer: Any = None, max_length: int | None = None) -> list[Row]:
    """Every row of a data set as tensors.

    A row is one of
      {"prompt", "completion"}   loss on the completion only; T5 and its like read the one and write the other
      {"text"}                   loss on every token; with "label", a number, for a classifier
      {"input_ids", "labels"}    ready-made, -100 where there is no loss; "labels" may be one number for a classifier
    Other columns are ignored. `max_length` is the longest row allowed, by default the model's context.

    Raises ValueError, with the row's number, for an empty data set, columns that fit no kind, a row that is too long,
    a row without a label to learn from and a token that the model does not have.
    """
    if isinstance(dataset, Mapping):
        raise ValueError(f"this is a dictionary of data sets, {list(dataset)}; pass one of them, e.g. dataset['train']")
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"{type(dataset).__name__} has no length; pass a list, e.g. list(itertools.islice(data, 10_000))"
        )
    raw = [dataset[i] for i in range(len(dataset))]
    if not raw:
        raise ValueError("the data set is empty: there is nothing to train on")
    if not isinstance(raw[0], Mapping):
        raise ValueError(f"row 0 is a {type(raw[0]).__name__}; a row is a dictionary, e.g. {{'text': ...}}")
    kind, config = kind_of(model), getattr(model, "config", None)
    columns = _columns(raw, kind, tokenizer)
    limit = max_length or getattr(config, "max_position_embeddings", None)
    vocabulary = getattr(config, "vocab_size", None)
    return [_row(i, row, kind, limit, vocabulary) for i, row in enumerate(columns)]


def _columns(raw: list[dict], kind: str, tokenizer: Any) -> list[dict]:
    """The rows as {"input_ids", "labels", ...}, still plain lists."""
    present = {name for row in raw for name, value in row.items() if value is not None}

    def column(name: str) -> list:
        for i, row in enumerate(raw):
            if row.get(name) is None:
                raise ValueError(f"row {i} has no {name!r}, but others have: every row needs the same columns")
        return [row[name] for row in raw]

    if "input_ids" in present:
        masks = [name for name in ("attention_mask", "token_type_ids") if name in present]
        names = ["input_ids", *masks, *(["labels"] if "labels" in present or kind != "causal" else [])]
        rows = [dict(zip(names, values, strict=True)) for values in zip(*map(column, names), strict=True)]
        return [{"labels": row["input_ids"], **row} for row in rows]

    classify = kind == "other" and "label" in present
    text = "text" if "text" in present else "prompt"
    wanted = {text, "label"} if classify else {"prompt", "completion"} if "completion" in present else {"text"}
    if not wanted <= present or (kind != "causal" and wanted == {"text"}):
        kinds = {"causal": '{"prompt", "completion"}, {"text"}', "seq2seq": '{"prompt", "completion"}',
                 "other": '{"text", "label"}'}  # fmt: skip
        raise ValueError(
            f'the rows have the columns {sorted(present)}; needed: {kinds[kind]} or {{"input_ids", "labels"}}'
        )
    if tokenizer is None:
        raise ValueError(f"the rows hold text ({', '.join(sorted(wanted))}): pass the tokenizer as well")

    if classify:
        encodings = _encodings(tokenizer, column(text))
        return [{**row, "labels": label} for row, label in zip(encodings, column("label"), strict=True)]
    if wanted == {"text"}:
        return [{**row, "labels": row["input_ids"]} for row in _encodings(tokenizer, column("text"))]
    # Prompt and completion are tokenised apart, as at generation time, so that the boundary is where the prompt ends.
    prompts = tokenizer(column("prompt"))["input_ids"]
    if kind == "seq2seq":
        answers = tokenizer(text_target=column("completion"))["input_ids"]
        return [{"input_ids": p, "labels": a} for p, a in zip(prompts, answers, strict=True)]
    answers = tokenizer(column("completion"), add_special_tokens=False)["input_ids"]
    return [{"input_ids": p + a, "labels": [IGNORED] * len(p) + a} for p, a in zip(prompts, answers, strict=True)]


def _encodings(tokenizer: Any, texts: list[str]) -> list[dict]:
    encoded = tokenizer(texts)
    keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
    return [{key: encoded[key][i] for key in keys} for i in range(len(texts))]


def _row(i: int, row: dict, kind: str, limit: int | None, vocabulary: int | None) -> Row:
    inputs = {key: torch.as_tensor(value) for key, value in row.items()}
    ids, labels = inputs["input_ids"], inputs["labels"]
    if kind == "causal" and labels.shape != ids.shape:
        raise ValueError(
            f"row {i} has {len(ids)} tokens, but labels of shape {tuple(labels.shape)}: one label per token"
        )
    if limit is not None and len(ids) > limit:
        raise ValueError(
            f"row {i} has {len(ids)} tokens, more than max_length={limit}: shorten the row or leave it out"
        )
    if vocabulary is not None and len(ids) and int(ids.max()) >= vocabulary:
        raise ValueError(
            f"row {i} has token {int(ids.max())}, but the model knows {vocabulary}: is this another model's tokenizer?"
        )
    trained = int(((labels[1:] if kind == "causal" else labels) != IGNORED).sum())  # the first token is never predicted
    if not trained:
        raise ValueError(f"row {i} has no label to learn from (all are {IGNORED}, or it is empty): leave it out")
    inputs.setdefault("attention_mask", torch.ones_like(ids))
    return Row(inputs, int(inputs["attention_mask"].sum()), trained)


def collate(rows: list[Row], pad: int, device: torch.device) -> dict[str, Tensor]:
    """One batch, padded on the right to its longest row: every entry (B, T), labels of a classifier (B,)."""
    fill = {"input_ids": pad, "labels": IGNORED}
    batch = {}
    for key, first in rows[0].inputs.items():
        values = [row.inputs[key] for row in rows]
        if first.dim() == 0:
            batch[key] = torch.stack(values).to(device)
        else:
            batch[key] = nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill.get(key, 0)).to(device)
    return batch


@lru_cache(maxsize=4)
def _epoch(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(rows)


def order(rows: int, start: int, stop: int, seed: int) -> list[int]:
    """Row numbers at the positions start..stop-1 of an endless stream of epochs, each shuffled anew.

    A pure function of the position: to go on after a crash, nothing but the step has to be known.
    """
    return [int(_epoch(rows, seed, position // rows)[position % rows]) for position in range(start, stop)]


def digest(rows: list[Row]) -> str:
    """A short fingerprint of the tokens and labels."""
    total = hashlib.sha256()
    for row in rows:
        for key in ("input_ids", "labels"):
            total.update(f"{key}{tuple(row.inputs[key].shape)}".encode() + row.inputs[key].numpy().tobytes())
    return total.hexdigest()[:16]
