"""Many adapters in one batch: ours beside peft's `adapter_names`, one batch for each adapter, and one adapter for all.

    python benchmarks/serve.py [--rounds 10] [--rows 64] [--adapters 1 4 16 64] [--clock wall|cpu] [--out FILE]

LoRA r = 8 on all linear layers of the base model, float32, one thread. Phases: prefill (all rows' prompts at once, with
a cache), decode (some tokens more, each a pass over one token a row) and generate (both, with transformers' loop).

plain         one adapter for all rows, `using(model, name)`
ours          `using(model, rows=…)`: each pass makes sure that no adapter has changed since its factors were gathered
ours, steady  the same without that, `using(model, rows=Rows(…, watched=False))`
serve         our own loop, `serve.decode`, which is steady
peft          `adapter_names=…`
one by one    one batch for each adapter

Variants take turns in random order, ratios are formed within a round. Before anything is timed the script makes sure
that all of them give the same logits and the same tokens, and stops if they do not.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from step import base_model  # noqa: E402  # the benchmark beside this file

import peftlab as pl  # noqa: E402
from peftlab import lab, mixed, serve  # noqa: E402
from peftlab.paths import DATA  # noqa: E402

OUT = DATA / "results" / "serve.json"
RANK, ALPHA = 8, 16
PHASES = ("prefill", "decode", "generate")
CLOSE = 1e-3  # of logits of about 10 after six layers in float32, summed in other orders


class Part:
    """Rows that go through a model together, with the setting they need; `step` is one pass with a cache."""

    def __init__(self, model: nn.Module, ids: Tensor, setting: Callable[[], AbstractContextManager], **more: Any):
        self.model, self.ids, self.setting, self.more = model, ids, setting, more

    def prefill(self) -> Any:
        with self.setting():
            return self.model(input_ids=self.ids, use_cache=True, logits_to_keep=1, **self.more)

    def generate(self, new: int) -> Tensor:
        with self.setting():
            return self.model.generate(
                input_ids=self.ids, attention_mask=torch.ones_like(self.ids), max_new_tokens=new, do_sample=False,
                eos_token_id=None, pad_token_id=0, **self.more,
            )[:, self.ids.shape[1] :]  # type: ignore[operator]  # fmt: skip


def decode(part: Part, cache: Any, tokens: Tensor) -> Tensor:
    """The logits after each of `tokens` (rows, steps), one pass a token; the cache is left as it was."""
    logits = []
    with part.setting():
        for step in range(tokens.shape[1]):
            out = part.model(input_ids=tokens[:, step : step + 1], past_key_values=cache, use_cache=True, **part.more)
            logits.append(out.logits[:, -1])
    cache.crop(-tokens.shape[1])
    return torch.stack(logits, 1)


class Variant:
    """One way to run a batch: in one part, or in one for each adapter. Results are in the order of the rows."""

    def __init__(self, parts: list[Part], order: list[int], tokens: Tensor):
        self.parts, self.back = parts, torch.tensor(order).argsort()
        self.tokens = [tokens[part] for part in torch.tensor(order).split([len(p.ids) for p in parts])]
        self.caches = [part.prefill().past_key_values for part in parts]

    def prefill(self) -> Tensor:
        return torch.cat([part.prefill().logits[:, -1] for part in self.parts])[self.back]

    def decode(self) -> Tensor:
        steps = zip(self.parts, self.caches, self.tokens, strict=True)
        return torch.cat([decode(part, cache, tokens) for part, cache, tokens in steps])[self.back]

    def generate(self) -> Tensor:
        return torch.cat([part.generate(self.tokens[0].shape[1]) for part in self.parts])[self.back]


def models(base: nn.Module, adapters: int) -> tuple[nn.Module, nn.Module, list[str]]:
    """(ours, peft's, names): the same adapters on both, with effects that differ."""
    import peft

    names = [f"adapter{i}" for i in range(adapters)]
    ours = copy.deepcopy(base)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=names[0])
    draw = torch.Generator().manual_seed(0)
    for name in names:
        pl.attach(ours, pl.LoRA, targets="all-linear", name=name, r=RANK, alpha=ALPHA)
        if name != names[0]:
            theirs.add_adapter(name, config)
        for path, adapter in pl.adapters(ours)[name].items():
            adapter.lora_B.data = 0.05 * torch.randn(adapter.lora_B.shape, generator=draw)
            module = theirs.base_model.model.get_submodule(path)
            module.lora_A[name].weight.data.copy_(adapter.lora_A)
            module.lora_B[name].weight.data.copy_(adapter.lora_B)
    return ours.eval(), theirs.eval(), names


def variants(ours: nn.Module, theirs: nn.Module, names: Sequence[str], ids: Tensor, tokens: Tensor) -> dict:
    rows = [names[i % len(names)] for i in range(len(ids))]
    groups = {name: [i for i, row in enumerate(rows) if row == name] for name in names}
    using, everyone = partial(partial, pl.using, ours), list(range(len(ids)))
    one_by_one = [Part(ours, ids[group], using(name)) for name, group in groups.items()]
    return {
        "plain": Variant([Part(ours, ids, using(names[0]))], everyone, tokens),
        "ours": Variant([Part(ours, ids, using(rows=rows))], everyone, tokens),
        "ours, steady": Variant([Part(ours, ids, using(rows=mixed.Rows(rows, watched=False)))], everyone, tokens),
        "peft": Variant([Part(theirs, ids, nullcontext, adapter_names=rows)], everyone, tokens),
        "one by one": Variant(one_by_one, [i for group in groups.values() for i in group], tokens),
        "serve": Served(ours, rows, ids, tokens.shape[1]),
    }


