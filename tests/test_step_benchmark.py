"""The benchmark measures what it says: known allocations, equal counts, every variant."""

import json

import pytest
import torch
from families import script

step = script("step")


def test_peak_bytes_counts_what_lives_at_the_same_time():
    def one_after_the_other():
        for _ in range(3):
            torch.empty(2 * step.MIB, dtype=torch.uint8)

    def together():
        a = torch.empty(2 * step.MIB, dtype=torch.uint8)
        b = torch.empty(3 * step.MIB, dtype=torch.uint8)
        del a
        c = torch.empty(step.MIB, dtype=torch.uint8)
        del b, c

    assert step.peak_bytes(one_after_the_other) == 2 * step.MIB
    assert step.peak_bytes(together) == 5 * step.MIB


def test_a_small_run(tmp_path, capsys, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    monkeypatch.setattr(step, "base_model", lambda: (LlamaForCausalLM(config), "tiny"))
    rows = step.main(["--rounds", "2", "--batch", "2", "--tokens", "8", "--json", str(tmp_path / "out.json")])
    by_name = {row["variant"]: row for row in rows}
    assert list(by_name) == ["full", "peft, all linears", "ours, all linears", "peft, q,v", "ours, q,v", "floor"]
    # r (in + out) per layer: four of 32×32 and three of 32×48, in two layers
    assert by_name["ours, all linears"]["trained"] == 8 * 2 * (4 * 64 + 3 * 80)
    assert by_name["ours, q,v"]["trained"] == 8 * 2 * 2 * 64
    assert by_name["floor"]["trained"] == 0 and by_name["full"]["ratio_to_full"] is None
    assert by_name["ours, q,v"]["peak_mib"] < by_name["full"]["peak_mib"]
    out = capsys.readouterr().out
    assert all(name in out for name in by_name) and "torch" in out
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["trained"] == by_name["full"]["trained"]


def test_one_round_has_no_spread(capsys):
    with pytest.raises(SystemExit):
        step.main(["--rounds", "1"])
    assert "at least 2" in capsys.readouterr().err
