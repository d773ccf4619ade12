"""The benchmark of many adapters measures what it says, on a small run; and what is recorded keeps its order."""

import json
import sys
from pathlib import Path

import pytest
from families import scripts

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "data" / "results" / "many_adapters.json"
MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_small_run(tmp_path, capsys, monkeypatch):
    with scripts("quantize_memory", "many_adapters") as (_, bench):
        monkeypatch.setattr(bench, "KINDS", {"q,v r4": bench.KINDS["q,v r4"]})
        found = bench.main(["--counts", "3", "--capacity", "2", "--asked", "12", "--out", str(tmp_path / "out.json")])
    everything, cache = found["rows"]
    assert [row["way"] for row in found["rows"]] == ["all", "cache"]
    assert (everything["attached"], cache["attached"]) == (3, 2)
    one = 6 * 2 * 2 * 192 * 4  # six layers, q and v, A and B, on a width of 192, r = 4
    assert everything["parameters"] == one and everything["parameter_bytes"] == 3 * 4 * one
    assert cache["parameter_bytes"] == 2 * 4 * one
    assert everything["disk"] > 3 * everything["weights"] > 3 * 4 * one
    assert cache["ms_warm"] and cache["ms_cold"] and cache["ms_there"] and everything["ms_warm"] is None
    full = found["full"]
    assert full["disk"] > 4 * full["parameters"] > 12 * MIB and full["memory"]["anonymous"] > 12 * MIB
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == found["rows"]
    assert "| q,v r4 " in capsys.readouterr().out


@pytest.mark.skipif(not RECORD.exists(), reason="not recorded yet: python benchmarks/many_adapters.py")
def test_the_record_keeps_its_order():
    """Counted, not timed: adapters grow with N as their bytes say, a cache does not grow, full models are far above."""
    found = json.loads(RECORD.read_text())
    for row in found["rows"]:
        assert row["disk"] < row["n"] * found["full"]["disk"] / 10
        assert row["weights"] * row["n"] < row["disk"] < 1.2 * row["weights"] * row["n"] + 4096
        if row["way"] == "cache":
            assert row["attached"] <= found["capacity"]
            assert row["memory"]["anonymous"] < found["capacity"] * found["full"]["memory"]["anonymous"] / 4
        elif row["n"] >= 10:
            assert row["memory"]["anonymous"] >= 0.9 * row["parameter_bytes"]
    assert {"date", "commit", "hardware", "torch"} <= set(found["origin"])
