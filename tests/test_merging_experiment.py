"""The course's adapters and the experiment on combining them: plans, real runs on a tiny model, what was recorded."""

import math

import pandas as pd
import pytest
import torch
from families import scripts, shake, tiny_experiment

import peftlab as pl
from peftlab import lab
from peftlab.paths import DATA

ADAPTERS, MERGING = lab.RESULTS / "adapters.csv", lab.RESULTS / "merging.csv"


@pytest.fixture(scope="module")
def files():
    """(classic, adapters, merging), own copies."""
    with scripts("classic", "adapters", "merging") as modules:
        yield modules


@pytest.fixture
def tiny(files, monkeypatch, tmp_path):
    """(adapters, merging, a tiny Llama with the course's words): few rows, few steps, runs in a folder of their own."""
    classic, adapters, merging = files
    model = tiny_experiment(monkeypatch, classic, hidden_size=32, num_hidden_layers=1, intermediate_size=64)
    own, few = adapters.rows, {}
    for task in ("sql", "reviews", "pirate", "telegram"):
        few[task] = {split: found[:4] for split, found in own(task).items()}
    for task, parts in adapters.MIXED.items():
        few[task] = {split: [row for part in parts for row in few[part][split]] for split in pl.tasks.SPLITS}
    monkeypatch.setattr(adapters, "rows", few.__getitem__)
    monkeypatch.setattr(adapters, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(adapters, "STEPS", dict.fromkeys(adapters.STEPS, 2))
    monkeypatch.setattr(adapters, "BATCH", 2)
    monkeypatch.setattr(adapters, "best_rate", lambda task: 1e-2)
    return adapters, merging, model


def test_adapters_are_planned_with_one_search_for_all(files):
    _, adapters, _ = files
    plan = adapters.experiment()
    assert [case.key["task"] for case in plan.cases] == [*adapters.STEPS, *adapters.MIXED]
    assert {len(case.grid) for case in plan.cases} == {3} and len(plan.seeds) == 3
    assert len({case.settings["config"] for case in plan.cases}) == len(plan.cases)
    for mixed, parts in adapters.MIXED.items():
        assert adapters.steps_of(mixed) == sum(map(adapters.steps_of, parts)), "the budget of both together"


def test_rows_of_a_voice_are_that_voice_and_mixed_rows_are_those_of_both(files):
    _, adapters, _ = files
    assert {row["voice"] for split in adapters.rows("pirate").values() for row in split} == {"pirate"}
    assert {row["split"] for row in adapters.rows("sql")["test"]} == {"iid"}
    for mixed, parts in adapters.MIXED.items():
        for split, found in adapters.rows(mixed).items():
            texts = [row["prompt"] + row["completion"] for part in parts for row in adapters.rows(part)[split]]
            assert sorted(texts) == sorted(row["prompt"] + row["completion"] for row in found)
        half, first = adapters.rows(mixed)["train"], {row["completion"] for row in adapters.rows(parts[0])["train"]}
        assert len({row["completion"] in first for row in half[: len(half) // 2]}) == 2, "one after the other"


def test_an_adapter_is_trained_once_and_again_to_the_same_values(tiny):
    """Up to rounding: sums may be taken in another order where a tensor lies elsewhere in memory."""
    from safetensors.torch import load_file

    adapters, _, _ = tiny
    folder, losses = adapters.trained("pirate", 1e-2, 0)
    weights = folder / "adapter_model.safetensors"
    first, made = load_file(weights), weights.stat().st_mtime_ns
    assert adapters.trained("pirate", 1e-2, 0) == (folder, losses) and weights.stat().st_mtime_ns == made
    assert math.isfinite(losses["train_loss"])
    weights.unlink()
    (folder / "losses.json").unlink()
    adapters.trained("pirate", 1e-2, 0)
    torch.testing.assert_close(load_file(weights), first, rtol=1e-3, atol=1e-5)
    other, _ = adapters.trained("pirate", 1e-2, 1)
    there = load_file(other / weights.name)
    assert any((there[name] - value).abs().max() > 1e-2 for name, value in first.items()), "another seed"


def test_an_adapter_that_diverged_is_kept_as_it_began(tiny, monkeypatch):
    adapters, _, _ = tiny

    def diverge(*_, **__):
        raise FloatingPointError

    monkeypatch.setattr(pl, "train", diverge)
    _, losses = adapters.trained("sql", 1e-2, 0)
    assert math.isnan(losses["train_loss"])


def test_one_run_of_the_adapters_measures_what_it_says(tiny):
    adapters, _, model = tiny
    (case,) = adapters.experiment(["sql+reviews"]).cases
    row = adapters.execute(lab.Run(case, 1e-2, 0))
    assert tuple(row) == (*adapters.MEASURED, *lab.ORIGIN)
    assert int(row["parameters"]) == sum(pl.LoRA.size(*shape, r=8) for shape in pl.layer_shapes(model).values())
    assert not pl.hosts(model), "the shared base was changed"


def test_settings_are_as_many_for_each_way(files, monkeypatch):
    _, adapters, merging = files
    monkeypatch.setattr(adapters, "best_rate", lambda task: 1e-2)
    plan = merging.experiment()
    counts = pd.Series([case.key["method"] for case in plan.cases if case.key["pair"] == "sql+reviews"]).value_counts()
    assert {int(counts[way]) for way in merging.SETTINGS} == {4}
    assert {int(counts[name]) for name in merging.BESIDE} == {1}
    assert len({case.settings["config"] for case in plan.cases}) == len(plan.cases)


@pytest.mark.parametrize("method", ["base", "alone", "first", "second", "trained on both", "cat", "dare_ties"])
def test_each_kind_of_run_judges_the_right_model(tiny, monkeypatch, method):
    adapters, merging, model = tiny
    seen = []

    def judged(models, pair):
        with torch.no_grad():
            seen.extend(one(torch.arange(5)[None]).logits for one in models)
        return dict.fromkeys(merging.MEASURED, 0.0)

    monkeypatch.setattr(merging, "judged", judged)
    case = next(c for c in merging.experiment(["pirate+telegram"], [method]).cases)
    row = merging.execute(lab.Run(case, 0.0, 0))
    assert tuple(row) == (*merging.MEASURED, *lab.ORIGIN)
    wanted = merging.loaded("pirate+telegram", 0)
    for got, names in zip(seen, {
        "base": [(), ()], "alone": [("first",), ("second",)], "first": [("first",)] * 2, "second": [("second",)] * 2,
        "trained on both": [("both",)] * 2,
    }.get(method, []), strict=method in merging.BESIDE):  # fmt: skip
        with pl.using(wanted, *names), torch.no_grad():
            torch.testing.assert_close(got, wanted(torch.arange(5)[None]).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(seen[0], seen[1]) == (method != "alone")


def test_judged_counts_each_part_with_its_own_model(tiny):
    adapters, merging, model = tiny
    found = merging.judged([model, model], "pirate+telegram")
    assert found["valid_accuracy"] == 0 == found["test_accuracy"], "a random model is never right"
    rows = adapters.rows("pirate")["valid"]
    both = [merging.answer_loss(model, adapters.rows(task)["valid"]) for task in ("pirate", "telegram")]
    assert found["valid_loss"] == pytest.approx(sum(both) / 2)
    assert merging.answer_loss(model, rows, 1) == pytest.approx(merging.answer_loss(model, rows, 50), rel=1e-5)
    assert both[0] == pytest.approx(math.log(len(adapters.base()[1])), rel=0.1), "about uniform over the words"


def test_meeting_of_two_changes(tiny):
    _, merging, model = tiny
    import copy

    model = copy.deepcopy(model)
    for name in ("first", "second"):
        pl.attach(model, pl.LoRA, "q_proj", name=name, r=2)
        for adapter in pl.adapters(model)[name].values():
            shake(adapter, seed=3)
    with torch.no_grad():
        same = merging.meeting(model)
        for adapter in pl.adapters(model)["second"].values():
            adapter.load_state_dict(next(iter(pl.adapters(model)["first"].values())).state_dict())
            adapter.lora_B.mul_(-0.5)
        against = merging.meeting(model)
    assert -1 < same["cosine"] < 1 and 0 < same["conflict"] < 1
    assert against["cosine"] == pytest.approx(-1, abs=1e-5) and against["conflict"] == pytest.approx(1)


def test_best_takes_the_setting_that_valid_prefers_and_never_looks_at_test(files):
    _, _, merging = files
    rows = [{"pair": "p", "method": "cat", "weight": w, "density": 1.0, "seed": seed, "valid_loss": 1.0,
             "valid_accuracy": valid, "test_accuracy": 1 - valid}
            for w, valid in ((0.5, 0.2), (1.0, 0.6)) for seed in (0, 1)]  # fmt: skip
    assert set(merging.best(pd.DataFrame(rows))["weight"]) == {1.0}


@pytest.mark.skipif(not ADAPTERS.is_file(), reason="nothing recorded yet")
def test_recorded_adapters_are_complete_and_published_ones_are_theirs(files):
    _, adapters, _ = files
    plan = adapters.experiment()
    rows = lab.rows_of(ADAPTERS, plan.columns)
    assert lab.left(rows, plan) == 0
    assert all(f"| {task} " in adapters.table(lab.made(ADAPTERS, plan)) for task in (*adapters.STEPS, *adapters.MIXED))
    for task in adapters.STEPS:
        model, _ = adapters.base()
        pl.load_adapter(model, DATA / "adapters" / task, name=task)  # made for this base, or it would be refused
        kept = [r for r in rows if r["task"] == task and float(r["learning_rate"]) == adapters.best_rate(task)]
        right = next(float(r["valid_accuracy"]) for r in kept if r["seed"] == "0")
        if task == "telegram":  # one of them is judged again, the others would take longer
            pl.merge(model)
            assert adapters.accuracy(model, task, "valid") == pytest.approx(right, abs=0.05)


@pytest.mark.skipif(not MERGING.is_file(), reason="nothing recorded yet")
def test_recorded_merging_is_complete(files):
    _, _, merging = files
    plan = merging.experiment()
    rows = lab.rows_of(MERGING, plan.columns)
    assert lab.left(rows, plan) == 0
    assert all(f"| {way} " in merging.table(lab.made(MERGING, plan)) for way in (*merging.BESIDE, *merging.SETTINGS))
    assert all(row[column] for row in rows for column in ("commit", "hardware", "torch", "date"))
    runs = lab.made(MERGING, plan)
    alone = runs[runs["method"] == "alone"]
    assert (alone["test_accuracy"] > runs[runs["method"] == "base"]["test_accuracy"].max()).all()
