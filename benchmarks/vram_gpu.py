"""Memory of training steps, predicted and measured: models of 0.1 to 8 billion parameters, methods, tokens, optimizers.

    python benchmarks/vram_gpu.py [--quick] [--again] [--models gpt2 …] [--methods LoRA …] [--list]
    python benchmarks/vram_gpu.py --device cpu

Models have their published shapes and random weights, made on the device: neither network nor download. A case is one
optimizer step: `pl.vram.predict` says what it takes, then it runs, once to warm up and once measured by
`pl.vram.measure`. On a GPU, each case has a process of its own, so that none finds what another has reserved, and
running out of memory ends only that case; it is recorded, and compared with the verdict. What is predicted to need a
tenth more than there is, is not tried. Needs an NVIDIA GPU; `--device cpu` measures small cases on the CPU with torch's
profiler, `--quick` only a few.

Written after each case to data/measurements/, a file for each kind of GPU; a run goes on where the last one ended.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftlab as pl
from peftlab import lab
from peftlab.paths import DATA, atomic_write
from peftlab.provenance import provenance
from peftlab.vram import Card, Memory, measure, predict, verdict
from peftlab.vram.allocator import CachingAllocator
from peftlab.vram.cards import CUBLAS_HOPPER, HOPPER
from peftlab.vram.ghost import build as on_meta
from peftlab.vram.memory import GIB, MIB
from peftlab.vram.prediction import DTYPES
from peftlab.vram.step import OPTIMIZERS, TrainingStep, batch_of

FOLDER = DATA / "measurements"
MODELS = ("gpt2", "qwen2.5-0.5b", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b")
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "LoRA": {"method": "LoRA", "r": 16},
    "DoRA": {"method": "DoRA", "r": 16},
    "Houlsby": {"method": "Houlsby"},
    "PromptTuning": {"method": "PromptTuning"},
    "BitFit": {"method": "BitFit", "targets": "all-linear"},  # Llamas have no biases: they get some
    "IA3": {"method": "IA3"},
    "QLoRA": {"method": "LoRA", "r": 16, "quantize": "nf4"},
}
HOPELESS = 1.1  # of what there is: what needs more is not tried
LIMIT = 900  # seconds for a case on a GPU


@dataclass(frozen=True)
class Case:
    model: str
    method: str
    checkpointing: bool = False
    batch: int = 1
    tokens: int = 512
    optimizer: str = "adamw"
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        words = [self.model, self.method, *["checkpointing"] * self.checkpointing, f"{self.batch} × {self.tokens}"]
        return ", ".join([*words, self.optimizer, self.dtype])


def grid(device: str, quick: bool) -> list[Case]:
    if device == "cpu":
        return grid_on_cpu()[:: 12 if quick else 1]
    models = MODELS[:1] if quick else MODELS
    cases = [Case(*case) for case in itertools.product(models, METHODS, (False, True))]
    if not quick:
        for model, method, ckpt in itertools.product(models, ("full", "LoRA"), (False, True)):
            cases += [Case(model, method, ckpt, tokens=tokens) for tokens in (1024, 2048, 4096)]
        cases += [Case(m, method, optimizer="adamw_foreach") for m in models for method in ("full", "LoRA")]
    return cases


def grid_on_cpu() -> list[Case]:
    """"base" is the course's own model. Seconds a case, on one core."""
    small = {"batch": 4, "tokens": 128, "dtype": "float32"}
    one = {"batch": 1, "tokens": 128, "dtype": "float32"}
    cases = [Case("base", method, ckpt, **small) for ckpt in (False, True) for method in METHODS]
    cases += [Case("base", method, **{**small, "dtype": "bfloat16"}) for method in ("full", "LoRA")]
    cases += [Case("base", "LoRA", **{**small, "tokens": tokens}) for tokens in (256, 512)]
    cases += [Case("base", "full", optimizer=o, **small) for o in ("adamw_foreach", "adamw_loop", "sgd_momentum")]
    cases += [Case("gpt2", method, ckpt, **one) for method in ("full", "LoRA") for ckpt in (False, True)]
    cases += [Case("bert-base-uncased", "BitFit", **one), Case("bert-base-uncased", "IA3", **one)]
    cases += [Case("t5-small", "full", **one), Case("t5-small", "LoRA", **one)]
    cases += [Case("qwen2.5-0.5b", method, **{**one, "tokens": 64}) for method in ("LoRA", "QLoRA")]
    return cases


# --- a case ---------------------------------------------------------------------------------------------------------


def source(model: str) -> str:
    return str(DATA / "base") if model == "base" else model


def predicted(case: Case, device: str) -> Memory:
    return predict(source(case.model), batch=case.batch, tokens=case.tokens, dtype=case.dtype, optimizer=case.optimizer,
                   checkpointing=case.checkpointing, device=device, **METHODS[case.method])  # fmt: skip


