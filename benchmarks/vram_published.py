"""Predicted memory beside the memory that peft's own benchmark published for 33 of its runs, without a GPU.

    python benchmarks/vram_published.py [--json data/results/vram_published.json]

The benchmark (method_comparison/MetaMathQA in github.com/huggingface/peft) fine-tunes Llama 3.2 3B in bfloat16, four
rows a batch, and publishes the most memory that torch reserved after a step (`accelerator_memory_max`), how each run is
configured, and not how long its longest batch was. That one number, the same in all runs, is fitted on one of them,
lora/llama-3.2-3B-rank32; the others are predicted with it, with peft's own modules and then with ours in their place.

A step is as in the benchmark's run.py: gradients are cleared before the forward pass, the outputs (logits, keys and
values) live until the next ones come, gradients are clipped, and AdamW is torch's default (foreach). What is
reserved also depends on what happened before. Two histories are predicted, each with a length of its own: "plain", two
such steps in a row, which is what `predict` does by itself; and "emptied", with torch.cuda.empty_cache() between them.
The real run is neither: it empties the cache every ten steps, and its batches of unequal length come sorted in groups
of twenty, longest first.

LoRA-FA freezes A, and is predicted here with A trained: its published mean of allocated memory is below that of LoRA by
A's two states of the optimizer (0.041 GiB), not by its gradient too (0.062 GiB), so A had a gradient in that run.
"""

from __future__ import annotations

import argparse
import csv
import functools
import inspect
import json
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftlab import lab
from peftlab.paths import atomic_write
from peftlab.provenance import provenance
from peftlab.vram import Memory, predict

PUBLISHED = Path(__file__).resolve().parent.parent / "tests" / "published"
RESULT = Path(__file__).resolve().parent.parent / "data" / "results" / "vram_published.json"
FITTED, GIB = "lora/llama-3.2-3B-rank32", 2**30
LENGTHS = range(512, 769)  # max_seq_length of the benchmark is 768

# What cannot be built without weights: the reason, which `table` repeats.
UNBUILT = {
    "adamss": "clusters the singular vectors of the weights, with scikit-learn",
    "frod": "decomposes the weights when it is made",
}

# Our method on the same layers with the same sizes, for each run whose method is here. Of LLaMA-Adapter's parameters
# peft makes none float32.
QV, ALL = "q_proj|v_proj", "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
OURS: dict[str, tuple[str, str | None, dict]] = {
    "adaptionprompt/llama-3.2-3B-lr_0.0005": ("LlamaAdapter", None, dict(k=100, layers=28, adapter_dtype="bfloat16")),
    "full-finetuning/llama-3.2-3B-lr_0.00001": ("full", None, {}),
    "ia3/llama-3.2-3B-all-attn-5k-lr0.005": ("IA3", ALL, dict(feedforward="down_proj|gate_proj|up_proj")),
    "ia3/llama-3.2-3B-default": ("IA3", "k_proj|v_proj|down_proj", dict(feedforward="down_proj")),
    "lora/llama-3.2-3B-rank32": ("LoRA", QV, dict(r=32, alpha=64)),
    "lora/llama-3.2-3B-rank64": ("LoRA", QV, dict(r=64)),
    "lora/llama-3.2-3B-rank64-rslora": ("LoRA", QV, dict(r=64, alpha=64, rslora=True)),
    "prefixtuning/llama-3.2-3B-tokens50-init_prefix-lr_0.005": ("PrefixTuning", None, dict(k=50, init="zero")),
    "prompt_tuning/llama-3.2-3B-lr_0.001": ("PromptTuning", None, dict(k=200, init="random")),
    "ptuning/llama-3.2-3B-default": ("PTuning", None, dict(k=20, hidden=3072)),
}


def published() -> dict[str, float]:
    """Run -> GiB that it reserved at most."""
    with (PUBLISHED / "peft_memory.csv").open(encoding="utf-8") as file:
        return {row["experiment"]: float(row["max_reserved_GiB"]) for row in csv.DictReader(file)}


@functools.cache
def configs() -> dict[str, dict[str, Any]]:
    return json.loads((PUBLISHED / "peft_memory.json").read_text(encoding="utf-8"))


