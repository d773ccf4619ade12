"""Will it fit? The memory of fine-tuning or running a model, predicted without a GPU and without weights.

  python -m peftlab vram --model meta-llama/Llama-3.1-8B --method lora --rank 16 --quantize nf4 --card 4090
  python -m peftlab vram --model qwen2.5-7b --method full --optimizer adamw8bit --card a100-80 --card h100
  python -m peftlab vram --model gpt2-medium --method Houlsby --set bottleneck=64 --batch 8 --json

running it: a prompt, and so many tokens more
  python -m peftlab vram --model llama-3.1-8b --tokens 4096 --new-tokens 512 --card 24GB

the largest that fits a card: batch and length for a model, or without one the largest model
  python -m peftlab vram --plan --card 4090 --model llama-3.1-8b --method lora --quantize nf4 --checkpointing
  python -m peftlab vram --plan --card 3060 --method lora --quantize nf4 --tokens 1024

The model's own code runs, on tensors that have a shape and no content; a copy of torch's allocator then says what a GPU
would have to reserve. That takes seconds, and some minutes for a plan or for advice on a very large model.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from ._options import hyper, shape_lines

HELP = "predict the memory of fine-tuning or running a model: will it fit?"
GIB = 2**30


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `predict` have no default here, so that its own are used; the help says them."""
    model = parser.add_argument_group("the model")
    which = model.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="NAME", help="built-in shape, config.json or its folder, or Hub id (online)")
    which.add_argument("--list", action="store_true", help="list cards, built-in shapes and optimizers, and end")
    _option(model, "--dtype", "TYPE", "of the base's weights: bfloat16, float16 or float32 (default: bfloat16)")
    _option(model, "--quantize", "KIND", "linear layers of the base in nf4, fp4, int4 or int8 (default: as they are)")
    _option(model, "--attention", "KIND", "auto (what torch chooses on Ampere and newer), flash, efficient, cudnn, "
            "math or eager (default: auto)")  # fmt: skip

    method = parser.add_argument_group("the method")
    _option(method, "--method", "NAME", "LoRA, IA3, … or 'full'; 'none': the model is run, not trained (default: none; "
            "for a plan: lora)")  # fmt: skip
    _option(method, "--targets", "WHERE", "regular expression for the end of a path, or a group such as all-linear "
            "(default: the method's own)")  # fmt: skip
    method.add_argument("--rank", type=int, metavar="R", help="the rank r, for methods that have one")
    method.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="hyper",
                        help="any other hyper-parameter, such as alpha=32; may be repeated")  # fmt: skip
    _option(method, "--adapter-dtype", "TYPE", "of what the method adds (default: float32)")

    step = parser.add_argument_group("what is run")
    _option(step, "--batch", "B", "rows at once (default: 1)", int)
    _option(step, "--tokens", "T", "length of a row, or of the prompt (default: 512)", int)
    _option(step, "--new-tokens", "N", "tokens to generate, with a cache (default: 0)", int)
    _option(step, "--micro-batches", "N", "batches that add up their gradients before a step (default: 1)", int)
    _option(step, "--optimizer", "NAME", "adamw (fused), adamw_foreach, adamw8bit, paged_adamw8bit, sgd, …; --list has "
            "all (default: adamw)")  # fmt: skip
    _option(step, "--autocast", "TYPE", "bf16 or fp16: products in 16 bits, as torch.autocast (default: off)")
    _option(step, "--checkpointing", help="gradient checkpointing: activations are computed again, not kept")
    _option(step, "--padding", help="rows of unequal length, so that attention needs a mask")
    _option(step, "--expandable", help="with PYTORCH_ALLOC_CONF=expandable_segments:True")

    card = parser.add_argument_group("the card")
    card.add_argument("--card", action="append", default=[], metavar="CARD", help="4090, a100-80, h100, … or its "
                      "memory, such as 24GB; 'this': the one in this computer; may be repeated")  # fmt: skip
    _option(card, "--context", "GIB", "GiB that the CUDA context takes (default: 0.5)", float)
    _option(card, "--others", "GIB", "GiB that the desktop and other programs take (default: 0)", float)
    card.add_argument("--no-advice", action="store_true", help="do not look for changes that would make it fit")
    card.add_argument("--plan", action="store_true", help="the largest batch and length that fit, or without --model "
                      "the largest built-in model")  # fmt: skip
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--json", action="store_true", help="machine-readable; bytes")


