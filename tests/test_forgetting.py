"""The experiment on forgetting: its plan, runs for real on a tiny model, and what was recorded."""

import math

import pytest
import torch
from families import scripts, tiny_experiment

import peftlab as pl
from peftlab import lab, retention
from peftlab.paths import DATA
from peftlab.retention import Exam, retained

RECORDED = lab.RESULTS / "forgetting.csv"


@pytest.fixture(scope="module")
def files():
    """(classic, forgetting), own copies."""
    with scripts("classic", "forgetting") as modules:
        yield modules


@pytest.fixture
def tiny(files, monkeypatch):
    """(forgetting, a tiny Llama with the course's words), few rows of each task and small exams."""
    classic, forgetting = files
    model = tiny_experiment(monkeypatch, classic, hidden_size=32, num_hidden_layers=2, intermediate_size=64)
    facts = [{"prompt": f"Question: Who is {name}?\nAnswer:", "completion": " a pilot\n"} for name in ("Ann", "Bob")]
    valid = Exam(facts, facts[:1], ["The module reads a file, and writes it."], ["for x in range(3):\n    print(x)\n"])
    test = Exam(facts[1:], facts, ["A list keeps the order of its items."], ["def f(x):\n    return x\n"])
    monkeypatch.setattr(forgetting, "exams", lambda: (valid, test))
    monkeypatch.setattr(forgetting, "BATCH", 2)
    return forgetting, model


def done(forgetting, name, rate=1e-2, steps=3, task="reviews"):
    """The row of one run, figures as numbers."""
    (case,) = forgetting.experiment([task], [name], steps=steps).cases
    row = forgetting.execute(lab.Run(case, rate, 0))
    assert tuple(row) == (*forgetting.MEASURED, *lab.ORIGIN)
    return {column: float(row[column]) for column in forgetting.MEASURED}


def seen(forgetting, row, step):
    return [row[f"{what}@{step}"] for what in ("target", *forgetting.RETAINED)]


# ------------------------------------------------------------------------------------------------------------ plan


def test_plan(files):
    _, forgetting = files
    plan = forgetting.experiment()
    cases = plan.cases
    assert [case.key["method"] for case in cases] == list(forgetting.METHODS)
    assert plan.sweep == 0.1 and len(plan.seeds) == 3
    assert len({case.settings["config"] for case in cases}) == len(cases)
    assert {case.settings["steps"] for case in cases} == {200}, "one budget for all"
    assert {one.of for one in forgetting.METHODS.values()} - {"base", "full", "last_layers"} <= set(pl.METHODS)
    both = forgetting.experiment(["sql", "reviews"]).cases
    assert len({case.settings["config"] for case in both}) == 2 * len(cases), "a task of its own, a hash of its own"


def test_five_rates_whose_second_highest_is_the_expected_best(files):
    _, forgetting = files
    for name, method in forgetting.METHODS.items():
        grid, beyond = forgetting.rates_of(name)
        if name == "base":
            assert (grid, beyond) == ((0.0,), ())
            continue
        assert len(grid) == 5 and grid[3] == method.rate and grid == tuple(sorted(grid))
        assert set(grid) < set(beyond) and beyond[0] < grid[0] and beyond[-1] > grid[-1]
        ratios = [high / low for low, high in zip(beyond[:-1], beyond[1:], strict=True)]
        assert all(ratio == pytest.approx(2) or ratio == pytest.approx(2.5) for ratio in ratios), "1, 2, 5, 10, …"
    assert forgetting.rates_of("Pfeiffer")[0][3] == 1e-2, "a registered class"
    (case,) = forgetting.experiment(["sql"], ["full"], rates=[2e-4]).cases
    assert (case.grid, case.ladder) == ((2e-4,), [2e-4]), "given by hand: just these"


