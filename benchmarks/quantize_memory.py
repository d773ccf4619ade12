"""Resident memory while a model is packed into four bits, against its size in bfloat16.

    python benchmarks/quantize_memory.py [--shape llama-3.2-1b] [--json FILE]

The model is built from its config with random weights. "load" packs a checkpoint while reading it (load_quantized),
"in place" packs a dense model that is in memory already (quantize), "transformers" is its from_pretrained with
bitsandbytes. Each runs in a process of its own. Linux only: /proc tells which memory is anonymous and which is mapped
from files, where the kernel can drop it at any time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from peftlab import lab
from peftlab.paths import atomic_write
from peftlab.provenance import provenance

MIB = 2**20
FIELDS = {"VmRSS": "resident", "RssAnon": "anonymous", "RssFile": "mapped"}
WAYS = ("load", "in place", "transformers")
SHARD = 512 * MIB


# --- the checkpoint -------------------------------------------------------------------------------------------------


def random_like(meta: torch.Tensor) -> torch.Tensor:
    """Weights like trained ones as far as packing goes: normal, small, in bfloat16."""
    return torch.empty(meta.shape, dtype=torch.bfloat16).normal_(std=0.02)


def write_checkpoint(shape: str, folder: Path) -> int:
    """A checkpoint of random weights, shard by shard, so that it is never in memory whole; its bytes of weights."""
    from safetensors.torch import save_file

    from peftlab.shapes import meta_model

    model = meta_model(shape, dtype=torch.bfloat16)
    model.config.save_pretrained(folder)
    state, tied = model.state_dict(), set(model.all_tied_weights_keys)
    names = [name for name in state if name not in tied]
    where, shard, number, total = {}, {}, 1, 0
    for name in names:
        shard[name] = random_like(state[name])
        where[name] = f"model-{number:05}.safetensors"
        total += shard[name].nbytes
        if sum(t.nbytes for t in shard.values()) >= SHARD or name == names[-1]:
            save_file(shard, folder / where[name], {"format": "pt"})
            shard, number = {}, number + 1
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


# --- one process ----------------------------------------------------------------------------------------------------


def memory() -> dict[str, int]:
    """Bytes of this process that are resident, and which of them are anonymous or mapped from files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[field].split()[0]) * 1024 for field, name in FIELDS.items()}  # given in KiB


@contextlib.contextmanager
def watched(every: float = 0.002) -> Iterator[list[tuple[float, dict[str, int]]]]:
    """(seconds, memory) from the start of the block to its end, sampled by a thread."""
    seen: list[tuple[float, dict[str, int]]] = []
    start, stop = time.perf_counter(), threading.Event()

    def sample() -> None:
        while not stop.is_set():
            seen.append((time.perf_counter() - start, memory()))
            stop.wait(every)

    seen.append((0.0, memory()))
    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()
        seen.append((time.perf_counter() - start, memory()))


def dense_model(shape: str):
    """A bfloat16 model of random weights in memory, frozen."""
    from peftlab.shapes import config_of, meta_model

    kind, config = type(meta_model(shape)), config_of(shape, dtype=torch.bfloat16)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = kind(config)
    finally:
        torch.set_default_dtype(before)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    return model.requires_grad_(False)


def load(folder: str):
    from peftlab.nf4_loading import load_quantized

    return load_quantized(folder, device="cpu")


def load_by_transformers(folder: str):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    way = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=way, device_map={"": "cpu"})


def packed_bytes(model) -> tuple[int, int]:
    """(bytes of a quantised model's weights, those of its largest packed layer when dense), counted."""
    from peftlab.nf4_layer import NF4Linear

    layers = [layer for layer in model.modules() if isinstance(layer, NF4Linear)]
    packed = sum(round(layer.n_weights * layer.packed.bits / 8) for layer in layers)
    rest = sum(p.nbytes for p in model.parameters())
    return packed + rest, max((layer.n_weights * layer.dtype.itemsize for layer in layers), default=0)


