"""The leaderboard's experiment: who takes part, its plan, runs for real on a tiny model, and what was recorded."""

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


@pytest.fixture
def ours(monkeypatch):
    """The registry without classes of other test files: peftlab's own."""
    for name, method in list(pl.METHODS.items()):
        if not method.__module__.startswith("peftlab."):
            monkeypatch.delitem(pl.METHODS, name)
    return pl.METHODS


def recorded():
    """The plan without methods that joined: what data/results/classic.csv holds in any case."""
    return classic.experiment(methods=tuple(classic.METHODS))


def test_every_registered_class_takes_part_or_is_excluded_with_a_reason(ours, tiny):
    table = {method.of for method in classic.METHODS.values()} - {None}
    joined, excluded = set(classic.joined()), set(classic.EXCLUDED)
    assert table | joined | excluded == set(ours), "excluded is what is not registered any more"
    assert not (table & joined or table & excluded or joined & excluded)
    assert all(len(reason.split()) >= 4 for reason in classic.EXCLUDED.values())
    assert list(classic.everyone())[: len(classic.METHODS)] == list(classic.METHODS)
    for name in joined:
        model = classic.prepared(name)
        assert any(p.requires_grad for p in model.parameters()), f"{name} cannot be trained alone: EXCLUDED says why"
    for name in ("AdapterFusion", "Gated", "TrainableTokens"):
        with pytest.raises(ValueError):
            pl.attach(classic.base()[0], name)


def test_a_class_joins_by_being_registered(ours, tiny, monkeypatch):
    class Later(pl.METHODS["IA3"]):
        pass

    monkeypatch.setitem(ours, "Later", ours.pop("Later"))  # its registration ends with the test
    assert classic.joined()["Later"] == classic.Method("Later", 1e-2, {}, None)
    plan = classic.experiment(["reviews"], steps=2)
    (case,) = [case for case in plan.cases if case.key["method"] == "Later"]
    assert case.grid == (3e-3, 1e-2, 3e-2) and case.settings["hyper"] == "{}" and case.settings["targets"] == ""
    assert [case.key["method"] for case in plan.cases] == list(classic.everyone())
    row = classic.execute(lab.Run(case, 1e-2, 0))
    same = classic.execute(lab.Run(classic.experiment(["reviews"], ["IA3"], steps=2).cases[0], 1e-2, 0))
    assert all(row[column] == same[column] for column in classic.MEASURED if column != "seconds")
    found = classic.cost(["Later"], rounds=2)["methods"]
    assert [line["method"] for line in found] == ["full", "Later"] and found[1]["mergeable"]


def test_with_no_names_all_that_take_part_are_measured(ours, tiny, monkeypatch):
    monkeypatch.setattr(classic, "METHODS", {name: classic.METHODS[name] for name in ("full", "IA3")})
    monkeypatch.setattr(classic, "joined", lambda: {"BitFit": classic.Method("BitFit", 1e-2, {}, "all-linear")})
    assert [line["method"] for line in classic.cost(rounds=2)["methods"]] == ["full", "IA3", "BitFit"]
    assert [case.key["method"] for case in classic.experiment(["sql"]).cases] == ["full", "IA3", "BitFit"]


@pytest.mark.parametrize("name", ["AdapterFusion", "Lora"])
def test_main_refuses_what_does_not_take_part(name, tmp_path, capsys):
    with pytest.raises(SystemExit):
        classic.main(["--methods", name, "--out", str(tmp_path / "runs.csv")])
    assert f"invalid choice: '{name}'" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_plan():
    cases = recorded().cases
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
        monkeypatch.setattr(evaluate, "tokens_of", lambda *_, **__: [])
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
    plan = recorded()
    rows, everyone = lab.rows_of(classic.OUT, plan.columns), set(classic.everyone())
    assert lab.left(rows, plan) == 0, "there is nothing to do for what is recorded"
    there = {row["method"] for row in rows}
    assert set(classic.METHODS) <= there <= everyone, "rows of methods that do not take part"
    whole = classic.experiment(methods=[name for name in classic.everyone() if name in there])
    assert len(lab.made(classic.OUT, whole)) == len(rows), "rows of other settings"
    assert all(row[column] for row in rows for column in ("date", "commit", "hardware", "torch"))
    found = lab.summary(lab.read("classic"), ["task", "method"])
    assert lab.left(rows, whole) == 0 and len(found) == len(whole.cases) and (found.seeds == 3).all()


def test_recorded_costs_have_all_methods_with_their_counts():
    costs, runs = lab.costs("classic"), lab.read("classic")
    assert list(costs.index)[: len(classic.METHODS)] == list(classic.METHODS)
    assert set(costs.index) <= set(classic.everyone())
    for name, counts in runs.groupby("method")["parameters"]:
        assert name not in costs.index or set(counts) == {costs.parameters[name]}
