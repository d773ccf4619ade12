"""The experiment on 4-bit bases: its plan, one run for real on a tiny model, and what was recorded."""


import pytest
import torch
from families import scripts, tiny_experiment

import peftlab as pl
from peftlab import lab


@pytest.fixture(scope="module")
def files():
    """(classic, qlora), own copies."""
    with scripts("classic", "qlora") as modules:
        yield modules


@pytest.fixture
def tiny(files, monkeypatch):
    """(qlora, a tiny Llama with the course's words), and few rows of each task."""
    classic, qlora = files
    model = tiny_experiment(monkeypatch, classic, hidden_size=32, num_hidden_layers=2, intermediate_size=64)
    for cached in (qlora.batches, qlora.untrained):
        cached.cache_clear()
    yield qlora, model
    for cached in (qlora.batches, qlora.untrained):
        cached.cache_clear()


def test_plan(files):
    classic, qlora = files
    cases = qlora.experiment().cases
    assert len(cases) == len({str(case) for case in cases}) == 3 * len(qlora.METHODS)
    assert {case.grid for case in cases} == {qlora.GRID} and len(qlora.GRID) >= 4, "the same rates for all"
    middle = classic.LADDER.index(classic.METHODS["LoRA"].rate)
    assert set(qlora.GRID) == set(classic.LADDER[middle - 2 : middle + 2])
    for case in cases:
        assert case.settings["steps"] == classic.STEPS[case.key["task"]], "the budgets of classic.py"


def test_the_methods_differ_in_the_base_alone(tiny):
    qlora, _ = tiny
    models = {name: qlora.prepared(name, seed=3) for name in qlora.METHODS}
    bits = {name: round(qlora.bits(model), 3) for name, model in models.items()}
    nf4 = 4 + 8 / 64 + 32 * 2 / (32 * 32)  # the smallest layers have 16 blocks, so one scale more a layer
    assert bits["LoRA"] == 32 and bits["QLoRA INT4"] == 4.5 and 4.1 < bits["QLoRA"] == bits["LoftQ"] < nf4
    plain = pl.adapters(models["LoRA"])["task"]
    for name, model in models.items():
        for path, adapter in pl.adapters(model)["task"].items():
            filled = name == "LoftQ"
            assert torch.equal(adapter.lora_A, plain[path].lora_A) != filled
            assert bool(adapter.lora_B.any()) == filled


def test_merged_into_the_original_is_the_adapter_on_the_original(tiny):
    qlora, base = tiny
    model = qlora.prepared("QLoRA")
    for adapter in pl.adapters(model)["task"].values():
        torch.nn.init.normal_(adapter.lora_B)
    merged, trained = pl.merge(qlora.on_original(model)), pl.adapters(model)["task"]
    for path, host in pl.hosts(merged).items():
        A, B, s = trained[path].factors()
        torch.testing.assert_close(host.layer.weight, base.get_submodule(path).weight + s * B @ A, rtol=1e-5, atol=1e-6)


def test_dense_says_what_the_packed_model_says(tiny):
    qlora, _ = tiny
    model = qlora.prepared("QLoRA INT4")
    packed, loss = qlora.logits(model, "voices"), qlora.loss(model, "voices")
    qlora.dense(model)
    assert all(type(host.layer) is torch.nn.Linear for host in pl.hosts(model).values())
    torch.testing.assert_close(qlora.logits(model, "voices"), packed, rtol=1e-5, atol=1e-6)
    assert qlora.loss(model, "voices") == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("task, name", [("voices", "LoRA"), ("sql", "QLoRA"), ("reviews", "LoftQ")])
def test_two_steps_for_real(tiny, task, name):
    qlora, base = tiny
    before = {key: p.clone() for key, p in base.named_parameters()}
    (case,) = qlora.experiment([task], [name], steps=2).cases
    row = qlora.execute(lab.Run(case, 1e-2, 0))
    assert set(row) == {*qlora.MEASURED, *lab.ORIGIN}
    errors = {what: float(row[f"{what}_error"]) for what in ("merged", "requantised", "original")}
    assert errors["merged"] < 1e-4 < errors["requantised"], "float32 rounding, and 4 bits"
    assert (errors["original"] < 1e-4) == (name == "LoRA")
    assert float(row["valid_loss"]) != float(row["untrained_loss"]) and float(row["untrained_loss"]) > 0
    assert all((p == before[key]).all() for key, p in base.named_parameters()), "a run changed the shared base"


def test_recorded_rows_are_complete_and_of_this_base_model(files):
    """Another base model or task in data/ makes the record out of date: run the experiment again."""
    _, qlora = files
    rows, plan = lab.rows_of(qlora.OUT, qlora.experiment().columns), qlora.experiment()
    assert lab.left(rows, plan) == 0 and len(lab.made(qlora.OUT, plan)) == len(rows), "rows of other settings"
    assert all(row[column] for row in rows for column in ("date", "commit", "hardware", "torch"))
    found = lab.summary(lab.read("qlora"), ["task", "method"])
    assert len(found) == len(plan.cases) and (found.seeds == 3).all() and (found.rates >= 4).all()
