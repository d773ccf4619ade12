"""Does the real llama.cpp give the answers of transformers? Our files in it, on the SQL adapter of data/adapters.

    pip install -e ".[llama]"          # llama-cpp-python; ten minutes of compiling
    OMP_NUM_THREADS=1 python benchmarks/agreement.py [--prompts 20] [--out FILE]

For the base, base and adapter, and the merged model in each of the types that `export.to_gguf` writes: for how many
test questions 40 greedy tokens are equal, character for character; for how many the five likeliest next tokens are the
same in the same order; the largest difference of a logit; and how many first lines are right SQL. One thread, a float32
cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402

import peftlab as pl  # noqa: E402
from peftlab import export, lab  # noqa: E402
from peftlab.paths import DATA, atomic_write  # noqa: E402
from peftlab.provenance import provenance  # noqa: E402
from peftlab.tasks import sql  # noqa: E402

OUT, PROMPTS, WORDS = DATA / "results" / "llama_cpp.json", 20, 40


@contextlib.contextmanager
def opened(path: Path, adapter: Path | None = None, context: int = 512) -> Iterator[Any]:
    """llama.cpp's model, on one thread, with a float32 cache; its memory is freed afterwards."""
    import llama_cpp

    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def as_stored():
        params = defaults()
        params.use_extra_bufts = False  # version 0.3.36 crashes when it repacks 8-bit matrices for a CPU with AMX
        return params

    llama_cpp.llama_cpp.llama_model_default_params = llama_cpp.llama_model_default_params = as_stored
    try:
        model = llama_cpp.Llama(
            str(path), lora_path=None if adapter is None else str(adapter), n_ctx=context, n_threads=1,
            n_threads_batch=1, logits_all=True, type_k=0, type_v=0, verbose=False)  # fmt: skip
    finally:
        llama_cpp.llama_cpp.llama_model_default_params = llama_cpp.llama_model_default_params = defaults
    try:
        yield model
    finally:
        model.close()


def ours(model, tokenizer, prompt: str, words: int = WORDS) -> str:
    """transformers' greedy continuation, with the active adapters."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=words,
                         pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def theirs(loaded, prompt: str, words: int = WORDS) -> str:
    """llama.cpp's, by the same call as a user's."""
    return loaded.create_completion(prompt, max_tokens=words, temperature=0, repeat_penalty=1.0)["choices"][0]["text"]


def logits(loaded, ids: list[int]) -> np.ndarray:
    loaded.reset()
    loaded.eval(ids)
    return np.array(loaded.scores[: len(ids)])


@torch.no_grad()
def reference(model, ids: list[int]) -> np.ndarray:
    return model(torch.tensor([ids])).logits[0].numpy()


def agreement(model, tokenizer, loaded, prompts: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    """What llama.cpp says to the prompts, beside transformers' answers and logits."""
    said, best, apart = [theirs(loaded, prompt) for prompt in prompts], 0, 0.0
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        want, got = reference(model, ids), logits(loaded, ids)
        apart = max(apart, float(abs(want - got).max()))
        best += list(want[-1].argsort()[-5:]) == list(got[-1].argsort()[-5:])
    equal = sum(a == b for a, b in zip(answers, said, strict=True))
    return {"prompts": len(prompts), "equal answers": equal, "equal five best": best, "logits apart": apart,
            "said": said}  # fmt: skip


def right(row: dict, said: str) -> bool:
    """Whether the first line is SQL that finds the rows of the gold query."""
    return sql.grade(row["db"], said.split("\n")[0].strip(), row["completion"].strip())


def measure(prompts: int = PROMPTS) -> list[dict[str, Any]]:
    """One line for each file."""
    model, tokenizer = pl.load_base(DATA / "base", device="cpu")
    pl.load_adapter(model, DATA / "adapters" / "sql", name="sql")
    rows = [row for row in pl.tasks.load("sql")["test"] if row["split"] == "iid"][:prompts]
    texts, lines = [row["prompt"] for row in rows], []
    with tempfile.TemporaryDirectory() as folder:
        base = export.to_gguf(model, tokenizer, Path(folder, "base.gguf"), "f32", name=())
        adapter = export.lora_to_gguf(model, Path(folder, "sql.gguf"), "sql")
        kinds = {f"merged, {kind}": kind for kind in export.KINDS}
        for label in ("base, f32", "base + adapter, f32", *kinds):
            file = base
            if label in kinds:
                file = export.to_gguf(model, tokenizer, Path(folder, "merged.gguf"), kinds[label], "sql")
            with pl.using(model, *(() if label == "base, f32" else ("sql",))):
                answers = [ours(model, tokenizer, text) for text in texts]
                with opened(file, adapter if "adapter" in label else None) as loaded:
                    found = agreement(model, tokenizer, loaded, texts, answers)
            said = found.pop("said")
            found["right"] = sum(right(row, text) for row, text in zip(rows, said, strict=True))
            found["right in transformers"] = sum(right(row, text) for row, text in zip(rows, answers, strict=True))
            lines.append({"file": label, "MiB": round(file.stat().st_size / 2**20, 1), **found})
            print(lines[-1], flush=True)
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    from importlib.metadata import version

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="how many test questions (default 20)")
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file to write")
    options = parser.parse_args(arguments)
    lines = measure(options.prompts)
    machine = provenance() | {"llama_cpp_python": version("llama_cpp_python")}
    atomic_write(options.out, json.dumps({"machine": machine, "words": WORDS, "agreement": lines}, indent=1) + "\n")
    body = [[f"{value:.2g}" if key == "logits apart" else str(value) for key, value in line.items()] for line in lines]
    print(lab.markdown(list(lines[0]), body))


if __name__ == "__main__":
    main()
