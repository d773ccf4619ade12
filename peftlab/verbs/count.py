"""How many parameters a model has and how many a method would train, without its weights.

  python -m peftlab count --model llama-2-7b
  python -m peftlab count --model llama-3.1-70b --method LoRA --rank 16 --targets "q_proj|v_proj"
  python -m peftlab count --model gpt2-medium --method Houlsby --set bottleneck=64
  python -m peftlab count --model ./config.json --method full --json
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from ._options import hyper, shape_lines

HELP = "count parameters of any model and method, without weights"


def arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("the model")
    which = model.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="NAME", help="built-in shape, config.json or its folder, or Hub id (online)")
    which.add_argument("--list", action="store_true", help="list the built-in shapes and the methods, and end")
    method = parser.add_argument_group("the method")
    method.add_argument("--method", metavar="NAME", help="LoRA, IA3, … or 'full'; without it, only the model counts")
    method.add_argument("--targets", metavar="WHERE", help="regular expression for the end of a path, or a group such "
                        "as all-linear (default: the method's own)")  # fmt: skip
    method.add_argument("--rank", type=int, metavar="R", help="the rank r, for methods that have one")
    method.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="hyper",
                        help="any other hyper-parameter, such as alpha=32; may be repeated")  # fmt: skip
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--by", choices=("layer", "module"), help="add a table by layer or by kind of module")
    shown.add_argument("--dtype", default="float32", help="of the adapter's file (default: float32)")
    shown.add_argument("--json", action="store_true", help="machine-readable, with all tables; bytes, not MiB")


def run(args: argparse.Namespace) -> None:
    if args.list:
        return _list(args.json)
    from ..count import count

    chosen = hyper(args.hyper, args.rank)
    counted = count(args.model, args.method, args.targets, **chosen)
    stored = counted.file_bytes(args.dtype)
    tables = {"layer": counted.per_layer, "module": counted.per_module}
    if args.json:
        content: dict[str, Any] = {
            "model": args.model, "method": args.method, "targets": args.targets, "hyper": chosen,
            "trainable": counted.trainable, "total": counted.total, "base": counted.base, "percent": counted.percent,
            "formula": counted.expected.get("default"), "dtype": args.dtype, "file_bytes": stored,
            "optimizer_bytes": counted.optimizer_bytes,
        }  # fmt: skip
        content |= {f"per_{name}": {k: p._asdict() for k, p in parts.items()} for name, parts in tables.items()}
        print(json.dumps(content, indent=1, ensure_ascii=False))
        return
    print(counted)
    print(f"stored as {args.dtype}: {stored:,} bytes")
    for name in [args.by] if args.by else []:
        rows = [(name, "parameters", "trainable")]
        rows += [(part, f"{p.total:,}", f"{p.trainable:,}") for part, p in tables[name].items()]
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        print("", *(f"  {a:<{wide[0]}}  {b:>{wide[1]}}  {c:>{wide[2]}}" for a, b, c in rows), sep="\n")


def _list(as_json: bool) -> None:
    from .. import METHODS
    from ..shapes import shapes

    if as_json:
        return print(json.dumps({"shapes": shapes(), "methods": sorted(METHODS)}, indent=1))
    print(*shape_lines(), f"methods\n  full, {', '.join(METHODS)}", sep="\n")
