"""NF4 on a GPU, side by side in one process: our Triton kernels, our plain tensor code, torch.compile, bitsandbytes.

    python benchmarks/nf4_gpu.py [--rounds 30] [--size 4096] [--dtype bfloat16] [--json data/results/nf4_gpu.json]

Quantise and dequantise a matrix, and a linear layer of it forward and forward + backward for 1, 64 and 1024 rows of x,
double quantisation throughout. Before that, codes, scales and unpacked weights are compared with those of bitsandbytes'
CUDA kernels, and what differs is counted. Needs an NVIDIA GPU, with Triton; `--device cpu --size 256` tries the script.

Calls are timed with CUDA events, a whole round of them between two events: each of --copies matrices once, together
more than the GPU's cache holds, as the layers of a model are. Variants take turns in random order; ratios are formed
within a round. Where calls are short, what is timed is how fast Python starts them: that too is what a model waits for.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from peftlab import NF4Linear, lab, nf4, nf4_fast
from peftlab.paths import atomic_write
from peftlab.provenance import provenance

RESULT = Path(__file__).resolve().parent.parent / "data" / "results" / "nf4_gpu.json"
KERNELS, PLAIN, COMPILED, THEIRS = "ours, Triton", "ours, plain", "ours, torch.compile", "bitsandbytes"
ROWS = (1, 64, 1024)
SHAPES = ((1024, 1024), (257, 96), (33, 77), (1, 1))  # whole blocks; a last block, and a last byte, that are not full
COMPARED = ("codes", "absmax", "absmax codes", "nested absmax", "mean", "unpacked")
MIB = 2**20
Call = Callable[[int], object]  # of the number of a copy


# --- the same bits? -------------------------------------------------------------------------------------------------


def differences(device: str) -> list[dict]:
    """(different, compared) of what ours and bitsandbytes store, for each kind and dtype: all shapes and blocks, with
    double quantisation and without; "unpacked" is what both make of its codes and scales."""
    import bitsandbytes.functional as bnb

    torch.manual_seed(0)
    rows = []
    for kind, dtype in itertools.product(("nf4", "fp4"), nf4.FLOATS):
        row = {"kind": kind, "dtype": str(dtype).removeprefix("torch."), **{name: (0, 0) for name in COMPARED}}
        for shape, block, double in itertools.product(SHAPES, nf4.BLOCKS, (True, False)):
            W = torch.randn(shape, device=device, dtype=dtype)
            p = nf4.pack(W, block, kind, double)
            codes, state = bnb.quantize_4bit(W, None, None, block, double, kind)
            theirs = p._replace(codes=codes, absmax=state.absmax)
            if double:
                theirs = theirs._replace(nested_absmax=state.state2.absmax, offset=state.offset)
            compared = {"codes": (p.codes, codes), "absmax codes" if double else "absmax": (p.absmax, state.absmax)}
            if double:
                compared |= {"nested absmax": (p.nested_absmax, state.state2.absmax), "mean": (p.offset, state.offset)}
            compared["unpacked"] = nf4.unpack(theirs), bnb.dequantize_4bit(codes, state)
            for name, (a, b) in compared.items():
                different, total = row[name]
                row[name] = different + int((a.flatten() != b.flatten()).sum()), total + a.numel()
        rows.append(row)
    return rows


def difference_table(rows: list[dict]) -> str:
    body = [(row["kind"], row["dtype"], *("{:,} of {:,}".format(*row[name]) for name in COMPARED)) for row in rows]
    return lab.markdown(("different:", "weights", *COMPARED), body)


# --- what is timed --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def triton_on(devices: set[str]) -> Iterator[None]:
    before, nf4_fast.TRITON = nf4_fast.TRITON, devices
    try:
        yield
    finally:
        nf4_fast.TRITON = before


def within(devices: set[str], call: Call) -> Call:
    """A call during which our kernels are used on these devices alone."""

    def run(i: int) -> object:
        with triton_on(devices):
            return call(i)

    return run


def their_layer(W: Tensor) -> nn.Module:
    """bitsandbytes' Linear4bit with these weights, which it packs on their device."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(W.shape[1], W.shape[0], bias=False, compute_dtype=W.dtype, device="meta")
    layer.weight = bnb.nn.Params4bit(W.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    return layer.to(W.device)


def forward(layers: list[nn.Module], x: Tensor, i: int) -> Tensor:
    with torch.no_grad():
        return layers[i](x)


def forward_backward(layers: list[nn.Module], x: Tensor, g: Tensor, i: int) -> Tensor:
    return torch.autograd.grad(layers[i](x), x, g)[0]


def operations(weights: list[Tensor], rows: tuple[int, ...], kernels: set[str]) -> dict[str, dict[str, Call]]:
    """What is timed: operation -> variant -> call. kernels: the devices on which ours use Triton, where they do."""
    import bitsandbytes.functional as bnb

    out_features, in_features = weights[0].shape
    packed = [nf4.pack(W) for W in weights]
    theirs = [bnb.quantize_4bit(W, compress_statistics=True, quant_type="nf4") for W in weights]
    ours_layers = [NF4Linear.of(p) for p in packed]
    their_layers = [their_layer(W) for W in weights]
    compiled, compiled_layers = torch.compile(nf4.unpack), [torch.compile(layer) for layer in ours_layers]

    table: dict[str, dict[str, Call]] = {
        "quantise": {
            PLAIN: lambda i: nf4.pack(weights[i]),
            THEIRS: lambda i: bnb.quantize_4bit(weights[i], compress_statistics=True, quant_type="nf4"),
        },
        "dequantise": {
            KERNELS: within(kernels, lambda i: nf4.unpack(packed[i])),
            PLAIN: within(set(), lambda i: nf4.unpack(packed[i])),
            COMPILED: lambda i: compiled(packed[i]),
            THEIRS: lambda i: bnb.dequantize_4bit(*theirs[i]),
        },
    }
    for n in rows:
        x = torch.randn(n, in_features, dtype=weights[0].dtype, device=weights[0].device)
        z, g = x.clone().requires_grad_(), x.new_ones(n, out_features)
        for name, arguments in (("forward", (x,)), ("forward + backward", (z, g))):
            call = forward if name == "forward" else forward_backward
            table[f"{name}, {n} row{'s' if n > 1 else ''}"] = {
                KERNELS: within(kernels, functools.partial(call, ours_layers, *arguments)),
                PLAIN: within(set(), functools.partial(call, ours_layers, *arguments)),
                COMPILED: within(kernels, functools.partial(call, compiled_layers, *arguments)),
                THEIRS: functools.partial(call, their_layers, *arguments),
            }
    if not kernels:
        for variants in table.values():
            variants.pop(KERNELS, None)
    return table


# --- timing ---------------------------------------------------------------------------------------------------------


def seconds(call: Call, copies: int, device: str) -> float:
    """Of one call, on average over the copies."""
    if device != "cuda":
        start = time.perf_counter()
        for i in range(copies):
            call(i)
        return (time.perf_counter() - start) / copies
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    for i in range(copies):
        call(i)
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000 / copies


def extra_bytes(call: Call, device: str) -> int | None:
    """The most that torch's allocator held during a call above what it held before."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(variants: dict[str, Call], copies: int, rounds: int, device: str) -> dict[str, dict]:
    """Variant -> ms, ratio to bitsandbytes within a round (quartiles), and extra MiB."""
    for call in variants.values():  # kernels are compiled, tables made
        for i in range(copies):
            call(i)
    peaks = {name: extra_bytes(call, device) for name, call in variants.items()}
    found = lab.take_turns(variants, rounds, lambda call: seconds(call, copies, device))
    return {
        name: {
            "ms": lab.quartiles([1000 * s for s in found[name]]),
            "ratio": lab.ratios(found[name], found[THEIRS]),
            "extra_mib": None if peaks[name] is None else peaks[name] / MIB,
        }
        for name in variants
    }


def table(rows: list[dict]) -> str:
    head = ("operation", "variant", "ms (IQR)", "× bitsandbytes (IQR)", "extra MiB")
    body = [(row["operation"], row["variant"], lab.spread(row["ms"], 3),
             "–" if row["variant"] == THEIRS else lab.spread(row["ratio"], 3),
             "–" if row["extra_mib"] is None else f"{row['extra_mib']:.1f}") for row in rows]  # fmt: skip
    return lab.markdown(head, body)


def machine(device: str) -> dict:
    here = {**provenance(), "bitsandbytes": metadata.version("bitsandbytes")}
    with contextlib.suppress(metadata.PackageNotFoundError):
        here["triton"] = metadata.version("triton")
    if device == "cuda":
        here["cuda"] = torch.version.cuda
    return here


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description="NF4 on a GPU: ours beside bitsandbytes' CUDA kernels.")
    parser.add_argument("--rounds", type=int, default=30, help="rounds that are timed (default 30)")
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of a matrix (default 4096)")
    parser.add_argument("--copies", type=int, default=16, help="matrices that take turns (default 16)")
    parser.add_argument("--dtype", choices=[str(t).removeprefix("torch.") for t in nf4.FLOATS], default="bfloat16",
                        help="of the weights and of x (default bfloat16)")  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries the script out")
    parser.add_argument("--json", metavar="FILE", help=f"the numbers (default, on a GPU: data/results/{RESULT.name})")
    args = parser.parse_args(argv)
    if args.rounds < 2 or args.copies < 1 or args.size < 1:
        parser.error("--rounds must be at least 2 (one has no spread), --copies and --size at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU that torch can use is here, so nothing was measured; the CPU's table is "
                         "benchmarks/nf4.py, and --device cpu --size 256 --rounds 2 tries this script out")  # fmt: skip
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    weights = [torch.randn(args.size, args.size, device=args.device).to(dtype) for _ in range(args.copies)]
    kernels = {args.device} if nf4_fast.kernels(nf4.pack(weights[0])) else set()
    here = machine(args.device)
    print(f"{args.size} × {args.size}, {args.dtype}, {args.copies} copies, {args.rounds} rounds; "
          + ", ".join(f"{key} {value}" for key, value in here.items()) + "\n")  # fmt: skip
    if not kernels:
        print("Triton's kernels do not run here, so they are not in the table.\n")

    checks = differences(args.device)
    print(difference_table(checks) + "\n", flush=True)
    rows = []
    for operation, variants in operations(weights, ROWS, kernels).items():
        found = measure(variants, args.copies, args.rounds, args.device)
        rows += [{"operation": operation, "variant": name, **values} for name, values in found.items()]
    print(table(rows))

    result = {
        "settings": {key: value for key, value in vars(args).items() if key != "json"},
        "machine": here, "differences": checks, "rows": rows,
    }  # fmt: skip
    file = args.json or (RESULT if args.device == "cuda" else None)
    if file:
        atomic_write(file, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"\nwritten to {file}")
    return result


if __name__ == "__main__":
    main()
