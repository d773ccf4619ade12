"""The benchmark of latency: every variant computes what it should, ratios are formed within a round."""

import json

import pytest
import torch
from families import scripts

import peftlab as pl

TINY = ["--rounds", "2", "--batches", "1", "3", "--tokens", "5", "--new", "2", "--width", "64", "--layers", "1"]
VARIANTS = ["base", "LoRA", "IA3", "Houlsby", "LoRA, merged", "LoRA, exported", "base, copied"]


@pytest.fixture
def bench():
    with scripts("step", "latency") as (_, latency):
        yield latency


def test_a_small_run(bench, tmp_path, capsys):
    out = tmp_path / "latency.json"
    rows = bench.main([*TINY, "--models", "wide", "--out", str(out)])
    assert [(r["rows"], r["phase"], r["variant"]) for r in rows] == [
        (n, phase, variant) for n in (1, 3) for phase in bench.PHASES for variant in VARIANTS
    ]
    assert all(q > 0 for row in rows for q in row["ms"])
    assert all(row["ratio"] == [1, 1, 1] for row in rows if row["variant"] == "base")
    written = json.loads(out.read_text())
    assert written["rows"] == rows
    # embedding, which is the head too; q, k, v, o; gate, up, down of 170; three norms
    size = 4096 * 64 + 4 * 64 * 64 + 3 * 64 * 170 + 3 * 64
    assert written["settings"]["models"] == {"wide": {"what": "random weights, 64 wide, 1 layers", "parameters": size}}
    assert f"{size:,} parameters" in capsys.readouterr().out


def test_ratios_are_formed_within_a_round_and_a_pass_is_one_token(bench):
    seconds = {("decode", "base"): [1.0, 2.0], ("decode", "LoRA"): [2.0, 8.0], ("prefill", "base"): [1.0, 1.0]}
    rows = bench.summarise(seconds, {"model": "base"}, {"prefill": 1, "decode": 4})
    assert [row["phase"] for row in rows] == ["prefill", "decode", "decode"]
    assert rows[2]["ratio"] == [2.5, 3.0, 3.5] and rows[2]["ms"][1] == 1250.0 and rows[2]["model"] == "base"


def test_variants_share_the_weights_of_the_base(bench):
    base, _ = bench.wide_model(64, 1)
    runs = {name: model.model.layers[0].self_attn.v_proj for name, model in bench.variants(base).items()}
    weight = runs["base"].weight
    assert runs["LoRA"].layer.weight is weight is runs["IA3"].layer.weight
    assert runs["LoRA, merged"].original.weight is weight
    assert not torch.equal(runs["LoRA, merged"].layer.weight, weight)
    assert runs["base, copied"].weight is not weight and torch.equal(runs["base, copied"].weight, weight)
    assert not any(isinstance(m, pl.Adapted) for m in base.modules()), "the base has no hosts"


@pytest.mark.parametrize("spoiled", ["merged", "adapter"])
def test_other_results_stop_it(bench, monkeypatch, tmp_path, spoiled):
    real = bench.variants

    def variants(base):
        runs = real(base)
        if spoiled == "adapter":
            return {**runs, "IA3": runs["base"]}
        with torch.no_grad():
            runs["LoRA, merged"].model.layers[0].self_attn.v_proj.layer.weight += 1
        return runs

    monkeypatch.setattr(bench, "variants", variants)
    with pytest.raises(SystemExit, match="differ by" if spoiled == "merged" else "IA3 changes nothing"):
        bench.main([*TINY, "--models", "wide", "--out", str(tmp_path / "no.json")])
    assert not (tmp_path / "no.json").exists()


def test_one_round_has_no_spread(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--rounds", "1"])
    assert "at least 2" in capsys.readouterr().err