def test_the_hash_names_all_that_a_run_is_but_its_rate_and_seed(files, monkeypatch):
    _, forgetting = files

    def hashed(name="LoRA r=8 all", **more):
        (case,) = forgetting.experiment(["sql"], [name], **more).cases
        return case.settings["config"]

    before, at = hashed(), forgetting.METHODS["LoRA r=8 all"]
    assert hashed() == hashed(seeds=(7,)) == before and hashed(steps=3) != before
    monkeypatch.setitem(forgetting.METHODS, "LoRA r=8 all", at._replace(rate=1e-3))
    assert hashed() == hashed(rates=(1e-4, 1e-3)) == before, "rates are columns of their own"
    for other in ({"hyper": {"r": 8, "alpha": 17}}, {"hyper": at.hyper | {"dropout": 0.1}}, {"targets": "q_proj"},
                  {"quantized": True}, {"of": "IA3"}):  # fmt: skip
        monkeypatch.setitem(forgetting.METHODS, "LoRA r=8 all", at._replace(**other))
        assert hashed() != before, other
    monkeypatch.setitem(forgetting.METHODS, "LoRA r=8 all", at)
    assert hashed() == before
    monkeypatch.setattr(lab.table, "fingerprints", lambda task: ("another base", "data"))
    assert hashed() != before


def test_exams_for_choosing_and_for_reporting_are_apart(files, monkeypatch):
    _, forgetting = files
    texts = {"docs": [f"Text {i}." for i in range(200)], "code": [f"x{i} = 0\n" * 2000 for i in range(20)]}
    monkeypatch.setattr(retention, "_library", lambda: texts)  # the running Python's takes seconds to read
    valid, test = forgetting.exams.__wrapped__()
    assert not {row["prompt"] for row in valid.facts + valid.lists} & {row["prompt"] for row in test.facts + test.lists}
    assert not set(valid.docs + valid.code) & set(test.docs + test.code)


@pytest.mark.parametrize("wrong", [["--methods", "LORA2"], ["--steps", "0"], ["--jobs", "0"], ["--tasks", "voices"]])
def test_what_cannot_be_run_is_refused(files, wrong, tmp_path, capsys):
    _, forgetting = files
    with pytest.raises(SystemExit):
        forgetting.main([*wrong, "--out", str(tmp_path / "runs.csv")])
    said = capsys.readouterr().err
    assert "LORA2" not in wrong or ("there is no method 'LORA2'" in said and "Pfeiffer" in said and "IA3" in said)
    assert not list(tmp_path.iterdir())


def test_main_goes_on_from_a_file_and_prints_each_method_at_its_best_rate(tiny, tmp_path, capsys, monkeypatch):
    forgetting, _ = tiny
    (case,) = forgetting.experiment(["reviews"], ["IA3"], seeds=[0], steps=3).cases
    made = {column: "0.5" for column in forgetting.MEASURED} | dict.fromkeys(lab.ORIGIN, "x") | {"parameters": "7"}
    best = {"valid_accuracy": "0.9", "test_accuracy": "0.75"}
    rows = [lab.wanted(lab.Run(case, rate, 0)) | made | (best if rate == case.grid[2] else {}) for rate in case.grid]
    plan = forgetting.experiment(["reviews"], ["IA3"], seeds=[0], steps=3)
    lab.write(tmp_path / "runs.csv", rows, plan.columns)
    monkeypatch.setattr(lab.commands, "work",
                        lambda plan, path, *_: print(lab.left(lab.rows_of(path, plan.columns), plan)))  # fmt: skip
    forgetting.main(["--tasks", "reviews", "--methods", "IA3", "--seeds", "0", "--steps", "3", "--out",
                     str(tmp_path / "runs.csv")])  # fmt: skip
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "0" and len(said) == 4 and f"{case.grid[2]:g}" in said[3] and "75.0 %" in said[3]


