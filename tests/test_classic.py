"""The comparison of the classic methods: its plan, one run for real on a tiny model, and what was recorded."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from families import tiny_experiment

import peftlab as pl
from peftlab import lab

path = Path(__file__).resolve().parent.parent / "benchmarks" / "classic.py"
spec = importlib.util.spec_from_file_location("classic", path)
classic = importlib.util.module_from_spec(spec)
sys.modules["classic"] = classic
spec.loader.exec_module(classic)


@pytest.fixture
def tiny(monkeypatch):
    """A tiny Llama with the course's words, and few rows of each task."""
    return tiny_experiment(monkeypatch, classic, hidden_size=48, num_hidden_layers=6, intermediate_size=24)


def test_plan():
    cases = classic.experiment().cases
    assert len(cases) == len({str(case) for case in cases}) == 3 * len(classic.METHODS)
    for case in cases:
        middle = classic.METHODS[case.key["method"]].rate
        assert len(case.grid) == 3 and case.grid[1] == middle and set(case.grid) < set(case.ladder)
        same = [other.settings["steps"] for other in cases if other.key["task"] == case.key["task"]]
        assert set(same) == {case.settings["steps"]}, "one budget for all methods"
    assert {method.of for method in classic.METHODS.values()} - {None} <= set(pl.METHODS)


def test_one_voice_is_learned_and_no_row_is_in_two_splits():
    found = classic.rows("voices")
    assert [len(found[split]) for split in ("train", "valid", "test")] == [240, 40, 80]
    contents = [row["content"] for rows in found.values() for row in rows]
    assert len(contents) == len(set(contents))


@pytest.mark.parametrize("task, name", [("sql", "full"), ("reviews", "IA3"), ("voices", "PTuning")])
def test_two_steps_for_real(tiny, task, name):
    before = {key: p.clone() for key, p in tiny.named_parameters()}
    (case,) = classic.experiment([task], [name], steps=2).cases
    row = classic.execute(lab.Run(case, 1e-3, 0))
    assert set(row) == {*classic.MEASURED, *lab.ORIGIN}
    assert int(row["parameters"]) == sum(p.numel() for p in classic.prepared(name).parameters() if p.requires_grad)
    assert float(row["train_loss"]) == float(row["early_loss"]) > 0 and 0 <= float(row["test_form"]) <= 1
    assert all((p == before[key]).all() for key, p in tiny.named_parameters()), "a run changed the shared base"


def test_a_diverged_run_is_a_row(tiny, monkeypatch):
    def diverge(*args, **kwargs):
        raise FloatingPointError

    monkeypatch.setattr(pl, "train", diverge)
    (case,) = classic.experiment(["reviews"], ["IA3"], steps=2).cases
    row = classic.execute(lab.Run(case, 1.0, 0))
    assert (row["train_loss"], row["valid_loss"]) == ("nan", "nan") and float(row["valid_accuracy"]) == 0


def test_form_of_an_answer_is_judged_apart_from_its_content(tiny, monkeypatch):
    from peftlab import evaluate

    answers = {"sql": ["SELECT 1", "SELEC 1"], "reviews": ["positive", "so so"],
               "voices": ["Arr, all be well, matey!", "all is well"]}  # fmt: skip
    for task, given in answers.items():
        monkeypatch.setattr(evaluate, "generate", lambda *_, given=given, **__: given * 2)
        monkeypatch.setattr(evaluate, "_encode", lambda *_, **__: [])
        assert classic.judge(tiny, task, "valid")[1] == 0.5


def test_cost_of_every_method(tiny):
    found = classic.cost(["IA3", "PromptTuning", "LlamaAdapter", "Houlsby"], rounds=2)
    lines = {line.pop("method"): line for line in found["methods"]}
    assert list(lines) == ["full", "IA3", "PromptTuning", "LlamaAdapter", "Houlsby"]
    assert [line["mergeable"] for line in lines.values()] == [False, True, False, False, False]
    assert [line["context"] for line in lines.values()] == [0, 0, 20, 0, 0]
    assert lines["full"]["step"] == 1 and all(line["decode"] is not None for line in lines.values())
    for line in lines.values():
        assert line["step_low"] <= line["step"] <= line["step_high"] and line["bytes"] > 4 * line["parameters"]
    json.dumps(found)


def test_recorded_rows_are_complete_and_of_this_base_model():
    """Another base model or task in data/ makes the record out of date: run the experiment again."""
    rows, plan = lab.rows_of(classic.OUT, classic.experiment().columns), classic.experiment()
    assert lab.left(rows, plan) == 0 and len(lab.made(classic.OUT, plan)) == len(rows), "rows of other settings"
    assert all(row[column] for row in rows for column in ("date", "commit", "hardware", "torch"))
    found = lab.summary(lab.read("classic"), ["task", "method"])
    assert len(found) == len(plan.cases) and (found.seeds == 3).all()


def test_recorded_costs_have_all_methods_with_their_counts():
    costs, runs = lab.costs("classic"), lab.read("classic")
    assert list(costs.index) == list(classic.METHODS)
    for name, counts in runs.groupby("method")["parameters"]:
        assert set(counts) == {costs.parameters[name]}
