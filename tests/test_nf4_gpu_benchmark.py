"""The GPU benchmark, as far as a CPU can tell: it runs, counts what differs, and says so when there is no GPU."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from peftlab import nf4

pytest.importorskip("bitsandbytes")
path = Path(__file__).resolve().parent.parent / "benchmarks" / "nf4_gpu.py"
spec = importlib.util.spec_from_file_location("nf4_gpu_benchmark", path)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench, "ROWS", (1, 3))
    monkeypatch.setattr(bench, "SHAPES", ((4, 128), (3, 64)))
    monkeypatch.setattr(nf4, "BLOCKS", (32, 64))
    monkeypatch.setattr(torch, "compile", lambda f: f)


def test_a_small_run(tmp_path, capsys):
    arguments = "--device cpu --size 64 --copies 2 --rounds 2 --dtype float32 --json".split()
    result = bench.main([*arguments, str(tmp_path / "out.json")])
    operations = {row["operation"] for row in result["rows"]}
    assert operations == {"quantise", "dequantise", "forward, 1 row", "forward + backward, 1 row", "forward, 3 rows",
                          "forward + backward, 3 rows"}  # fmt: skip
    assert {row["variant"] for row in result["rows"]} == {bench.PLAIN, bench.COMPILED, bench.THEIRS}
    assert all(0 < low <= middle <= high for row in result["rows"] for low, middle, high in (row["ms"], row["ratio"]))
    printed = capsys.readouterr().out
    assert "Triton's kernels do not run here" in printed and "forward + backward, 3 rows" in printed
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == result["rows"]


def test_all_variants_compute_the_same():
    weights = [torch.randn(32, 64) for _ in range(2)]
    for operation, variants in bench.operations(weights, (1, 3), set()).items():
        if operation != "quantise":
            first, *others = (call(1) for call in variants.values())
            for other in others:
                torch.testing.assert_close(first, other)


def test_differences_are_counted(monkeypatch):
    clean = bench.differences("cpu")
    assert len(clean) == 6 and all(row[name][1] for row in clean for name in bench.COMPARED)
    assert all(row[name][0] == 0 for row in clean for name in bench.COMPARED)
    pack = nf4.pack

    def off_by_one(*arguments):
        p = pack(*arguments)
        p.codes[0] ^= 1
        return p

    monkeypatch.setattr(nf4, "pack", off_by_one)
    assert all(row["codes"][0] == 8 and row["unpacked"][0] == 0 for row in bench.differences("cpu"))


def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="no CUDA GPU"):
        bench.main([])
