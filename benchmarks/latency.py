"""Does an adapter slow inference? Base, adapters beside the weights, and LoRA merged into them, in one process.

    python benchmarks/latency.py [--rounds 20] [--models base wide] [--width 768] [--clock wall|cpu] [--out FILE]

"No additional inference latency" is what LoRA has once it is merged (Hu et al. 2021, arXiv:2106.09685, section 4.1).
The rows: the bare model; LoRA and (IA)³ unmerged; Houlsby's bottlenecks, which no weight can stand for; LoRA merged in
place, where the hosts stay so that it can be unmerged, and as `export` writes it, an ordinary model without hosts; and
"base, copied", the bare model with its weights elsewhere in memory, whose ratio says what a difference is worth.
Phases: prefill of a prompt, and decode, a pass over one token a row with a cache; batches of 1 and of 16 rows.
In a tiny model the calls themselves cost as much as what they compute, so there are two: the course's base, and a Llama
with random weights that is `--width` wide (768 and 12 layers: 88M parameters). Float32, one thread.
Variants take turns in random order, ratios to the base are formed within a round. The script stops where merged and
unmerged do not give the same logits.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from step import base_model  # noqa: E402  # the benchmark beside this file

import peftlab as pl  # noqa: E402
from peftlab import export, lab  # noqa: E402
from peftlab.paths import DATA  # noqa: E402

OUT = DATA / "results" / "latency.json"
RANK, ALPHA = 8, 16
PHASES = ("prefill", "decode")
CLOSE = 1e-4  # of the largest logit: rounding in float32, through a dozen layers


def wide_model(width: int, layers: int) -> tuple[nn.Module, str]:
    """A Llama of any size; its weights do not matter for time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(1, width // 64),
        intermediate_size=8 * width // 3, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), f"random weights, {width} wide, {layers} layers"


def sharing(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def adapted(base: nn.Module, method: str, **hyper: float) -> nn.Module:
    """The base with one method, moved off its start; always in the same way."""
    model, draw = pl.attach(sharing(base), method, name=method, **hyper), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    for adapter in pl.adapters(model)[method].values():
        for parameter in adapter.parameters():
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=draw) + (method == "IA3")
    return model.eval()


def variants(base: nn.Module) -> dict[str, nn.Module]:
    base.requires_grad_(False).eval()
    lora = dict(r=RANK, alpha=ALPHA)
    return {
        "base": base,
        "LoRA": adapted(base, "LoRA", **lora),
        "IA3": adapted(base, "IA3"),
        "Houlsby": adapted(base, "Houlsby"),
        "LoRA, merged": pl.merge(adapted(base, "LoRA", **lora)),
        "LoRA, exported": export.merged_copy(adapted(base, "LoRA", **lora), "LoRA"),
        "base, copied": copy.deepcopy(base),
    }


def prefill(model: nn.Module, ids: Tensor) -> Any:
    return model(input_ids=ids, use_cache=True, logits_to_keep=1)


def decode(model: nn.Module, cache: Any, tokens: Tensor) -> Tensor:
    """The last logits after `tokens` (rows, steps), one pass a token; the cache is left as it was."""
    for step in range(tokens.shape[1]):
        out = model(input_ids=tokens[:, step : step + 1], past_key_values=cache, use_cache=True)
    cache.crop(-tokens.shape[1])
    return out.logits[:, -1]


def works(runs: dict[str, nn.Module], ids: Tensor, tokens: Tensor) -> dict[tuple[str, str], Callable[[], Tensor]]:
    """(phase, variant) -> what is timed"""
    found: dict[tuple[str, str], Callable[[], Tensor]] = {}
    for name, model in runs.items():
        found["prefill", name] = lambda model=model: prefill(model, ids).logits[:, -1]
        cache = prefill(model, ids).past_key_values
        found["decode", name] = lambda model=model, cache=cache: decode(model, cache, tokens)
    return found


def compare(todo: dict[tuple[str, str], Callable[[], Tensor]]) -> float:
    """By how much merged and unmerged logits differ, relative to the largest; SystemExit if it is no rounding, or if a
    method changes nothing."""
    logits = {key: work() for key, work in todo.items()}

    def difference(phase: str, one: str, other: str) -> float:
        return float((logits[phase, one] - logits[phase, other]).abs().max() / logits[phase, one].abs().max())

    error = max(difference(phase, "LoRA", f"LoRA, {way}") for phase in PHASES for way in ("merged", "exported"))
    if error > CLOSE:
        raise SystemExit(f"merged and unmerged LoRA differ by {error:.1e} of their logits: nothing to compare")
    for name in ("LoRA", "IA3", "Houlsby"):
        if difference("prefill", name, "base") < CLOSE:
            raise SystemExit(f"{name} changes nothing: nothing to compare")
    return error


def summarise(seconds: dict, facts: dict, passes: dict[str, int]) -> list[dict]:
    """A row for each phase and variant: milliseconds of a pass, and its ratio to the base's in the same round."""
    return [
        {
            **facts, "phase": phase, "variant": name, "ms": [1000 * q / passes[phase] for q in lab.quartiles(times)],
            "ratio": lab.ratios(times, seconds[phase, "base"]),
        }
        for (phase, name), times in sorted(seconds.items(), key=lambda item: PHASES.index(item[0][0]))
    ]  # fmt: skip


def table(rows: list[dict]) -> str:
    head = ("model", "rows", "phase", "variant", "ms of a pass (IQR)", "× base (IQR)")
    body = [
        (row["model"], str(row["rows"]), row["phase"], row["variant"], lab.spread(row["ms"], 2),
         lab.spread(row["ratio"], 3))
        for row in rows
    ]  # fmt: skip
    return lab.markdown(head, body)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = lab.timing_options("Latency of inference with adapters, unmerged and merged.", rounds=20, out=OUT)
    parser.add_argument("--models", nargs="+", choices=("base", "wide"), default=["base", "wide"])
    parser.add_argument("--width", type=int, default=768, help="of the wide model (default 768)")
    parser.add_argument("--layers", type=int, default=12, help="of the wide model (default 12)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="rows (default 1 and 16)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of the prompt (default 64)")
    parser.add_argument("--new", type=int, default=8, help="tokens to decode (default 8)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    here, rows, sizes = lab.machine(), [], {}
    draw = torch.Generator().manual_seed(0)
    for label in args.models:
        base, which = base_model() if label == "base" else wide_model(args.width, args.layers)
        sizes[label] = {"what": which, "parameters": sum(p.numel() for p in base.parameters())}
        runs = variants(base)
        for batch in args.batches:
            ids, tokens = (torch.randint(2, base.config.vocab_size, (batch, n), generator=draw)
                           for n in (args.tokens, args.new))  # fmt: skip
            with torch.no_grad():
                todo = works(runs, ids, tokens)
                facts = {"model": label, "rows": batch, "difference": compare(todo)}  # warms everything up, too
                seconds = lab.take_turns(todo, args.rounds, lab.stopwatch(lab.CLOCKS[args.clock]))
            rows += summarise(seconds, facts, {"prefill": 1, "decode": args.new})
        del base, runs, todo
    for label, size in sizes.items():
        print(f"{label}: {size['what']}, {size['parameters']:,} parameters")
    words = (f"prompts of {args.tokens} tokens, LoRA r={RANK} on all linear layers, {args.rounds} rounds, {args.clock} "
             "clock")  # fmt: skip
    options = {key: value for key, value in vars(args).items() if key not in ("out", "models")}
    settings = {"models": sizes, "rank": RANK, **options}
    lab.report(words, here, table(rows), rows, settings, args.out)
    return rows


if __name__ == "__main__":
    main()
