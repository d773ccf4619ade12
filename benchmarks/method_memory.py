"""Memory of one training step of a large model with each method of the leaderboard, predicted: no GPU needed.

    OMP_NUM_THREADS=1 python benchmarks/method_memory.py        # writes data/results/method_memory.json, in minutes

The base is Llama 3.1 8B in bfloat16, adapters are float32, one text of 1,024 tokens, AdamW, no checkpointing. Methods
and their hyper-parameters are those of classic.py; new ones join in the same way. How good such predictions are is in
benchmarks/README.md under vram_published.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import classic  # the leaderboard beside this file: who takes part

from peftlab.paths import DATA, atomic_write
from peftlab.provenance import provenance

OUT, MODEL, BATCH, TOKENS = DATA / "results" / "method_memory.json", "llama-3.1-8b", 1, 1024


def measure(model: str = MODEL, tokens: int = TOKENS) -> dict:
    """What was predicted, method by method; a method that the model cannot take has a note instead of figures."""
    from peftlab.vram import predict

    lines = []
    for name, method in classic.everyone().items():
        try:
            memory = predict(model, method.of or "full", method.targets, batch=BATCH, tokens=tokens, **method.hyper)
        except ValueError as error:
            lines.append({"method": name, "note": str(error)})
        else:
            lines.append({"method": name, "allocated": memory.allocated, "reserved": memory.reserved})
        print(lines[-1], flush=True)
    return {"model": model, "batch": BATCH, "tokens": tokens, "methods": lines, "origin": provenance()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file to write")
    parser.add_argument("--model", default=MODEL, help=f"a built-in shape, a Hub id or a config.json (default {MODEL})")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of the one text (default {TOKENS})")
    options = parser.parse_args(arguments)
    atomic_write(options.out, json.dumps(measure(options.model, options.tokens), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