# ------------------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("name, mergeable", [
    ("full", True), ("last 2 layers", True), ("LoRA r=8 all", True), ("QLoRA r=8 all", True), ("LNTuning", True),
    ("BitFit", True), ("IA3", True), ("PromptTuning", False), ("PrefixTuning", False), ("Houlsby", False),
    ("Pfeiffer", False),
])  # fmt: skip
def test_a_run(tiny, name, mergeable):
    forgetting, base = tiny
    before = {key: p.clone() for key, p in base.named_parameters()}
    row = done(forgetting, name)
    trained = sum(p.numel() for p in forgetting.prepared(name).parameters() if p.requires_grad)
    assert row["parameters"] == trained > 0 and row["train_loss"] > 0 and row["valid_loss"] > 0
    assert row["drift"] > 0 and row["drift_middle"] > 0 and row["seconds"] >= row["train_seconds"] >= 0
    assert all(math.isfinite(value) for column, value in row.items() if "@" in column or column.startswith("test_"))
    assert row["valid_accuracy"] == row["target@200"]
    assert math.isnan(row["delta_norm"]) == (not mergeable)
    inside = mergeable and name not in ("LNTuning", "BitFit")  # these change no matrix of a linear layer
    assert math.isnan(row["delta_rank"]) == math.isnan(row["intruders"]) == (not inside)
    if inside:
        assert row["delta_norm"] > 0 and 1 <= row["delta_rank"] <= 32 and 0 <= row["intruders"] <= 10
    elif mergeable:
        assert row["delta_norm"] == 0
    assert all(torch.equal(p, before[key]) for key, p in base.named_parameters()), "a run changed the shared base"


def test_the_base_is_where_everything_starts(tiny):
    forgetting, model = tiny
    row = done(forgetting, "base", rate=0.0)
    assert row["parameters"] == row["train_seconds"] == row["drift"] == row["drift_middle"] == row["delta_norm"] == 0
    assert all(math.isnan(row[column]) for column in ("train_loss", "valid_loss", "delta_rank", "intruders"))
    assert all(seen(forgetting, row, step) == seen(forgetting, row, 200) for step in forgetting.CHECKPOINTS)
    for exam, shown in zip(forgetting.exams(), ("{}@25", "test_{}"), strict=True):  # VALID on the way, TEST at the end
        for name, score in exam.take(model, pl.load_base(DATA / "base", device="cpu")[1]).items():
            assert row[shown.format(name)] == pytest.approx(score.value, rel=1e-5)


def test_a_diverged_run_is_judged_as_its_start(tiny):
    forgetting, _ = tiny
    base, row = done(forgetting, "base", rate=0.0), done(forgetting, "LoRA r=8 all", rate=1e30)
    assert math.isnan(row["train_loss"]) and math.isnan(row["valid_loss"]) and row["parameters"] > 0
    for column in base:
        if "@" in column or column.startswith("test_"):
            assert row[column] == pytest.approx(base[column], rel=1e-5), column
    assert row["drift"] == row["delta_norm"] == 0 and row["valid_accuracy"] == base["valid_accuracy"]


def test_nothing_is_kept_of_a_run_that_diverges_late(tiny, monkeypatch):
    forgetting, _ = tiny
    train_steps = pl.train_steps

    def diverging(model, *args, **settings):
        """As the real one does: the trained parameters are put back, then it raises."""
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        for log in train_steps(model, *args, **settings):
            if len(log) == 26:
                with torch.no_grad():
                    for name, value in start.items():
                        model.get_parameter(name).copy_(value)
                raise FloatingPointError
            yield log

    monkeypatch.setattr(pl, "train_steps", diverging)
    base, row = done(forgetting, "base", rate=0.0), done(forgetting, "LNTuning", 1.0, 30)
    assert math.isnan(row["train_loss"]) and row["drift"] == 0
    for step in forgetting.CHECKPOINTS:
        assert seen(forgetting, row, step) == pytest.approx(seen(forgetting, base, step), rel=1e-5)


