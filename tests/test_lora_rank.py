"""The rank experiment: one run for real, and what was recorded. test_laboratory.py tests how runs are planned."""

import csv

from families import script

from peftlab import lab

lora_rank = script("lora_rank")


def test_plan():
    full, *lora = lora_rank.experiment(ranks=(2, 8), steps=5).cases
    assert [case.key for case in lora] == [{"method": "LoRA", "rank": r} for r in (2, 8)]
    assert [case.settings["alpha"] for case in (full, *lora)] == ["", 4, 16]
    assert {case.settings["steps"] for case in lora} == {5}


def test_two_steps_for_real(monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    import peftlab as pl

    _, tokenizer = pl.load_base(lora_rank.DATA / "base", device="cpu")
    data = pl.tasks.load("sql")
    few = {"train": data["train"].select(range(8)), "valid": data["valid"].select(range(3))}
    splits = data["test"]["split"]
    few["test"] = data["test"].select([splits.index(name) for name in ("iid", "unseen", "phrasing")])
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=24, max_position_embeddings=256, tie_word_embeddings=True)  # fmt: skip
    base = LlamaForCausalLM(config)
    before = {name: p.clone() for name, p in base.named_parameters()}
    monkeypatch.setattr(lora_rank, "materials", lambda: (base, tokenizer, few))
    monkeypatch.setattr(lora_rank, "BATCH", 4)
    cases = lora_rank.experiment(ranks=[2], steps=2).cases
    rows = {case.key["rank"]: lora_rank.execute(lab.Run(case, 1e-3, 0)) for case in cases}
    # r (in + out) on q, k, v, o of 16×16 and three of 16×24
    assert int(rows[2]["parameters"]) == 2 * (4 * 32 + 3 * 40)
    assert int(rows[0]["parameters"]) == sum(p.numel() for p in base.parameters())
    for row in rows.values():
        assert set(row) == set(lora_rank.MEASURED + lab.ORIGIN)
        assert float(row["train_loss"]) == float(row["early_loss"]) > 0 and row["torch"]
    assert all((p == before[name]).all() for name, p in base.named_parameters()), "a run changed the shared base"


def test_recorded_rows_are_complete_and_of_this_base_model():
    """Another base model or task in data/ makes the recorded figure out of date: run the experiment again."""
    rows = lab.rows_of(lora_rank.OUT, lora_rank.experiment().columns)
    ranks = sorted({int(row["rank"]) for row in rows} - {0})
    assert {*lora_rank.RANKS} <= {*ranks}
    assert lab.left(rows, lora_rank.experiment(ranks)) == 0
    with lora_rank.OUT.open(newline="") as f:
        origins = [[row[c] for c in ("date", "commit", "hardware", "torch")] for row in csv.DictReader(f)]
    assert all(all(values) for values in origins)