def model_on(device: str, case: Case) -> nn.Module:
    """The case's model with random weights, adapted. In four bits it is made so: it is never there dense."""
    how = dict(METHODS[case.method])
    method, quantize = how.pop("method"), how.pop("quantize", None)
    model = on_meta(source(case.model), DTYPES[case.dtype])
    if model.config.is_encoder_decoder and getattr(model.config, "decoder_start_token_id", None) is None:
        model.config.decoder_start_token_id = 0
    if quantize:
        pl.quantize(model, kind=quantize)
    model.to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(0, 0.02)
            else:
                tensor.zero_()
    if method == "full":
        pl.full_finetuning(model)
    else:
        pl.attach(model, method, **how)
    if case.checkpointing:
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        next(switch for name in names if (switch := getattr(model, name, None)) is not None)()
    return model.train()


def measured(case: Case, device: str) -> Memory:
    model = model_on(device, case)
    optimizer = OPTIMIZERS[case.optimizer]([p for p in model.parameters() if p.requires_grad])
    step = TrainingStep(model, batch_of(model, case.batch, case.tokens, device=device), optimizer)
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # what making the model left
    return measure(step)


def outcome(case: Case, device: str) -> dict[str, Any]:
    """What measuring gave: {"outcome": "measured", "measured": …}, or another outcome and why."""
    try:
        return {"outcome": "measured", "measured": entry(measured(case, device))}
    except torch.OutOfMemoryError as error:
        return {"outcome": "out of memory", "why": str(error).partition(". ")[0]}
    except (ValueError, RuntimeError) as error:
        return {"outcome": "failed", "why": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def entry(memory: Memory) -> dict[str, Any]:
    kept = ("allocated", "reserved", "by_kind", "phases", "peak", "seconds", "host", "notes")
    return {name: value for name, value in memory.to_dict().items() if name in kept}


# --- a process for a case -------------------------------------------------------------------------------------------


def apart(*arguments: str) -> dict[str, Any]:
    """What this script, started anew with these arguments, writes into its --answer."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, __file__, *arguments, "--answer", str(answer)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return {"outcome": "failed", "why": f"took longer than {LIMIT} s"}
        if not answer.exists():
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            return {"outcome": "failed", "why": f"ended with {done.returncode}: {last}"}
        return json.loads(answer.read_text())


def machine(device: str) -> dict[str, Any]:
    """Where this runs; of a GPU also its memory, and what of it is free to torch once a CUDA context is there."""
    here: dict[str, Any] = dict(provenance())
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        here |= {"total": total, "free": free, "capability": torch.cuda.get_device_capability(),
                 "cuda": torch.version.cuda, "driver": driver()}  # fmt: skip
    return here


def driver() -> str:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    return "unknown"


# --- side by side ---------------------------------------------------------------------------------------------------


def compared(case: Case, device: str, here: dict[str, Any]) -> dict[str, Any]:
    """A row of the file: the case, what was predicted and measured, errors in per cent of what was measured."""
    row: dict[str, Any] = {"name": case.name, **asdict(case)}
    try:
        expected = predicted(case, device)
    except ValueError as error:
        return {**row, "outcome": "skipped", "why": str(error)}
    row["predicted"] = entry(expected)
    if device == "cpu":
        row |= outcome(case, device)
    else:
        card = Card(here["hardware"], here["free"], tuple(here["capability"]))
        judged = verdict(expected, card, context=0, advise=False)
        row["verdict"] = judged.word
        row["predicted"] = {**entry(judged.memory), "reserved": judged.reserved}
        if judged.reserved > HOPELESS * here["free"]:
            need, there = judged.reserved / GIB, here["free"] / GIB
            return {**row, "outcome": "skipped", "why": f"needs {need:.1f} GiB, and {there:.1f} GiB are free"}
        row["predicted"]["counted"] = counted(judged.memory, card)
        row |= apart("--device", device, "--case", json.dumps(asdict(case)))
    if row["outcome"] == "measured":
        found, said = row["measured"], row["predicted"]
        row["error_allocated"] = per_cent(said.get("counted", said["allocated"]), found["allocated"])
        if found["reserved"]:
            row["error_reserved"] = per_cent(said["reserved"], found["reserved"])
    return row


def per_cent(said: int, found: int) -> float:
    return round(100 * (said / found - 1), 4)


def counted(memory: Memory, card: Card) -> int:
    """The predicted peak with cuBLAS's workspaces as large as they are on a card."""
    hopper = card.capability is not None and card.capability >= HOPPER
    blocks = [replace(b, size=CUBLAS_HOPPER) if hopper and b.op == "cuBLAS" else b for b in memory.tape.blocks]
    return CachingAllocator().replay(replace(memory.tape, blocks=blocks)).peak_allocated


def line(row: dict[str, Any]) -> tuple[str, ...]:
    def mib(side: str, name: str) -> str:
        return f"{row[side][name] / MIB:,.1f}" if row.get(side, {}).get(name) else "–"

    def error(name: str) -> str:
        return f"{row[name]:+.3f}" if name in row else "–"

    said = "counted" if "counted" in row.get("predicted", {}) else "allocated"
    return (row["name"], mib("predicted", said), mib("measured", "allocated"), error("error_allocated"),
            mib("predicted", "reserved"), mib("measured", "reserved"), error("error_reserved"),
            row["outcome"] if "why" not in row else f"{row['outcome']}: {row['why']}")  # fmt: skip


HEAD = ("case", "allocated: predicted MiB", "measured MiB", "error %", "reserved: predicted MiB", "measured MiB",
        "error %", "outcome")  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> str:
    """Median and worst error, and whether the verdicts were right."""
    lines = []
    for name in ("allocated", "reserved"):
        errors = {row["name"]: row[f"error_{name}"] for row in rows if f"error_{name}" in row}
        if errors:
            median = statistics.median(map(abs, errors.values()))
            worst, error = max(errors.items(), key=lambda pair: abs(pair[1]))
            lines.append(f"{name}: {len(errors)} cases, median error {median:.3f} %, worst {error:+.3f} % ({worst})")
    judged = [row for row in rows if "verdict" in row and row["outcome"] in ("measured", "out of memory")]
    wrong = [row["name"] for row in judged if (row["verdict"] == "does not fit") != (row["outcome"] == "out of memory")]
    if judged:
        lines.append(f"verdict: right for {len(judged) - len(wrong)} of {len(judged)} cases that were tried"
                     + (f", wrong for {'; '.join(wrong)}" if wrong else ""))  # fmt: skip
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Memory of training steps, predicted and measured.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: small cases (default cuda)")
    parser.add_argument("--quick", action="store_true", help="a few cases only")
    parser.add_argument("--again", action="store_true", help="measure also what the file already has")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--json", metavar="FILE", help="default: data/measurements/, named after the device")
    parser.add_argument("--list", action="store_true", help="print the cases and measure nothing")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    torch.manual_seed(0)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU that torch can use is here, so nothing was measured; --device cpu measures small "
                         "cases on the CPU")  # fmt: skip
    if args.answer:
        found = outcome(Case(**json.loads(args.case)), args.device) if args.case else machine(args.device)
        atomic_write(args.answer, json.dumps(found))
        return found

    cases = [case for case in grid(args.device, args.quick)
             if METHODS[case.method]["method"] in {"full", *pl.METHODS}
             and (not args.models or case.model in args.models)
             and (not args.methods or case.method in args.methods)]  # fmt: skip
    if not cases:
        parser.error("no case is left: see --list without --models and --methods")
    if args.list:
        print("\n".join(case.name for case in cases))
        return {}
    # a process that only predicts must not hold memory of the GPU: what is asked of it, another one asks
    here = machine("cpu") if args.device == "cpu" else apart("--device", args.device)
    if "why" in here:
        raise SystemExit(f"the GPU cannot be asked: {here['why']}")
    slug = "cpu" if args.device == "cpu" else re.sub(r"[^a-z0-9]+", "-", here["hardware"].lower()).strip("-")
    file = Path(args.json or FOLDER / f"{slug}.json")
    result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"runs": [], "rows": []}
    done = {row["name"] for row in result["rows"] if row["outcome"] in ("measured", "out of memory")}
    todo = [case for case in cases if args.again or case.name not in done]
    print(f"{len(cases)} cases, {len(cases) - len(todo)} of them in {file.name} already; "
          + ", ".join(f"{key} {value}" for key, value in here.items()) + "\n", flush=True)  # fmt: skip
    if todo:
        result["runs"].append(here)
    for i, case in enumerate(todo, 1):
        row = {**compared(case, args.device, here), "run": len(result["runs"]) - 1}
        result["rows"] = [other for other in result["rows"] if other["name"] != case.name] + [row]
        atomic_write(file, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"{i}/{len(todo)}  " + "  ".join(line(row)), flush=True)
    used = sorted({row["run"] for row in result["rows"]})  # a run of which no row is left says nothing
    result["runs"] = [result["runs"][n] for n in used]
    result["rows"] = [{**row, "run": used.index(row["run"])} for row in result["rows"]]
    atomic_write(file, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print("\n" + lab.markdown(HEAD, [line(row) for row in result["rows"]]) + "\n\n" + summary(result["rows"]))
    print(f"\nwritten to {file}")
    return result


if __name__ == "__main__":
    main()