def _option(group: Any, name: str, metavar: str = "", help: str = "", type: Any = str) -> None:
    """An option that is not there if it is not given; one without a metavar is a switch."""
    kind = {"metavar": metavar, "type": type} if metavar else {"action": "store_true"}
    group.add_argument(name, help=help, default=argparse.SUPPRESS, **kind)


OPTIONS = ("dtype", "quantize", "attention", "targets", "adapter_dtype", "batch", "tokens", "new_tokens",
           "micro_batches", "optimizer", "autocast", "checkpointing", "padding", "expandable")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    if args.list:
        return _list(args.json)
    given = vars(args)
    options = {name: given[name] for name in OPTIONS if name in given}
    options |= _no_option(hyper(args.hyper, args.rank))
    if "method" in given:
        options["method"] = None if args.method.lower() == "none" else args.method
    room = {name: GIB * given[name] for name in ("context", "others") if name in given}
    cards = [None if name == "this" else name for name in args.card]
    if args.plan:
        return _plan(cards, args.model, options | room, args.json)
    if args.model is None:
        raise ValueError("no model: --model NAME, or --plan --card CARD for the largest that fits, or --list")
    from ..vram import card_named, predict
    from ..vram.memory import size

    chosen = [card_named(name) for name in cards]  # a wrong name is said before the work
    memory = predict(args.model, **options)
    if not args.json:
        print(memory, f"  found in {memory.seconds:.1f} s; resident memory here grew by {size(memory.host)}",
              sep="\n", flush=True)  # fmt: skip
    verdicts = []
    for card in chosen:
        verdicts.append(memory.verdict(card, advise=not args.no_advice, **room))
        if not args.json:
            print("", verdicts[-1], sep="\n", flush=True)
    if args.json:
        said = [verdict.to_dict() for verdict in verdicts]
        found = {"verdict": said[0], "verdicts": said} if said else {}
        print(json.dumps(memory.to_dict() | found, indent=1, ensure_ascii=False))


def _plan(cards: list[Any], model: str | None, options: dict[str, Any], as_json: bool) -> None:
    from ..vram import card_named, plan

    if not cards:
        raise ValueError("--plan needs a card: --card 4090, --card 24GB")
    plans = []
    for card in [card_named(name) for name in cards]:
        plans.append(plan(card, model, **options))
        if not as_json:
            print(plans[-1], flush=True)
    if as_json:
        said = [found.to_dict() for found in plans]
        print(json.dumps({"plan": said[0], "plans": said}, indent=1, ensure_ascii=False))


def _no_option(chosen: dict[str, Any]) -> dict[str, Any]:
    """Hyper-parameters; ValueError for one that has an option of its own."""
    for name, value in chosen.items():
        if name in (*OPTIONS, "model", "method"):
            raise ValueError(f"--set {name}={value}: this is no hyper-parameter; use --{name.replace('_', '-')}")
    return chosen


def _list(as_json: bool) -> None:
    from ..shapes import shapes
    from ..vram import CARDS
    from ..vram.memory import size
    from ..vram.step import OPTIMIZERS

    if as_json:
        cards = {name: card.memory for name, card in CARDS.items()}
        return print(json.dumps({"cards": cards, "shapes": shapes(), "optimizers": list(OPTIMIZERS)}, indent=1))
    wide = max(map(len, CARDS))
    print("cards, each with the memory that torch can see")
    print(*(f"  {name:<{wide}}  {size(card.memory):>10}" for name, card in CARDS.items()), *shape_lines(), sep="\n")
    print(f"optimizers\n  {', '.join(OPTIMIZERS)}")
