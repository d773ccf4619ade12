"""One base model and any number of adapters behind an HTTP port, in the manner of OpenAI's completions.

  python -m peftlab serve --adapter sql=runs/sql --adapter poems=runs/poems
  python -m peftlab serve --base Qwen/Qwen3-0.6B --store adapters --cache 32 --max-batch 16 --port 8080
  curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
       -d '{"model": "sql", "prompt": "How many", "max_tokens": 20}'

The request's "model" is an adapter's name, or "base". The official openai client works with base_url=http://…/v1.
Ctrl-C, or SIGTERM, refuses new requests, finishes the running ones and ends with status 0; a second one cancels them.
It listens on this machine alone unless --host says otherwise.
"""

from __future__ import annotations

import argparse
import os

HELP = "serve a base and its adapters over HTTP, as OpenAI's completions"


def arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("the model")
    model.add_argument("--base", metavar="NAME", help="Hub id or folder (default: PEFTLAB_BASE, else the embedded one)")
    model.add_argument("--quantize", metavar="KIND", help="pack the base's linear layers while loading: nf4, fp4, …")
    model.add_argument("--device", metavar="NAME", help="cpu, cuda, … (default: the GPU if there is one)")
    model.add_argument("--store", metavar="FOLDER", help="serve all adapters of a store, attached when needed")
    model.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER",
                       help="attach this adapter for good; may be repeated")  # fmt: skip
    model.add_argument("--cache", type=int, default=16, metavar="N",
                       help="how many adapters of the store are attached at once (default: 16)")  # fmt: skip
    where = parser.add_argument_group("where")
    where.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    where.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    where.add_argument("--api-key", metavar="KEY", help="for all requests but /health (default: the environment's "
                       "PEFTLAB_API_KEY, else none)")  # fmt: skip
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-batch", type=int, default=16, metavar="N", help="rows decoded together (default: 16)")
    limits.add_argument("--max-queue", type=int, default=256, metavar="N",
                        help="rows that may wait; more are refused with 429 (default: 256)")  # fmt: skip
    limits.add_argument("--max-tokens", type=int, metavar="N", help="new tokens of one answer (default: the context's)")


def run(args: argparse.Namespace) -> None:
    from ..base import load_base
    from ..files import load_adapter
    from ..store import INDEX, Store

    folders = dict(map(_named, args.adapter))
    if args.cache < 1:
        raise ValueError(f"--cache {args.cache}: keep one adapter at least")
    try:
        from ..server import serve

        if args.store and not os.path.isfile(os.path.join(args.store, INDEX)):
            raise ValueError(f"--store {args.store}: no store is there (no {INDEX})")
        store = Store(args.store) if args.store else None
        model, tokenizer = load_base(args.base, args.device, quantize=args.quantize)
        for name, folder in folders.items():
            load_adapter(model, folder, name)
        serve(
            model, tokenizer, store, host=args.host, port=args.port, capacity=args.cache, max_batch=args.max_batch,
            max_queue=args.max_queue, max_tokens=args.max_tokens,
            api_key=args.api_key or os.environ.get("PEFTLAB_API_KEY"),
        )  # fmt: skip
    except (OSError, ImportError, LookupError) as error:
        raise ValueError(error.args[-1] if error.args else error) from None


def _named(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not equals or not name or not folder:
        raise ValueError(f"--adapter {text!r} is not NAME=FOLDER, such as sql=runs/sql")
    return name, folder
