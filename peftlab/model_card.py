"""The README.md beside an export: what it is, how it was made, how to load it. Hub-readable YAML, then Markdown."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .attach import adapters
from .base import EMBEDDED
from .core import Adapter
from .files import base_name, task_type
from .provenance import provenance

MARK = "<!-- written by peftlab.export; an export of the same name replaces it -->"
PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification",
             "QUESTION_ANS": "question-answering"}  # fmt: skip


@dataclass(frozen=True)
class About:
    """What only you know about an export. Everything else in its card is read off the model.

    title: of the card. license: as the Hub spells it ("apache-2.0"). datasets: Hub ids, or names of your own.
    results: {measure: value}, such as {"exact match, 100 questions": 0.93}. text: a paragraph in your words.
    """

    title: str | None = None
    license: str | None = None
    datasets: Sequence[str] = ()
    results: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""


LOADING = {
    "peft": ("With HF PEFT", """from peft import PeftModel
from transformers import {auto}
model = PeftModel.from_pretrained({auto}.from_pretrained({base}), "{place}")"""),
    "peftlab": ("With peftlab", """import peftlab as pl
model, tokenizer = pl.load_base({own})
pl.load_adapter(model, "{place}", name="{name}")"""),
    "transformers": ("With transformers", """from transformers import AutoTokenizer, {auto}
model = {auto}.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")"""),
    "gguf": ("With llama.cpp", "llama-cli -m {place} -p \"…\""),
    "gguf-lora": ("With llama.cpp", "llama-cli -m model.gguf --lora {place} -p \"…\""),
    "ollama": ("With Ollama", "ollama create my-model -f Modelfile\nollama run my-model"),
}  # fmt: skip
AUTO = {"SEQ_CLS": "AutoModelForSequenceClassification", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
        "TOKEN_CLS": "AutoModelForTokenClassification", "QUESTION_ANS": "AutoModelForQuestionAnswering"}  # fmt: skip


def card(model: nn.Module, names: Sequence[str], kind: str, place: str, about: About, note: str = "") -> str:
    """The whole text of a card.

    names: the adapters that the export holds, or was merged from. kind: a key of `LOADING`. place: the name of the
    exported file or folder, without the way to it. note: a sentence on what was done to the weights.
    """
    base, task = base_name(model), task_type(model) or ""
    found = {name: adapters(model)[name] for name in names}
    what = {"peft": "adapter", "peftlab": "adapter", "gguf-lora": "GGUF adapter"}.get(kind, "model")
    embedded = Path(getattr(model.config, "name_or_path", "") or ".") == EMBEDDED
    called = base or ("the embedded base model of peftlab" if embedded else type(model).__name__)
    title = about.title or f"{' + '.join(names) or 'base'}: {what} of {called}"
    parts = [_header(kind, base, PIPELINES.get(task), found, about) + f"# {title}"]
    parts += [about.text] if about.text else []
    parts += [note] if note else []
    parts += [_method(model, name, one) for name, one in found.items()]
    if about.results:
        rows = [f"| {measure} | {value:.4g} |" if isinstance(value, float) else f"| {measure} | {value} |"
                for measure, value in about.results.items()]  # fmt: skip
        parts.append("\n".join(["## Results", "", "| measure | value |", "|---|---|", *rows]))
    where = json.dumps(base or "path/to/the/base")
    words = {"auto": AUTO.get(task, "AutoModelForCausalLM"), "place": place, "name": names[0] if names else "default",
             "base": where, "own": "" if embedded else where}  # fmt: skip
    parts.append("## Loading")
    for key in [kind, "peftlab"] if kind == "peft" else [kind]:
        heading, code = LOADING[key]
        language = "bash" if key.startswith(("gguf", "ollama")) else "python"
        parts.append(f"{heading}:\n\n```{language}\n{code.format(**words)}\n```")
    parts.append("## Where it comes from\n\n" + "\n".join(f"- {k}: {v}" for k, v in provenance().items()))
    return "\n\n".join([*parts, MARK]) + "\n"


def _header(kind: str, base: str | None, pipeline: str | None, found: Mapping[str, Mapping[str, Adapter]],
            about: About) -> str:  # fmt: skip
    from huggingface_hub import ModelCardData

    methods = sorted({type(a).__name__ for one in found.values() for a in one.values()})
    library = {"peft": "peft", "peftlab": "peftlab", "transformers": "transformers"}.get(kind)
    tags = ["peftlab", *(m.lower() for m in methods), *(["gguf", "llama.cpp"] if library is None else [])]
    data = ModelCardData(base_model=base, library_name=library, license=about.license, tags=tags, pipeline_tag=pipeline,
                         datasets=list(about.datasets) or None)  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n"


def _method(model: nn.Module, name: str, one: Mapping[str, Adapter]) -> str:
    """Method, equation, hyper-parameters, places and count of one adapter."""
    kinds = Counter(type(a) for a in one.values())
    copies = [path for path, a in one.items() if type(a).__name__ == "ModuleCopy"]
    main = next((kind for kind, _ in kinds.most_common() if kind.__name__ != "ModuleCopy"), type(one[next(iter(one))]))
    told = [" ".join(part.split()) for part in (inspect.getdoc(main) or "").split("\n\n")[:2]]
    adapted = {path: a for path, a in one.items() if type(a) is main}
    values = {key: Counter(repr(a.hyper[key]) for a in adapted.values()) for key in next(iter(adapted.values())).hyper}
    settings = [f"| {key} | {', '.join(f'{v} ({n} layers)' if len(c) > 1 else v for v, n in c.most_common())} |"
                for key, c in values.items()]  # fmt: skip
    places = Counter(path.rpartition(".")[2] for path in adapted)
    trained = sum(p.numel() for p in {id(p): p for a in one.values() for p in a.parameters()}.values())
    others = {id(p) for host in adapters(model).values() for a in host.values() for p in a.parameters()}
    frozen = sum(_size(model, others))
    lines = [f"## Adapter {name!r}: {main.__name__}", *told]
    lines += ["\n".join(["| hyper-parameter | value |", "|---|---|", *settings])] if settings else []
    where = ", ".join(f"{ending} ({n})" for ending, n in places.items())
    lines.append(f"On {where}. Trained: {trained:,} parameters beside {frozen:,} frozen ones "
                 f"({trained / (trained + frozen):.3%}).")  # fmt: skip
    lines += [f"Full copies, trained with it: {', '.join(copies)}."] if copies and main.__name__ != "ModuleCopy" else []
    return "\n\n".join(lines)


def _size(model: nn.Module, others: set[int]) -> list[int]:
    """The numbers of weights of the base's tensors; packed ones count as what they stand for."""
    from .layers import is_quantised, shape_of

    sizes = {id(p): p.numel() for p in model.parameters() if id(p) not in others}
    for module in model.modules():
        if is_quantised(module):
            out, into = shape_of(module)
            sizes[id(getattr(module, "weight", module))] = out * into
    return list(sizes.values())
