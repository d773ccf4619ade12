"""One training step of the base model, side by side in one process: full fine-tuning, ours, peft, and the floor.

    python benchmarks/step.py [--rounds 40] [--clock wall|cpu] [--json FILE]

A step is forward, backward and fused AdamW on 16 × 64 tokens, float32, one thread. The floor is a frozen base that only
passes the gradient down to its embeddings' output: no adapter on all layers can be cheaper. Variants take turns, so
that whatever else the machine does hits all of them; ratios are formed within a round. On a busy machine the cpu clock
does not count the time that other processes had. Peak memory is measured apart from time.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from peftlab import lab

TARGETS = {"all linears": "all-linear", "q,v": ["q_proj", "v_proj"]}
RANK, ALPHA = 8, 16
MIB = 2**20


def base_model() -> tuple[nn.Module, str]:
    """The course's base model, or one of the same shape with random weights: they do not matter for time and memory."""
    import peftlab as pl

    try:
        return pl.load_base(device="cpu")[0].float(), "the embedded base model"
    except (ImportError, OSError):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=4096, hidden_size=192, num_hidden_layers=6, num_attention_heads=6, intermediate_size=512,
            max_position_embeddings=512, tie_word_embeddings=True,
        )  # fmt: skip
        return LlamaForCausalLM(config), "random weights in the base model's shape"


class Variant:
    """A model with its optimizer; `step()` is what is measured."""

    def __init__(self, model: nn.Module, ids: torch.Tensor, floor: bool = False):
        self.model, self.ids = model.train(), ids
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.embed = model.get_input_embeddings() if floor else None
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, fused=True) if self.parameters else None

    def step(self) -> None:
        if self.embed is None:
            inputs = {"input_ids": self.ids}
        else:
            inputs = {"inputs_embeds": self.embed(self.ids).detach().requires_grad_()}
        self.model(**inputs, labels=self.ids, use_cache=False).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def trained(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def resident(self) -> int:
        """Bytes that stay between steps: weights, buffers and optimizer state."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for entries in self.optimizer.state.values() if self.optimizer else ():
            tensors += [value for value in entries.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def variants(base: nn.Module, ids: torch.Tensor) -> dict[str, Variant]:
    import peft

    import peftlab as pl

    out = {"full": Variant(copy.deepcopy(base).requires_grad_(True), ids)}
    for label, targets in TARGETS.items():
        ours = copy.deepcopy(base)
        pl.attach(ours, pl.LoRA, targets=targets, name="bench", r=RANK, alpha=ALPHA)
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")
        out[f"peft, {label}"] = Variant(peft.get_peft_model(copy.deepcopy(base), config), ids)
        out[f"ours, {label}"] = Variant(ours, ids)
        counts = [out[f"{who}, {label}"].trained() for who in ("ours", "peft")]
        if counts[0] != counts[1]:
            raise SystemExit(f"{label}: ours trains {counts[0]} parameters and peft {counts[1]}: nothing to compare")
    out["floor"] = Variant(copy.deepcopy(base).requires_grad_(False), ids, floor=True)
    return out


def time_steps(
    runs: dict[str, Variant], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds per step; in each round every variant once, in a random order."""
    for variant in runs.values():
        for _ in range(3):  # optimizer state, kernels' first calls
            variant.step()
    return lab.take_turns({name: variant.step for name, variant in runs.items()}, rounds, lab.stopwatch(clock))


def peak_bytes(work: Callable[[], None]) -> int:
    """The most that torch's CPU allocator held above the start while `work` ran, from every allocation and release.

    Read from the profiler's trace. Scratch memory of the matrix library does not go through the allocator.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    now = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


def summarise(runs: dict[str, Variant], seconds: dict[str, list[float]], peaks: dict[str, int]) -> list[dict]:
    def ratio(name: str, other: str | None) -> list[float] | None:
        if other is None or name == other:
            return None
        return lab.ratios(seconds[name], seconds[other])

    return [
        {
            "variant": name, "trained": variant.trained(), "ms": [1000 * q for q in lab.quartiles(seconds[name])],
            "ratio_to_full": ratio(name, "full"),
            "ratio_to_peft": ratio(name, name.replace("ours", "peft") if name.startswith("ours") else None),
            "peak_mib": (variant.resident() + peaks[name]) / MIB, "step_mib": peaks[name] / MIB,
        }
        for name, variant in runs.items()
    ]  # fmt: skip


def table(rows: list[dict]) -> str:
    head = ("variant", "trained", "ms (IQR)", "× full (IQR)", "× peft (IQR)", "peak MiB", "of it the step")
    body = [
        (row["variant"], f"{row['trained']:,}", lab.spread(row["ms"], 1), lab.spread(row["ratio_to_full"], 3),
         lab.spread(row["ratio_to_peft"], 3), f"{row['peak_mib']:.1f}", f"{row['step_mib']:.1f}")
        for row in rows
    ]  # fmt: skip
    return lab.markdown(head, body)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = lab.timing_options("Time and memory of one training step, ours beside peft.", rounds=40)
    parser.add_argument("--batch", type=int, default=16, help="rows (default 16)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per row (default 64)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    base, which = base_model()
    ids = torch.randint(
        2, base.config.vocab_size, (args.batch, args.tokens), generator=torch.Generator().manual_seed(0)
    )
    runs = variants(base, ids)
    here = lab.machine()
    seconds = time_steps(runs, args.rounds, lab.CLOCKS[args.clock])
    peaks = {name: peak_bytes(variant.step) for name, variant in runs.items()}
    rows = summarise(runs, seconds, peaks)
    words = f"{which}; {args.batch} × {args.tokens} tokens, LoRA r={RANK}, {args.rounds} rounds, {args.clock} clock"
    settings = {"base": which, "rounds": args.rounds, "clock": args.clock, "batch": args.batch, "tokens": args.tokens,
                "rank": RANK}  # fmt: skip
    lab.report(words, here, table(rows), rows, settings, args.out)
    return rows


if __name__ == "__main__":
    main()
