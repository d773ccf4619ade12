"""The experiment on remedies: its plan follows the recorded grid, every remedy runs, and what was recorded."""

import sys

import pandas as pd
import pytest
import torch
from families import scripts, tiny_experiment

import peftlab as pl
from peftlab import lab
from peftlab.retention import Exam

RECORDED = lab.RESULTS / "remedies.csv"
NAMES = ("classic", "forgetting", "remedies")


@pytest.fixture(scope="module")
def files():
    """The three scripts of benchmarks/, own copies."""
    with scripts(*NAMES) as modules:
        yield modules


@pytest.fixture
def tiny(files, monkeypatch):
    """(remedies, a tiny Llama with the course's words), few rows, small exams, two old texts."""
    classic, forgetting, remedies = files
    model = tiny_experiment(monkeypatch, classic, hidden_size=32, num_hidden_layers=2, intermediate_size=64)
    facts = [{"prompt": f"Question: Who is {name}?\nAnswer:", "completion": " a pilot\n"} for name in ("Ann", "Bob")]
    exam = Exam(facts, facts, ["The module reads a file."], ["for x in range(3):\n    print(x)\n"])
    monkeypatch.setattr(forgetting, "exams", lambda: (exam, exam))
    monkeypatch.setattr(forgetting, "BATCH", 2)
    monkeypatch.setattr(remedies, "old", lambda: ["Ann is a pilot by trade.\n", "A list keeps its order.\n"])
    return remedies, model


def grid(tmp_path, **best):
    """A recorded grid in which each method has a best rate."""
    rows = [{"task": "reviews", "method": name, "learning_rate": rate, "seed": 0, "valid_loss": 1.0,
             "valid_accuracy": 0.9 if rate == at else 0.1}
            for name, at in best.items() for rate in (1e-3, 1e-2, 1e-1)]  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "grid.csv", index=False)
    return tmp_path / "grid.csv"


def plan(remedies, tmp_path, steps=3):
    return remedies.experiment("reviews", steps=steps, grid=grid(tmp_path, **{"full": 1e-3, "LoRA r=8 all": 1e-2}))


def test_each_method_runs_at_its_best_recorded_rate(files, tmp_path):
    remedies = files[2]
    cases = plan(remedies, tmp_path).cases
    assert {case.key["method"]: case.grid for case in cases} == {"full": (1e-3,), "LoRA r=8 all": (1e-2,)}
    wanted = {(remedy, strength) for remedy, all_of in remedies.REMEDIES.items() for strength in all_of}
    for name in remedies.METHODS:
        assert {(c.key["remedy"], c.key["strength"]) for c in cases if c.key["method"] == name} == wanted
    assert len({case.settings["config"] for case in cases}) == len(cases)


@pytest.mark.parametrize("method", ["full", "LoRA r=8 all"])
@pytest.mark.parametrize("remedy", ["rehearsal", "decay", "KL old", "KL prompts", "interpolation"])
def test_every_remedy_runs_and_changes_what_becomes_of_the_model(tiny, tmp_path, method, remedy):
    remedies, model = tiny
    before = {name: p.clone() for name, p in model.named_parameters()}
    mine = [c for c in plan(remedies, tmp_path, 6).cases if (c.key["method"], c.key["remedy"]) == (method, remedy)]
    case = mine[-1]  # at its last strength, which of rehearsal is the strongest: there are few rows
    row = remedies.execute(lab.Run(case, case.grid[0], 0))
    assert tuple(row) == (*sys.modules["forgetting"].MEASURED, *lab.ORIGIN)
    plain = sys.modules["forgetting"]
    bare = lab.Case({"task": "reviews", "method": method}, case.settings, case.grid)
    without = plain.execute(lab.Run(bare, case.grid[0], 0))
    assert float(row["delta_norm"]) > 0 and row["delta_norm"] != without["delta_norm"]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "the shared base was changed"


@pytest.mark.parametrize("method", ["full", "LoRA r=8 all"])
def test_interpolation_halves_the_change_and_leaves_the_way_there_alone(tiny, tmp_path, method):
    remedies, _ = tiny
    cases = [c for c in plan(remedies, tmp_path).cases if c.key["method"] == method]
    half = next(c for c in cases if c.key["remedy"] == "interpolation" and c.key["strength"] == 0.5)
    row = remedies.execute(lab.Run(half, half.grid[0], 0))
    bare = lab.Case({"task": "reviews", "method": method}, half.settings, half.grid)
    without = sys.modules["forgetting"].execute(lab.Run(bare, half.grid[0], 0))
    assert float(row["delta_norm"]) == pytest.approx(0.5 * float(without["delta_norm"]), rel=1e-3)
    assert row["train_loss"] == without["train_loss"]


def test_main_goes_on_and_prints_the_means(tiny, tmp_path, capsys, monkeypatch):
    remedies, _ = tiny
    monkeypatch.setattr(remedies, "REMEDIES", {"decay": (0.01,)})
    monkeypatch.setattr(remedies, "SEEDS", (0,))
    monkeypatch.setattr(lab.commands, "work", lambda experiment, path, *_: [
        lab.write(path, [*lab.rows_of(path, experiment.columns), lab.wanted(run) | experiment.execute(run)],
                  experiment.columns)
        for case in experiment.cases for run in lab.pending(lab.rows_of(path, experiment.columns), case, (0,))
    ])  # fmt: skip  # in this process, where the model is the tiny one
    own = remedies.experiment
    monkeypatch.setattr(remedies, "experiment", lambda **more: own("reviews", **more))
    at = grid(tmp_path, **{"full": 1e-3, "LoRA r=8 all": 1e-2})
    wanted = ["--grid", str(at), "--out", str(tmp_path / "out.csv"), "--steps", "2"]
    remedies.main(wanted)
    assert capsys.readouterr().out.count("| decay  | 0.01") == 2
    with pytest.raises(SystemExit):
        remedies.main([*wanted, "--steps", "0"])


@pytest.mark.skipif(not RECORDED.is_file(), reason="nothing recorded yet")
def test_recorded_rows_are_complete_and_of_this_plan(files):
    remedies = files[2]
    experiment = remedies.experiment()
    rows = lab.rows_of(RECORDED, experiment.columns)
    assert lab.left(rows, experiment) == 0
    assert all(row[column] for row in rows for column in ("commit", "hardware", "torch", "date"))
    assert pl.tasks.NAMES and {row["task"] for row in rows} == {"sql"}
