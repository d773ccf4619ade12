"""Hand a fine-tuned model over to other tools, or ask beforehand what they would refuse.

  python -m peftlab export --adapter runs/sql --to transformers --out sql-merged
  python -m peftlab export --adapter runs/sql --to gguf --out sql.gguf --quantize q8_0
  python -m peftlab export --adapter runs/sql --to gguf --out sql-lora.gguf --adapter-only
  python -m peftlab export --adapter runs/sql --to ollama --out sql-ollama
  python -m peftlab export --adapter runs/sql --check vllm

An adapter is a folder that save_adapter or HF PEFT wrote. Without --adapter the base alone is exported. --check reads
only the adapter's two files, and ends with status 1 if there are problems; each comes with its cure.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

HELP = "hand a fine-tuned model over to transformers, HF PEFT, llama.cpp or Ollama"
TOOLS = ("transformers", "peft", "gguf", "ollama")


def arguments(parser: argparse.ArgumentParser) -> None:
    from ..export import KINDS, TARGETS

    what = parser.add_argument_group("what")
    what.add_argument("--base", metavar="NAME", help="Hub id or folder (default: PEFTLAB_BASE, else the embedded base)")
    what.add_argument("--adapter", metavar="FOLDER", type=Path, help="the adapter's folder")
    where = parser.add_argument_group("where to")
    tool = where.add_mutually_exclusive_group(required=True)
    tool.add_argument("--to", choices=TOOLS, help="a folder of transformers; the adapter with a model card; a file for "
                      "llama.cpp; a folder for Ollama")  # fmt: skip
    tool.add_argument("--check", choices=TARGETS, metavar="TOOL", help="write nothing, and list what would keep a tool "
                      f"from using the adapter: {', '.join(TARGETS)}")  # fmt: skip
    where.add_argument("--out", metavar="PATH", type=Path, help="a new folder; for gguf, a file name.gguf")
    how = parser.add_argument_group("how")
    parts = how.add_mutually_exclusive_group()
    parts.add_argument("--merged", action="store_true", help="fold the adapter into the weights (default, but for peft)"
                       )  # fmt: skip
    parts.add_argument("--adapter-only", action="store_true", help="for gguf, the adapter's file alone; for ollama, "
                       "base and adapter side by side")  # fmt: skip
    how.add_argument("--quantize", choices=KINDS, help="how a GGUF file stores numbers (default: f16; f32 for an "
                     "adapter alone)")  # fmt: skip
    how.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="how a transformers folder does "
                     "(default: as the base in memory)")  # fmt: skip
    card = parser.add_argument_group("in the model card")
    card.add_argument("--title", metavar="TEXT", help="its heading (default: the adapter's and the base's names)")
    card.add_argument("--license", metavar="ID", help="as the Hub spells it, such as apache-2.0")


def run(args: argparse.Namespace) -> None:
    try:
        _check(args) if args.check else _write(args)
    except (OSError, ImportError) as error:
        raise ValueError(str(error)) from None


def _check(args: argparse.Namespace) -> None:
    from ..export import check

    if args.adapter is None:
        raise ValueError("--check needs the adapter's folder: --adapter FOLDER")
    problems = check(args.check, args.adapter)
    if problems:
        print(*(f"- {problem}" for problem in problems), sep="\n")
        raise SystemExit(1)
    print(f"nothing is known that keeps {args.check} from using {args.adapter}")


def _refuse(args: argparse.Namespace) -> None:
    """Options that do not go together, before anything is loaded."""
    if args.out is None:
        raise ValueError("say where to: --out PATH")
    if args.adapter is None and (args.to == "peft" or args.adapter_only):
        raise ValueError(f"--{'adapter-only' if args.adapter_only else 'to peft'} needs an adapter: --adapter FOLDER")
    if args.to == "peft" and args.merged:
        raise ValueError("--to peft writes an adapter; a merged model goes --to transformers")
    if args.to == "transformers" and args.adapter_only:
        raise ValueError("--to transformers writes a merged model; the adapter alone goes --to peft")
    if args.quantize and args.to not in ("gguf", "ollama"):
        raise ValueError(f"--quantize is for gguf and ollama; for {args.to}, --dtype sets the type of the numbers")
    if args.dtype and args.to != "transformers":
        raise ValueError(f"--dtype is for transformers; for {args.to} it is --quantize")


def _write(args: argparse.Namespace) -> None:
    import torch

    from .. import export, load_adapter, load_base

    _refuse(args)
    model, tokenizer = load_base(args.base, device="cpu")
    name = None
    if args.adapter is not None:
        name = re.sub(r"[^\w-]", "_", args.adapter.resolve().name)
        name = name if re.match(r"[A-Za-z_]", name) else f"_{name}"
        load_adapter(model, args.adapter, name)
    about, apart = export.About(title=args.title, license=args.license), args.adapter_only
    if args.to == "transformers":
        dtype = getattr(torch, args.dtype) if args.dtype else None
        done = export.to_transformers(model, args.out, tokenizer, name, dtype=dtype, about=about)
    elif args.to == "peft":
        done = export.to_peft(model, args.out, name, about=about)
    elif args.to == "ollama":
        done = export.to_ollama(model, tokenizer, args.out, args.quantize or "f16", name, merged=not apart, about=about)
    elif apart:
        done = export.lora_to_gguf(model, args.out, name, args.quantize or "f32", about=about)
    else:
        done = export.to_gguf(model, tokenizer, args.out, args.quantize or "f16", name, about=about)
    for file in sorted(done.iterdir()) if done.is_dir() else [done, done.with_suffix(".md")]:
        print(f"{file}  {file.stat().st_size:,} bytes")