def work(way: str, shape: str, folder: str, warm: str) -> dict:
    """What one way takes, in this process. warm: a tiny checkpoint, so that imports are not counted."""
    import peftlab as pl

    read = load_by_transformers if way == "transformers" else load
    read(warm)
    start = memory()
    model = dense_model(shape) if way == "in place" else None
    before, started = memory(), time.thread_time()  # of this thread alone: neither the watcher's nor another process's
    with watched() as seen:
        model = pl.quantize(model) if way == "in place" else read(folder)
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.max()  # what is only mapped from a file becomes resident when it is used
        seconds = time.thread_time() - started
    peak = {name: max(values[name] for _, values in seen) for name in FIELDS.values()}
    found = {"way": way, "seconds": seconds, "start": start, "before": before, "peak": peak, "after": seen[-1][1]}
    points = seen[:: max(1, len(seen) // 60)]
    found["trace"] = [[round(t, 3), values["anonymous"] - start["anonymous"]] for t, values in points]
    if way != "transformers":
        found["packed"], found["layer"] = packed_bytes(model)
    return found


# --- all of them ----------------------------------------------------------------------------------------------------


def measure(shape: str, ways: tuple[str, ...]) -> dict:
    with tempfile.TemporaryDirectory(prefix="quantize_memory_") as temporary:
        folder, warm = Path(temporary, "model"), Path(temporary, "warm")
        folder.mkdir()
        dense = write_checkpoint(shape, folder)
        write_tiny(warm)
        rows = []
        for way in ways:
            command = [sys.executable, __file__, "--work", way, "--shape", shape, "--folder", str(folder), str(warm)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{way}: {done.stderr.strip().splitlines()[-1]}")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    counted = next(row for row in rows if "packed" in row)
    return {"shape": shape, "dense": dense, "packed": counted["packed"], "layer": counted["layer"], "rows": rows}


def write_tiny(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=4)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def table(found: dict) -> str:
    """What each way held beyond an idle process, at most and at the end."""
    head = ("way", "CPU s", "peak anonymous MiB", "× dense", "with mapped files", "× dense", "at the end, anonymous")
    body = []
    for row in found["rows"]:
        grown = {when: {name: row[when][name] - row["start"][name] for name in row[when]} for when in ("peak", "after")}
        cells = []
        for name in ("anonymous", "resident"):
            cells += [f"{grown['peak'][name] / MIB:,.0f}", f"{grown['peak'][name] / found['dense']:.2f}"]
        body.append((row["way"], f"{row['seconds']:.1f}", *cells, f"{grown['after']['anonymous'] / MIB:,.0f}"))
    return lab.markdown(head, body)


def main(argv: list[str] | None = None) -> dict | None:
    parser = argparse.ArgumentParser(description="Resident memory while a model is packed into four bits.")
    parser.add_argument("--shape", default="llama-3.2-1b", help="a built-in shape (default llama-3.2-1b)")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS, help="default: all")
    parser.add_argument("--json", metavar="FILE", help="write the numbers, with machine and versions, to FILE")
    parser.add_argument("--work", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not Path("/proc/self/status").exists():
        parser.error("this needs Linux: only /proc tells anonymous memory from mapped files")
    if args.work:
        print(json.dumps(work(args.work, args.shape, *args.folder)))
        return None
    if args.ways == ["transformers"]:
        parser.error("--ways transformers alone: add load, whose packed layers are counted")
    here = provenance() | {"load": round(os.getloadavg()[0], 1)}
    found = measure(args.shape, tuple(args.ways))
    print(f"{', '.join(f'{key} {value}' for key, value in here.items())}\n")
    print(f"{args.shape}: {found['dense'] / MIB:,.0f} MiB in bfloat16; {found['packed'] / MIB:,.0f} MiB packed, "
          f"× {found['packed'] / found['dense']:.3f}; its largest layer {found['layer'] / MIB:,.0f} MiB dense\n")
    print(table(found))
    if args.json:
        content = json.dumps({"machine": here, **found}, ensure_ascii=False)
        atomic_write(args.json, content + "\n")
    return found


if __name__ == "__main__":
    main()