def test_a_curve_has_the_states_on_the_way(tiny, monkeypatch):
    """Looked at after 25 steps and at the end; looking changes nothing of what is trained."""
    forgetting, _ = tiny
    row, short = (done(forgetting, "LNTuning", 1.0, steps) for steps in (26, 4))
    assert seen(forgetting, row, 25) != seen(forgetting, row, 50) == seen(forgetting, row, 200)
    assert seen(forgetting, short, 25) == seen(forgetting, short, 200), "shorter than the first checkpoint"
    looked = []
    monkeypatch.setattr(forgetting, "glance", lambda model, task: looked.append(1) or dict.fromkeys(
        ("target", *forgetting.RETAINED), 0.0))  # fmt: skip
    blind = done(forgetting, "LNTuning", 1.0, 26)
    assert len(looked) == 2
    assert all(blind[column] == row[column] for column in ("train_loss", "valid_loss", "drift", "delta_norm"))


def test_a_seed_draws_the_adapter_and_names_its_run(tiny):
    forgetting, _ = tiny
    drawn = [pl.adapters(forgetting.prepared("LoRA r=8 all", seed))["task"] for seed in (0, 0, 1)]
    first, again, other = (next(iter(adapters.values())).lora_A for adapters in drawn)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_four_bits_are_part_of_what_was_trained_on_and_not_of_the_change(tiny):
    """A packed base and an adapter that does nothing: states drift by the quantisation, weights have not changed."""
    forgetting, _ = tiny
    row = done(forgetting, "QLoRA r=8 all", rate=1e30)
    assert math.isnan(row["train_loss"]) and row["delta_norm"] == 0 < row["drift"]


# -------------------------------------------------------------------------------------------------------- recorded


@pytest.mark.skipif(not RECORDED.exists(), reason="not recorded yet: python benchmarks/forgetting.py")
def test_recorded_rows_are_complete_and_of_this_plan(files):
    """Another base model, task or hyper-parameter makes the record out of date: run the experiment again."""
    _, forgetting = files
    plan = forgetting.experiment()
    rows = lab.rows_of(RECORDED, plan.columns)
    assert lab.left(rows, plan) == 0, "the default plan is not done"
    for task, name in {(row["task"], row["method"]) for row in rows}:
        (case,) = forgetting.experiment([task], [name]).cases
        mine = [row for row in rows if (row["task"], row["method"]) == (task, name)]
        assert {row["config"] for row in mine} == {case.settings["config"]}, f"{name}: rows of other settings"
    assert all(row[column] for row in rows for column in lab.ORIGIN), "every row says where it comes from"
    for case in plan.cases:
        mine = [row for row in rows if case.key.items() <= row.items()]
        for seed in plan.seeds:
            rates = {row["learning_rate"] for row in mine if int(row["seed"]) == seed}
            if case.key["method"] == "base":
                assert rates == {"0.0"}
            else:
                swept = max(float(row["valid_accuracy"]) for row in mine if row["seed"] == "0") >= plan.sweep
                assert len(rates) >= (5 if seed == 0 or swept else 1)


@pytest.mark.skipif(not RECORDED.exists(), reason="not recorded yet: python benchmarks/forgetting.py")
def test_recorded_base_has_forgotten_nothing(files):
    _, forgetting = files
    runs = lab.read(RECORDED)
    for _, base in runs[runs.method == "base"].groupby("task"):
        assert (base[["drift", "delta_norm", "parameters"]] == 0).all(axis=None)
        exams = [base[[f"{what}@{step}" for what in ("target", *forgetting.RETAINED)]].to_numpy().tolist()
                 for step in forgetting.CHECKPOINTS]  # fmt: skip
        assert all(exam == exams[0] for exam in exams), "equal at all checkpoints"
        scores = base[["test_facts", "test_lists"]].set_axis(["facts", "lists"], axis=1).to_dict("records")
        assert all(retained(one, scores[0]) == 1 for one in scores) and scores[0]["facts"] > 0.99