class Served:
    """Our own decoding loop, with its sampling and its text; it has no phases to be timed apart."""

    def __init__(self, model: nn.Module, rows: Sequence[str], ids: Tensor, new: int):
        self.model, self.new = model, new
        self.requests = [serve.Request(row.tolist(), name, new) for row, name in zip(ids, rows, strict=True)]

    def generate(self) -> Tensor:
        found: list[list[int]] = [[] for _ in self.requests]
        for token in serve.decode(self.model, Silent(), self.requests):
            found[token.row].append(token.id)
        return torch.tensor(found)


class Silent:
    """A tokenizer without words or an end: texts are no part of what is compared."""

    pad_token_id, eos_token_id = 0, None

    def decode(self, ids: list[int], **_: bool) -> str:
        return "." * len(ids)


def works(runs: dict) -> Iterator[tuple[str, str, Callable[[], Tensor]]]:
    """(phase, variant, what is timed)"""
    for phase in PHASES:
        for name, variant in runs.items():
            if hasattr(variant, phase):
                yield phase, name, getattr(variant, phase)


def compare(runs: dict, adapters: int) -> float:
    """The largest difference of logits from ours; SystemExit if the ways do not do the same."""
    worst = 0.0
    for phase, name, work in works(runs):
        if name in ("ours", "plain"):
            continue
        mine, other = getattr(runs["ours"], phase)(), work()
        if phase == "generate":
            if not torch.equal(mine, other):
                raise SystemExit(f"{adapters} adapters: {name} generates other tokens than ours: nothing to compare")
            continue
        worst = max(worst, float((mine - other).abs().max()))
        if worst > CLOSE:
            raise SystemExit(f"{adapters} adapters, {phase}: {name} differs by {worst:.1e}: nothing to compare")
    if torch.equal(runs["ours"].prefill(), runs["plain"].prefill()) != (adapters == 1):
        raise SystemExit(f"{adapters} adapters, but all rows have the first one's logits, or one and they have not")
    return worst


def measure(runs: dict, rounds: int, clock: Callable[[], float]) -> dict[tuple[str, str], list[float]]:
    """(phase, variant) -> seconds of each round."""
    todo = {(phase, name): work for phase, name, work in works(runs)}
    return lab.take_turns(todo, rounds, lab.stopwatch(clock))


def summarise(seconds: dict, adapters: int, error: float, tokens: dict[str, int]) -> list[dict]:
    """A row for each phase and variant; `speed` is its throughput as a multiple of peft's and of the plain one's."""
    def speed(phase: str, name: str, other: str) -> list[float]:
        return lab.ratios(seconds[phase, other], seconds[phase, name])

    return [
        {
            "adapters": adapters, "phase": phase, "variant": name, "ms": [1000 * q for q in lab.quartiles(times)],
            "tokens_per_s": tokens[phase] / lab.quartiles(times)[1], "speed_to_peft": speed(phase, name, "peft"),
            "speed_to_plain": speed(phase, name, "plain"), "difference": error,
        }
        for (phase, name), times in seconds.items()
    ]  # fmt: skip


def table(rows: list[dict]) -> str:
    head = ("adapters", "phase", "variant", "ms (IQR)", "tokens/s", "× peft's speed (IQR)", "× plain's speed (IQR)")
    body = [
        (row["adapters"], row["phase"], row["variant"], lab.spread(row["ms"], 1), f"{row['tokens_per_s']:,.0f}",
         lab.spread(row["speed_to_peft"], 2), lab.spread(row["speed_to_plain"], 2))
        for row in rows
    ]  # fmt: skip
    return lab.markdown(head, [[str(cell) for cell in line] for line in body])


def main(argv: list[str] | None = None) -> list[dict]:
    parser = lab.timing_options("Throughput of batches with many adapters, ours beside peft.", rounds=10, out=OUT)
    parser.add_argument("--rows", type=int, default=64, help="rows of the batch (default 64)")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16, 64], help="how many different ones")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each prompt (default 32)")
    parser.add_argument("--new", type=int, default=8, help="tokens to decode (default 8)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    args = parser.parse_args(argv)
    if not all(1 <= n <= args.rows for n in args.adapters):
        parser.error("--adapters must be from 1 to the number of rows")
    torch.set_num_threads(args.threads)

    base, which = base_model()
    base.generation_config.eos_token_id = None  # all rows go on to the end, everywhere
    draw = torch.Generator().manual_seed(0)
    ids, tokens = (torch.randint(2, base.config.vocab_size, (args.rows, n), generator=draw)
                   for n in (args.tokens, args.new))  # fmt: skip
    ours, theirs, names = models(base, max(args.adapters))
    here, rows = lab.machine(), []
    counts = {"prefill": ids.numel(), "decode": tokens.numel(), "generate": tokens.numel()}
    with torch.no_grad():
        for n in args.adapters:
            runs = variants(ours, theirs, names[:n], ids, tokens)
            error = compare(runs, n)  # warms everything up, too
            rows += summarise(measure(runs, args.rounds, lab.CLOCKS[args.clock]), n, error, counts)
            del runs
    words = (f"{which}; {args.rows} rows, prompts of {args.tokens} tokens, {args.new} new ones, LoRA r={RANK}, "
             f"{args.rounds} rounds, {args.clock} clock")  # fmt: skip
    settings = {"base": which, "rank": RANK, **{key: value for key, value in vars(args).items() if key != "out"}}
    lab.report(words, here, table(rows), rows, settings, args.out)
    return rows


if __name__ == "__main__":
    main()
