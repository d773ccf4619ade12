"""The memory benchmark measures what it says, on a tiny model; and what is recorded keeps the bound."""

import importlib.util
import json
import mmap
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("quantize_memory", ROOT / "benchmarks" / "quantize_memory.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
MIB = 2**20


@pytest.fixture
def tiny(tmp_path):
    """A config of 2 layers: 4·64² + 3·64·128 packed weights each, beside norms and 96 tied embeddings of 64."""
    entries = dict(model_type="llama", vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                   num_attention_heads=4, tie_word_embeddings=True, architectures=["LlamaForCausalLM"])  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(entries))
    return str(tmp_path / "config.json")


@linux
def test_a_small_run(tiny, tmp_path, capsys):
    found = bench.main(["--shape", tiny, "--ways", "load", "--json", str(tmp_path / "out.json")])
    weights, rest = 2 * (4 * 64**2 + 3 * 64 * 128), 96 * 64 + 5 * 64
    assert found["dense"] == 2 * (weights + rest)
    blocks = [64**2 // 64] * 4 + [64 * 128 // 64] * 3  # absmax codes of one byte, and a float32 for each 256 of them
    assert found["packed"] == weights // 2 + 2 * sum(b + 4 * -(-b // 256) for b in blocks) + 2 * rest
    assert found["layer"] == 2 * 64 * 128
    (row,) = found["rows"]
    assert row["start"]["anonymous"] > 50 * MIB, "an interpreter with torch in it"
    assert row["peak"]["anonymous"] - row["start"]["anonymous"] < 20 * MIB
    assert all(row["peak"][name] >= row["before"][name] for name in row["peak"])
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == found["rows"]
    assert "| load" in capsys.readouterr().out


@linux
def test_what_is_watched_is_memory():
    with bench.watched() as seen:
        # Pages of its own: a tensor might get some that this process freed before, and would be no growth then.
        block = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.write(b"1" * (64 * MIB))
        before, deadline = len(seen), time.monotonic() + 60
        while len(seen) < before + 2 and time.monotonic() < deadline:  # until it was looked at, however busy the cores
            time.sleep(0.01)
        block.close()
    peak = max(values["anonymous"] for _, values in seen)
    assert peak - seen[0][1]["anonymous"] > 50 * MIB
    assert seen[-1][1]["anonymous"] < peak - 50 * MIB, "freed memory of this size goes back to the system"


def test_a_checkpoint_is_written_by_shards(tiny, tmp_path, monkeypatch):
    from safetensors import safe_open

    monkeypatch.setattr(bench, "SHARD", 20_000)
    (tmp_path / "model").mkdir()
    total = bench.write_checkpoint(tiny, tmp_path / "model")
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 3
    size = 0
    for file in files:
        with safe_open(file, "pt") as f:
            size += sum(f.get_tensor(name).nbytes for name in f.keys())  # noqa: SIM118
    assert size == total


def test_the_record_keeps_the_bound():
    """Loading: never more than the packed model and one dense layer; in place: the dense model and one packed layer."""
    found = json.loads((ROOT / "data" / "results" / "quantize_memory.json").read_text())
    rows = {row["way"]: row for row in found["rows"]}
    assert found["dense"] > 2e9 and found["packed"] < 0.45 * found["dense"]
    slack = 64 * MIB  # what an allocator keeps and a 2 ms sampler cannot tell from it
    grown = {way: row["peak"]["resident"] - row["start"]["resident"] for way, row in rows.items()}
    assert grown["load"] < found["packed"] + found["layer"] + slack
    assert grown["in place"] < found["dense"] + found["layer"] + slack
    assert rows["in place"]["after"]["anonymous"] - rows["in place"]["start"]["anonymous"] < 0.6 * found["dense"]
    assert {"date", "commit", "hardware", "torch"} <= set(found["machine"])
