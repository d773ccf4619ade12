"""The experiment on the whole field: who takes part, runs for real on a tiny model, and what was recorded."""

import importlib
import sys
from pathlib import Path

import pytest
from families import tiny_experiment

import peftlab as pl
from peftlab import lab
from peftlab.inits import INITS
from peftlab.optim import OPTIMIZERS

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
field = importlib.import_module("field")
classic = field.classic


@pytest.fixture
def tiny(monkeypatch):
    """A tiny Llama with the course's words, and few rows of each task."""
    monkeypatch.setitem(classic.METHODS, "LoRA", classic.METHODS["LoRA"]._replace(hyper={"r": 2, "alpha": 4}))
    return tiny_experiment(monkeypatch, classic, hidden_size=48, num_hidden_layers=6, intermediate_size=24)


def test_everyone_takes_part_or_it_is_said_why_not():
    there = field.entrants()
    assert set(classic.everyone()) <= set(there)
    assert set(INITS) | set(OPTIMIZERS) | set(classic.everyone()) == set(there) | set(field.LEFT_OUT)
    assert not set(there) & set(field.LEFT_OUT) and set(field.HYPER) <= set(there)
    assert all(len(reason.split()) >= 3 for reason in field.LEFT_OUT.values())
    kinds = {name: entrant.kind for name, entrant in there.items()}
    assert kinds["pissa"] == "initialisation" and kinds["galore"] == "optimizer" and kinds["OFT"] == "method"


def test_one_budget_for_all_and_a_grid_of_three_rates():
    cases = field.experiment().cases
    assert len(cases) == len(field.entrants()) == len({str(case) for case in cases})
    assert {(case.settings["steps"], case.settings["batch_size"]) for case in cases} == {(field.STEPS, field.BATCH)}
    assert all(len(case.grid) == 3 and set(case.grid) < set(case.ladder) for case in cases)


@pytest.mark.parametrize("name", ["DoRA", "pissa", "eva", "lora_plus", "galore"])
def test_two_steps_for_real(tiny, name):
    before = {key: p.clone() for key, p in tiny.named_parameters()}
    (case,) = field.experiment([name], steps=2).cases
    row = field.execute(lab.Run(case, 1e-3, 0))
    assert set(row) == {*classic.MEASURED, *lab.ORIGIN}
    assert float(row["train_loss"]) > 0 and int(row["parameters"]) > 0
    assert all((p == before[key]).all() for key, p in tiny.named_parameters()), "a run changed the shared base"


def test_a_start_is_a_start_and_an_optimizer_gets_the_rate(tiny, monkeypatch):
    rows = classic.rows(field.TASK)["train"]
    begun = next(iter(pl.adapters(field.prepared("pissa", rows))["field"].values()))
    plain = next(iter(pl.adapters(field.prepared("LoRA", rows))["field"].values()))
    assert begun.start_A is not None and plain.start_A is None
    asked = {}

    def lora_plus(model, lr, **more):
        asked["lr"] = lr
        return OPTIMIZERS["lora_plus"](model, lr, **more)

    there = field.entrants()
    there["lora_plus"] = there["lora_plus"]._replace(optimizer=lora_plus)
    monkeypatch.setattr(field, "entrants", lambda: there)
    field.execute(lab.Run(field.experiment(["lora_plus"], steps=1).cases[0], 3e-3, 0))
    assert asked == {"lr": 3e-3}


def test_main_refuses_who_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        field.main(["--only", "Lora", "--out", str(tmp_path / "runs.csv")])
    assert "invalid choice: 'Lora'" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_recorded_rows_are_of_this_base_model_and_of_this_plan():
    """Another base model or task in data/ makes the record out of date: run the experiment again."""
    plan = field.experiment()
    rows = lab.rows_of(field.OUT, plan.columns)
    there = {row["method"] for row in rows}
    assert there == set(field.entrants()), "each takes part, and nobody else"
    assert len(lab.made(field.OUT, plan)) == len(rows), "rows of other settings"
    assert all(row[column] for row in rows for column in ("date", "commit", "hardware", "torch"))
    assert lab.left(rows, plan) == 0, "there is nothing to do for what is recorded"
