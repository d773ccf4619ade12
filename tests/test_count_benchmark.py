"""The counting benchmark measures what it says, on a small shape; and what is recorded is what it prints."""

import json
from pathlib import Path

import pytest
from families import script

ROOT = Path(__file__).resolve().parent.parent
bench = script("count")


def test_a_small_run(tmp_path, capsys):
    rows = bench.main(["--rounds", "2", "--shapes", "llama-3.2-1b", "--json", str(tmp_path / "out.json")])
    assert [row["targets"] for row in rows] == list(bench.TARGETS)
    assert rows[0]["trained"] == 16 * 8 * ((2048 + 2048) + (2048 + 512))  # layers · r · (q + v)
    assert all(row["parameters"] == 1_235_814_400 + row["trained"] for row in rows)
    for row in rows:
        assert 0 < row["model_seconds"][1] < row["ours_seconds"][1], "the bare model is a part of it"
        assert row["ratio_to_peft"][0] <= row["ratio_to_peft"][1] <= row["ratio_to_peft"][2]
    assert "llama-3.2-1b" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == rows


def test_different_counts_are_no_comparison(monkeypatch):
    monkeypatch.setattr(bench, "ours", lambda shape, targets: (1, 2))
    with pytest.raises(SystemExit, match="nothing to compare"):
        bench.main(["--rounds", "2", "--shapes", "llama-3.2-1b"])


def test_one_round_has_no_spread(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--rounds", "1"])
    assert "at least 2" in capsys.readouterr().err


def test_the_record_has_a_7b_and_a_70b():
    rows = json.loads((ROOT / "data" / "results" / "count.json").read_text())["rows"]
    trained = {(row["model"], row["targets"]): row["trained"] for row in rows}
    assert trained[("llama-2-7b", "q,v")] == 4_194_304 and ("llama-3.1-70b", "all linears") in trained
    assert all(row["ours_seconds"][2] < 5 for row in rows)
