"""One base and N users' adapters against N full models: disk, memory, and the time until one is ready to run.

    OMP_NUM_THREADS=1 python benchmarks/many_adapters.py       # writes data/results/many_adapters.json, in ten minutes

Adapters have random values: LoRA r = 8 on all linear layers, or r = 4 on q and v, on the embedded base. Each case runs
in a process of its own: "all" attaches every adapter of the store, "cache" has room for 16 and is asked for adapters in
random order. Memory is what the process holds beyond the base alone. Of the full models one is measured, its file and a
further copy in memory; N of them are that times N. Linux only: /proc tells memory, and posix_fadvise empties the file
cache for "cold".
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from quantize_memory import MIB, memory  # beside this file

from peftlab import lab
from peftlab.paths import DATA, atomic_write
from peftlab.provenance import provenance

OUT, COUNTS, CAPACITY, ASKED = DATA / "results" / "many_adapters.json", (1, 10, 100, 1000), 16, 200
KINDS = {"all-linear r8": {"targets": "all-linear", "r": 8}, "q,v r4": {"targets": "q_proj|v_proj", "r": 4}}


def base():
    """The embedded base, whatever the environment names."""
    import peftlab as pl
    from peftlab.base import EMBEDDED

    return pl.load_base(EMBEDDED, device="cpu")[0]


# --- the parts that run in a process of their own -------------------------------------------------------------------


def make(folder: str, kind: str, count: int) -> dict:
    """A store with `count` adapters of random values."""
    import torch

    import peftlab as pl
    from peftlab.store import Store

    model, store = pl.attach(base(), pl.LoRA, name="made", **KINDS[kind]), Store(folder)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(count):
            torch.manual_seed(number)
            for adapter in pl.adapters(model)["made"].values():
                for parameter in adapter.parameters():
                    torch.nn.init.normal_(parameter, std=0.02)
            store.add(f"user{number}", pl.save_adapter(model, temporary, "made"))
    seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    one = store.info("user0")
    return {"disk": size, "index": (Path(folder) / "index.json").stat().st_size, "weights": one.bytes,
            "parameters": one.parameters, "ms_to_add": 1000 * seconds / count}  # fmt: skip


def forget(folder: Path) -> None:
    """Drop a folder's files from the system's file cache."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def timed(action) -> float:
    started = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - started)


def attach(folder: str, capacity: int, asked: int) -> dict:
    """Attach adapters of the store until `capacity` are there, then ask for random ones; times in milliseconds.

    Cold: from a file that the system has to read again; warm: from its file cache; there: attached already.
    """
    from peftlab.store import Store

    model, store = base(), Store(folder)
    before = memory()
    opened = timed(lambda: store.names())
    names, cache, draw = store.names(), store.cache(model, capacity), random.Random(0)
    filled = [timed(lambda name=name: cache.need(name)) for name in names[:capacity]]
    found: dict[str, list[float]] = {"cold": [], "warm": [], "there": []}
    for number in range(asked):
        name = draw.choice(names)
        kind = "there" if name in cache else ("cold", "warm")[number % 2]
        if kind != "there":
            (forget if kind == "cold" else (lambda p: [f.read_bytes() for f in p.iterdir()]))(store.path(name))
        found[kind].append(timed(lambda name=name: cache.need(name)))
    after = memory()
    return {
        "attached": len(cache), "parameter_bytes": cache.bytes, "ms_to_open": opened, "ms_filled": spread(filled),
        "ms_last_filled": spread(filled[-10:]), **{f"ms_{kind}": spread(times) for kind, times in found.items()},
        "memory": {name: after[name] - before[name] for name in after},
    }  # fmt: skip


