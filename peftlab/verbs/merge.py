"""Adapters made into one adapter, or folded into the weights of their base.

one adapter out of several, as a folder that this library and HF PEFT can load
  python -m peftlab merge --adapter runs/sql:0.7 --adapter runs/reviews:0.4 --out runs/both
  python -m peftlab merge --adapter runs/sql:1 --adapter runs/reviews:1 --how ties --density 0.2 --out runs/both
  python -m peftlab merge --adapter runs/sql --how svd --rank 4 --out runs/small

a whole model, which transformers loads without any adapter library
  python -m peftlab merge --base Qwen/Qwen3-0.6B --adapter runs/sql --into-weights --out models/sql

FOLDER:WEIGHT, with weight 1 if there is none; a negative one subtracts what the adapter does. Ways to combine LoRAs:
  cat                     the exact weighted sum of all changes; its rank is the sum of the ranks
  svd                     the same sum at the largest of the ranks, or at --rank
  ties_svd, dare_linear_svd, dare_ties_svd, magnitude_prune_svd
                          the papers' ways on the changes of the weights, cut to a rank afterwards (slow: one singular
                          value decomposition for each matrix)
  linear, ties, dare_linear, dare_ties, magnitude_prune
                          as HF PEFT does it on the factors A and B apart: fast, equal ranks only, and not what the
                          papers do; pl.combine says what it is instead
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

HELP = "combine adapters into one, or fold them into the base's weights"


def arguments(parser: argparse.ArgumentParser) -> None:
    given = parser.add_argument_group("what is merged")
    given.add_argument("--adapter", action="append", required=True, metavar="FOLDER[:WEIGHT]", dest="adapters",
                       help="an adapter's folder, and its weight (default: 1); may be repeated")  # fmt: skip
    given.add_argument("--base", metavar="NAME", help="folder or Hub id of the base (default: PEFTLAB_BASE, else the "
                       "embedded model)")  # fmt: skip
    way = parser.add_argument_group("how")
    way.add_argument("--how", metavar="WAY", help="see above (default: cat)")
    way.add_argument("--density", type=float, metavar="D", help="for ties, dare and magnitude_prune: the share of "
                     "numbers to keep, such as 0.2")  # fmt: skip
    way.add_argument("--rank", type=int, metavar="R", help="of the result, for the ways that end in svd (default: the "
                     "largest of the sources)")  # fmt: skip
    way.add_argument("--sign", metavar="METHOD", default="total", help="for ties: elect a sign by 'total' size or by "
                     "'frequency' (default: total)")  # fmt: skip
    way.add_argument("--seed", type=int, default=0, metavar="N", help="of the random masks of dare (default: 0)")
    out = parser.add_argument_group("what is written")
    out.add_argument("--out", required=True, metavar="FOLDER", help="a new or empty folder")
    out.add_argument("--into-weights", action="store_true", help="the whole model with the adapters in its weights")


def run(args: argparse.Namespace) -> None:
    weights, folders = _sources(args.adapters)
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {args.out} exists and is not an empty folder; choose another one")
    plain = args.how is None and len(weights) == 1 and set(weights.values()) == {1.0}
    if plain and not args.into_weights:
        raise ValueError("one adapter of weight 1 is what it is already; give another one, a weight, --how svd --rank "
                         "R to shorten it, or --into-weights to fold it in")  # fmt: skip
    if plain and (args.rank or args.density):
        raise ValueError("--rank and --density need --how, such as --how svd")
    from .. import adapters, load_adapter, load_base, save_adapter
    from ..export import to_transformers
    from ..merge import combine

    try:
        model, tokenizer = load_base(args.base)
        for name, folder in folders.items():
            load_adapter(model, folder, name=name)
        if plain:
            (name,) = weights
        else:
            name = _free("combined", weights)
            combine(model, weights, args.how or "cat", name, density=args.density, svd_rank=args.rank,
                    majority_sign_method=args.sign, seed=args.seed)  # fmt: skip
        made = adapters(model)[name].values()
        if args.into_weights:
            to_transformers(model, out, tokenizer, name)
        else:
            save_adapter(model, out, name=name)
    except OSError as error:
        raise ValueError(str(error)) from None
    said = " and ".join(f"{weight:g} × {folders[source]}" for source, weight in weights.items())
    method, how = type(next(iter(made))).__name__, "" if plain else f" by {args.how or 'cat'}"
    size = sum(p.numel() for a in made for p in a.parameters())
    print(f"{said}{how}: {method} on {len(made)} layers, {size:,} numbers")
    print(f"written to {out}" + (", in the weights of the whole model" if args.into_weights else ""))


def _sources(given: list[str]) -> tuple[dict[str, float], dict[str, str]]:
    """(name -> weight, name -> folder), each named by the last word of its folder."""
    weights: dict[str, float] = {}
    folders: dict[str, str] = {}
    for text in given:
        folder, colon, number = text.rpartition(":")
        if not colon or os.path.isdir(text):
            folder, number = text, "1"
        try:
            weight = float(number)
        except ValueError:
            raise ValueError(f"--adapter {text}: there is no such folder, and {number!r} is no weight; write "
                             "FOLDER:0.5") from None  # fmt: skip
        word = re.sub(r"\W", "_", Path(folder).resolve().name) or "adapter"
        name = _free(word if re.match(r"[A-Za-z_]", word) else f"a_{word}", weights)
        weights[name], folders[name] = weight, folder
    return weights, folders


def _free(name: str, taken: dict[str, float]) -> str:
    while name in taken:
        name += "_"
    return name