class Step:
    """One step of the benchmark's loop, as `predict` takes it; emptied: the cache is, before the second one."""

    def __init__(self, emptied: bool) -> None:
        self.emptied, self.outputs = emptied, None

    def __call__(self, model: nn.Module, batch: dict, optimizer: torch.optim.Optimizer, mark: Callable) -> None:
        if self.emptied and self.outputs is not None:
            torch.cuda.empty_cache()
        optimizer.zero_grad()
        mark("forward")
        self.outputs = model(**batch)
        loss = self.outputs.loss
        mark("backward")
        loss.backward()
        mark("step")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def theirs(run: str) -> Callable[[nn.Module], nn.Module] | str:
    """A function that puts peft's adapter of a run into a model."""
    entries = configs()[run].get("adapter_config")
    if entries is None:
        return "full"
    import peft

    kind = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[entries["peft_type"]]
    known = inspect.signature(kind.__init__).parameters
    config = kind(**{name: value for name, value in entries.items() if name in known and name != "peft_type"})

    return lambda model: peft.get_peft_model(model, config)


def predicted(run: str, tokens: int, emptied: bool = False, ours: bool = False) -> Memory:
    """What a run needs with a longest batch of so many tokens. ValueError or ImportError if it cannot be built."""
    method, targets, hyper = OURS[run] if ours else (theirs(run), None, {})
    return predict("llama-3.2-3b", method, targets, batch=4, tokens=tokens, optimizer="adamw_foreach",
                   step=Step(emptied), **hyper)  # fmt: skip


def fitted(emptied: bool = False) -> int:
    """The length of the longest batch with which the prediction of FITTED is nearest to what was published.

    What is reserved does not grow evenly: found by bisection, then among the lengths around."""
    wanted, low, high = published()[FITTED] * GIB, LENGTHS.start, LENGTHS.stop
    error = functools.cache(lambda tokens: predicted(FITTED, tokens, emptied).reserved - wanted)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if error(middle) > 0 else (middle, high)
    return min(range(low - 7, low + 9), key=lambda tokens: abs(error(tokens)))


def rows(tokens: int, emptied: bool = False, ours: bool = False) -> list[dict[str, Any]]:
    """A row for each published run: GiB published and predicted, the error in per cent, or why there is none."""
    found = []
    for run, gib in published().items():
        row: dict[str, Any] = {"run": run, "published": gib, "predicted": None, "allocated": None, "error": None}
        row["note"] = ""
        if ours and run not in OURS:
            continue
        if reason := UNBUILT.get(run.partition("/")[0]):
            found.append(row | {"note": reason})
            continue
        memory = predicted(run, tokens, emptied, ours)
        found.append(row | {"predicted": round(memory.reserved / GIB, 3), "allocated": round(memory.allocated / GIB, 3),
                            "error": round(100 * (memory.reserved / GIB / gib - 1), 2)})  # fmt: skip
    return found


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the runs that nothing was fitted on: how many can be predicted, the median and the worst error in per cent,
    and how many are within 1 and 2 per cent."""
    errors = [abs(row["error"]) for row in found if row["error"] is not None and row["run"] != FITTED]
    return {"runs": sum(row["run"] != FITTED for row in found), "predicted": len(errors),
            "median": round(statistics.median(errors), 3), "worst": max(errors),
            **{f"within {n} %": sum(error <= n for error in errors) for n in (1, 2)}}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    result: dict[str, Any] = {"provenance": provenance(), "fitted": FITTED}
    for name, emptied in (("plain", False), ("emptied", True)):
        tokens = fitted(emptied)
        result[name] = {"tokens": tokens, "rows": (found := rows(tokens, emptied)), "summary": summary(found)}
        print(f"{name}: longest batch, fitted on {FITTED}: {tokens} tokens; {json.dumps(result[name]['summary'])}")
    result["ours"] = rows(result["plain"]["tokens"], ours=True)
    ours = {row["run"]: row["predicted"] for row in result["ours"]}
    body = []
    for plain, emptied in zip(result["plain"]["rows"], result["emptied"]["rows"], strict=True):
        body.append((plain["run"], f"{plain['published']:.3f}", *map(_cell, (plain, emptied)),
                     f"{ours[plain['run']]:.3f}" if plain["run"] in ours else "", plain["note"]))  # fmt: skip
    print(lab.markdown(("run", "published GiB", "plain", "emptied", "ours, plain", ""), body))
    if args.json:
        atomic_write(args.json, json.dumps(result, indent=1) + "\n")


def _cell(row: dict[str, Any]) -> str:
    return "–" if row["predicted"] is None else f"{row['predicted']:.3f} ({row['error']:+.2f} %)"


if __name__ == "__main__":
    main()