def full(folder: str) -> dict:
    """One full model beside the base: its file, its memory, the time to load it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = base()
    model.save_pretrained(folder)
    seen, before = [], memory()
    for _ in range(3):  # several, since the first also pays for what a process does once
        seen.append(AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval())
        for parameter in seen[-1].parameters():
            parameter.data = parameter.data.clone()  # in memory of its own, not mapped from the file
    after = memory()
    times = [timed(lambda: AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)) for _ in range(5)]
    size = sum(file.stat().st_size for file in Path(folder).iterdir())
    return {"disk": size, "parameters": sum(p.numel() for p in model.parameters()), "ms_warm": spread(times),
            "memory": {name: (after[name] - before[name]) // 3 for name in after}}  # fmt: skip


def spread(times: Sequence[float]) -> list[float] | None:
    """[median, first quartile, third quartile]; None for fewer than two."""
    if len(times) < 2:
        return [times[0]] * 3 if times else None
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return [round(value, 4) for value in (middle, low, high)]


# --- all of them ----------------------------------------------------------------------------------------------------


def apart(part: str, *arguments: object) -> dict:
    """The result of one part, run in a fresh process."""
    command = [sys.executable, __file__, "--part", part, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{part} {arguments}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(counts: Sequence[int], capacity: int, asked: int) -> dict:
    rows = []
    with tempfile.TemporaryDirectory(prefix="many_adapters_") as temporary:
        one = apart("full", Path(temporary) / "full")
        print(json.dumps({"full": one}), flush=True)
        for kind in KINDS:
            for count in counts:
                folder = Path(temporary) / f"{list(KINDS).index(kind)}_{count}"
                made = apart("make", folder, kind, count)
                for way, room in {"all": count, "cache": min(count, capacity)}.items():
                    found = apart("attach", folder, room, asked)
                    rows.append({"kind": kind, "n": count, "way": way, **made, **found})
                    print(json.dumps(rows[-1]), flush=True)
    return {"capacity": capacity, "asked": asked, "full": one, "rows": rows}


def table(found: dict) -> str:
    head = ("adapters", "N", "disk MiB", "full models", "memory MiB, all attached", f"cache of {found['capacity']}",
            "full models", "ms ready: cold", "warm", "there")  # fmt: skip
    by_way = {(row["kind"], row["n"], row["way"]): row for row in found["rows"]}
    body = []
    for kind, count in dict.fromkeys((row["kind"], row["n"]) for row in found["rows"]):
        everything, cache = by_way[kind, count, "all"], by_way[kind, count, "cache"]
        mib = [f"{row['memory']['anonymous'] / MIB:,.1f}" for row in (everything, cache)]
        times = ["–" if t is None else f"{t[0]:,.3f}" for t in (cache["ms_cold"], cache["ms_warm"], cache["ms_there"])]
        body.append((kind, f"{count:,}", f"{everything['disk'] / MIB:,.1f}",
                     f"{count * found['full']['disk'] / MIB:,.0f}", *mib,
                     f"{count * found['full']['memory']['anonymous'] / MIB:,.0f}", *times))  # fmt: skip
    return lab.markdown(head, body)


def main(argv: Sequence[str] | None = None) -> dict | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file to write")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, metavar="N", help="default: 1 10 100 1000")
    parser.add_argument("--capacity", type=int, default=CAPACITY, help=f"of the cache (default: {CAPACITY})")
    parser.add_argument("--asked", type=int, default=ASKED, help=f"adapters asked for at random (default: {ASKED})")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not Path("/proc/self/status").exists():
        parser.error("this needs Linux: /proc tells memory")
    if args.part:
        part, folder, *rest = args.part
        numbers = [int(value) if value.isdigit() else value for value in rest]
        print(json.dumps({"make": make, "attach": attach, "full": full}[part](folder, *numbers)))
        return None
    here = provenance() | {"load": round(os.getloadavg()[0], 1)}
    found = measure(args.counts, args.capacity, args.asked)
    print(f"{', '.join(f'{key} {value}' for key, value in here.items())}\n")
    print(table(found))
    atomic_write(args.out, json.dumps({**found, "origin": here}, indent=1, ensure_ascii=False) + "\n")
    return found


if __name__ == "__main__":
    main()
