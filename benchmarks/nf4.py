"""NF4 on a CPU, side by side in one process: packing, unpacking and the frozen linear layer, ours and bitsandbytes'.

    python benchmarks/nf4.py [--rounds 12] [--rows 1 64 1024] [--threads 1] [--clock wall|cpu] [--json FILE]

A 4096 × 4096 matrix in float32, blocks of 64, double quantisation. bitsandbytes is C++ but for packing, ours is tensor
code. Its layer computes in float32 where a gradient is needed or in train mode; in eval mode, on a CPU with
AVX512-BF16, it packs its weights another way and computes in bfloat16: rows of their own, whose numbers are other ones.
Both take turns in random order; ratios are formed within a round. Memory is measured apart from time. The script stops
where the two do not give the same bits.
"""

from __future__ import annotations

import copy
import gc
import logging
import random
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

sys.path.insert(0, str(Path(__file__).resolve().parent))
from step import MIB, peak_bytes  # noqa: E402  # the benchmark beside this file

from peftlab import lab  # noqa: E402

WORKS = {"ours": "ours", "theirs": "bitsandbytes"}
ENOUGH = 1.5  # seconds: after that much, and three rounds, a work has been timed often enough


class Work(NamedTuple):
    """The same work done by both; what it gives is compared before anything is timed."""

    name: str
    ours: Callable[[], torch.Tensor]
    theirs: Callable[[], torch.Tensor]
    error: float = 0.0  # by which the results may differ, relative to their norm


def works(size: int, rows: list[int]) -> list[Work]:
    import bitsandbytes
    import bitsandbytes.functional as theirs

    from peftlab import NF4Linear, nf4

    generator = torch.Generator().manual_seed(0)
    W = 0.02 * torch.randn(size, size, generator=generator)
    packed = nf4.pack(W)
    codes, state = theirs.quantize_4bit(W, quant_type="nf4", compress_statistics=True)
    for part in zip((*packed[:2], packed.nested_absmax), (codes, state.absmax, state.state2.absmax), strict=True):
        if not torch.equal(*part):
            raise SystemExit("the two pack to other bits: nothing to compare")
    ours, layer = NF4Linear.of(packed), bitsandbytes.nn.Linear4bit(size, size, bias=False, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(W, requires_grad=False, quant_type="nf4", compress_statistics=True)
    layer = layer.to("cpu").train()
    out = [
        Work("quantise", lambda: nf4.pack(W).codes,
             lambda: theirs.quantize_4bit(W, quant_type="nf4", compress_statistics=True)[0]),
        Work("dequantise", lambda: nf4.unpack(packed), lambda: theirs.dequantize_4bit(codes, state)),
    ]  # fmt: skip
    fast = copy.deepcopy(layer).eval()
    bf16 = fast.support_avx512bf16_for_cpu
    for n in rows:
        x, gy = torch.randn(2, n, size, generator=generator)
        out.append(Work(f"linear, {counted(n)}", forward(ours, x), forward(layer, x), 1e-5))
        if bf16:
            out.append(Work(f"linear, {counted(n)}; theirs bf16", forward(ours, x), forward(fast, x), 2e-2))
        out.append(Work(f"forward + backward, {counted(n)}", both(ours, x, gy), both(layer, x, gy), 1e-5))
    return out


def counted(n: int) -> str:
    return f"{n} row" + "s" * (n != 1)


def forward(layer: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    def work() -> torch.Tensor:
        with torch.no_grad():
            return layer(x)

    return work


def both(layer: torch.nn.Module, x: torch.Tensor, gy: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The gradient of the input, by a forward and a backward pass."""

    def work() -> torch.Tensor:
        leaf = x.detach().requires_grad_()
        layer(leaf).backward(gy)
        return leaf.grad

    return work


def peak(work: Callable[[], torch.Tensor]) -> int:
    """Bytes that a work takes at most, its result included: from torch's allocator, and from numpy's, where ours gets
    room for dense weights. The two peaks are added, so it may be less."""
    tracemalloc.start()
    try:
        ours = peak_bytes(work)
        tracemalloc.reset_peak()
        start = tracemalloc.get_traced_memory()[0]
        work()
        return ours + max(0, tracemalloc.get_traced_memory()[1] - start)
    finally:
        tracemalloc.stop()


def page_faults() -> int:
    """Pages of memory that this process was given so far; 0 where the system does not say."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource else 0


def measure(work: Work, rounds: int, clock: Callable[[], float]) -> dict:
    results = [getattr(work, who)().float() for who in WORKS]
    error = float((results[0] - results[1]).norm() / results[1].norm().clamp(min=1e-30))
    if error > work.error:
        raise SystemExit(f"{work.name}: results differ by {error:.1e} of their norm: nothing to compare")
    del results
    seconds: dict[str, list[float]] = {who: [] for who in WORKS}
    faults: dict[str, list[int]] = {who: [] for who in WORKS}
    draw, began = random.Random(0), time.perf_counter()
    while len(seconds["ours"]) < rounds and (len(seconds["ours"]) < 3 or time.perf_counter() - began < ENOUGH):
        gc.collect()
        for who in draw.sample(list(WORKS), len(WORKS)):
            before, start = page_faults(), clock()
            result = getattr(work, who)()
            seconds[who].append(clock() - start)
            faults[who].append(page_faults() - before)
            del result
    ratio = lab.ratios(seconds["ours"], seconds["theirs"])
    return {
        "work": work.name, "rounds": len(seconds["ours"]), "ratio": ratio, "error": error,
        **{f"{who}_ms": [1000 * q for q in lab.quartiles(times)] for who, times in seconds.items()},
        **{f"{who}_faults": statistics.median(counts) for who, counts in faults.items()},
        **{f"{who}_peak_mib": peak(getattr(work, who)) / MIB for who in WORKS},
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    head = ("work", "bitsandbytes ms (IQR)", "ours ms (IQR)", "ours / bitsandbytes", "its peak MiB", "our peak MiB",
            "its page faults", "our page faults", "difference")  # fmt: skip
    body = [
        (row["work"], lab.spread(row["theirs_ms"], 1), lab.spread(row["ours_ms"], 1), lab.spread(row["ratio"], 2),
         f"{row['theirs_peak_mib']:.1f}", f"{row['ours_peak_mib']:.1f}",
         f"{row['theirs_faults']:,.0f}", f"{row['ours_faults']:,.0f}", f"{row['error']:.0e}" if row["error"] else "0")
        for row in rows
    ]  # fmt: skip
    return lab.markdown(head, body)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = lab.timing_options("Time and memory of NF4 on a CPU, ours beside bitsandbytes.", rounds=12)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the matrix (default 4096)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 1024], help="of the layer's input")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a package that it could fetch kernels with

    here = lab.machine() | {"bitsandbytes": metadata.version("bitsandbytes")}
    rows = [measure(work, args.rounds, lab.CLOCKS[args.clock]) for work in works(args.size, args.rows)]
    words = f"{args.size} × {args.size}, float32, {args.rounds} rounds at most, {args.clock} clock"
    settings = {"size": args.size, "rounds": args.rounds, "clock": args.clock}
    lab.report(words, here, table(rows), rows, settings, args.out)
    return rows


if __name__ == "__main__":
    main()
