"""The benchmark of mixed batches: every variant does the same, or nothing is timed."""

import json

import pytest
import torch
from families import scripts

TINY = ["--rounds", "2", "--rows", "4", "--tokens", "5", "--new", "2"]


@pytest.fixture
def bench(monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=48, initializer_range=0.2, max_position_embeddings=64)  # fmt: skip
    with scripts("step", "serve") as (_, serve):
        monkeypatch.setattr(serve, "base_model", lambda: (LlamaForCausalLM(config), "tiny"))
        yield serve


def test_a_small_run(bench, tmp_path, capsys):
    out = tmp_path / "serve.json"
    rows = bench.main([*TINY, "--adapters", "1", "3", "--out", str(out)])
    found = {(row["adapters"], row["phase"], row["variant"]) for row in rows}
    timed = {"plain", "ours", "ours, steady", "peft", "one by one"}
    assert found == {(n, phase, v) for n in (1, 3) for phase in bench.PHASES for v in timed} | {
        (n, "generate", "serve") for n in (1, 3)
    }
    for row in rows:
        assert row["difference"] <= bench.CLOSE and all(q > 0 for q in row["ms"])
        tokens = 4 * 5 if row["phase"] == "prefill" else 4 * 2
        assert row["tokens_per_s"] == pytest.approx(1000 * tokens / row["ms"][1])
        if row["variant"] == "peft":
            assert row["speed_to_peft"] == [1, 1, 1]
        if row["variant"] == "plain":
            assert row["speed_to_plain"] == [1, 1, 1]
    written = json.loads(out.read_text())
    assert written["rows"] == rows and written["settings"]["rows"] == 4 and "torch" in written["machine"]
    printed = capsys.readouterr().out
    assert "one by one" in printed and "4 rows" in printed


def test_speeds_are_formed_within_a_round(bench):
    seconds = {("decode", "peft"): [2.0, 8.0], ("decode", "ours"): [1.0, 2.0], ("decode", "plain"): [1.0, 1.0]}
    row = next(r for r in bench.summarise(seconds, 4, 0.0, {"decode": 30}) if r["variant"] == "ours")
    assert row["speed_to_peft"] == [2.5, 3.0, 3.5] and row["speed_to_plain"] == [0.625, 0.75, 0.875]
    assert row["tokens_per_s"] == 20


@pytest.mark.parametrize("spoiled", ["logits", "tokens"])
def test_other_results_stop_it(bench, monkeypatch, tmp_path, spoiled):
    """peft's adapters are moved a little: a script that compared nothing would go on."""
    real = bench.models

    def models(base, adapters):
        ours, theirs, names = real(base, adapters)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "lora_B" in name:
                    parameter += 1.0
        return ours, theirs, names

    monkeypatch.setattr(bench, "models", models)
    if spoiled == "tokens":
        monkeypatch.setattr(bench, "CLOSE", 1e9)
    with pytest.raises(SystemExit, match="differs by" if spoiled == "logits" else "other tokens"):
        bench.main([*TINY, "--adapters", "2", "--out", str(tmp_path / "no.json")])
    assert not (tmp_path / "no.json").exists()


@pytest.mark.parametrize("wrong", [["--rounds", "1"], ["--adapters", "5"], ["--adapters", "0"]])
def test_wrong_settings_are_refused(bench, wrong, capsys):
    with pytest.raises(SystemExit):
        bench.main([*TINY, *wrong])
    assert "must be" in capsys.readouterr().err
