"""python -m peftlab.base: train the embedded base model from text that is on this machine, and write data/base."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import torch

from ..paths import DATA
from .pretrain import Recipe, pretrain, recipe_arguments


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m peftlab.base", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/base"), help="tokens, log and checkpoint (resumable)")
    parser.add_argument("--out", type=Path, default=DATA / "base", help="where the finished model goes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the step (a CPU needs a C++ compiler)")
    parser.add_argument("--report", action="store_true", help="do not train: measure --out, write its card")
    recipe_arguments(parser)
    chosen = parser.parse_args(arguments)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)

    from .card import publish, report

    if not chosen.report:
        recipe = Recipe(**{f.name: getattr(chosen, f.name) for f in fields(Recipe)})
        options = f"--threads {torch.get_num_threads()}{' --compile' if chosen.compile else ''}"
        publish(pretrain(recipe, chosen.work, chosen.device, chosen.compile), chosen.work, chosen.out, options)
    report(chosen.out)


if __name__ == "__main__":
    main()
