"""The rank experiment's bookkeeping: what is run and what is skipped, how the rate is chosen, what was recorded."""

import csv
import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

path = Path(__file__).resolve().parent.parent / "benchmarks" / "lora_rank.py"
spec = importlib.util.spec_from_file_location("lora_rank", path)
lora_rank = importlib.util.module_from_spec(spec)
sys.modules["lora_rank"] = lora_rank
spec.loader.exec_module(lora_rank)
Run = lora_rank.Run

BUDGET = lora_rank.Budget(steps=250, batch_size=16, base="aaa", task="bbb")
RANKS, SEEDS = (4, 8), (0, 1, 2)
BEST = {"LoRA": 2e-3, "full": 3e-4}  # inside of both grids


def measured(run, valid=None, test=0.5):
    """A made-up result. By default, accuracy on VALID falls with the distance from the rate in BEST."""
    ladder = sorted(lora_rank.GRID[run.method] + lora_rank.BEYOND[run.method])
    away = abs(ladder.index(run.learning_rate) - ladder.index(BEST[run.method]))
    found = dict.fromkeys(lora_rank.MEASURED + lora_rank.ORIGIN, "1")
    return found | {"valid_accuracy": str(1 - away / 10 if valid is None else valid), "test_accuracy": str(test)}


def conduct(file, execute=lambda run, budget: measured(run), jobs=2, budget=BUDGET, stop=None):
    """The runs that were executed, in order of completion."""
    done = []
    with ThreadPoolExecutor(jobs) as pool:
        for run, _, rest in lora_rank.conduct(file, RANKS, SEEDS, budget, execute, pool, jobs):
            done.append(run)
            assert rest == lora_rank.left(lora_rank.read(file), RANKS, SEEDS, budget)
            if len(done) == stop:
                break
    return done


def test_grid_on_the_first_seed_then_the_other_seeds_at_the_best_rate(tmp_path):
    file = tmp_path / "rows.csv"
    done = conduct(file)
    assert len(done) == len(set(done)) == 3 * (4 + 2)
    for method, rank in lora_rank.settings(RANKS):
        mine = [run for run in done if (run.method, run.rank) == (method, rank)]
        assert [run.seed for run in mine[:4]] == [0] * 4 and {r.learning_rate for r in mine[:4]} == set(
            lora_rank.GRID[method]
        )
        assert {(run.seed, run.learning_rate) for run in mine[4:]} == {(1, BEST[method]), (2, BEST[method])}
    assert len(lora_rank.read(file)) == len(done)
    assert not list(tmp_path.glob(".*")), "a temporary file was left"


@pytest.mark.parametrize("stop", [1, 5, 17])
def test_resume_skips_finished_rows(tmp_path, stop):
    file = tmp_path / "rows.csv"
    first = conduct(file, stop=stop, jobs=1)
    kept = lora_rank.read(file)
    assert len(first) == len(kept) == stop
    second = conduct(file)
    assert not set(first) & set(second) and len(first) + len(second) == 18
    assert all(row in lora_rank.read(file) for row in kept)
    assert conduct(file) == []


def test_a_changed_setting_reruns_only_its_row(tmp_path):
    file = tmp_path / "rows.csv"
    conduct(file)
    rows = lora_rank.read(file)
    at = next(i for i, row in enumerate(rows) if row["rank"] == "8" and row["seed"] == "1")
    others = rows[:at] + rows[at + 1 :]
    rows[at] |= {"alpha": "99", "test_accuracy": "0.123"}
    lora_rank.write(file, rows)
    assert conduct(file) == [Run("LoRA", 8, BEST["LoRA"], 1)]
    again = lora_rank.read(file)
    assert [row for row in again if row in others] == others and len(again) == len(others) + 1
    assert "99" not in [row["alpha"] for row in again]


def test_another_base_model_makes_all_rows_anew_in_their_places(tmp_path):
    file = tmp_path / "rows.csv"
    conduct(file)
    assert len(conduct(file, budget=BUDGET._replace(base="ccc"))) == 18
    assert {row["base"] for row in lora_rank.read(file)} == {"ccc"} and len(lora_rank.read(file)) == 18


def test_rate_is_chosen_on_valid_and_test_is_only_reported(tmp_path):
    file = tmp_path / "rows.csv"
    test = {1e-3: 0.9, 2e-3: 0.2, 5e-3: 0.99, 1e-2: 0.7}  # TEST prefers another rate than VALID does

    def execute(run, budget):
        return measured(run, test=test.get(run.learning_rate, 0.5) + run.seed / 100)

    conduct(file, execute)
    lora = lora_rank.summary(lora_rank.read(file), RANKS, SEEDS, BUDGET)[1]
    assert (lora["rank"], lora["learning_rate"], lora["seeds"]) == (4, 2e-3, 3)
    assert [lora["low"], lora["test"], lora["high"]] == pytest.approx([0.20, 0.21, 0.22])
    assert "21.0 % (20.0–22.0) | 3 |" in lora_rank.table([lora])


def test_equal_accuracies_are_decided_by_the_loss_and_a_diverged_run_is_last():
    def row(loss):
        return {"valid_accuracy": "0.9", "valid_loss": loss}

    rows = [row("nan"), row("0.3"), row("0.1"), row("inf")]
    assert lora_rank.best(rows) is rows[2]
    assert lora_rank.best([row("nan"), rows[1]]) is rows[1]


@pytest.mark.parametrize("peak, extra", [(5e-4, {5e-4, 2e-4}), (5e-2, {2e-2, 5e-2}), (2e-2, {2e-2, 5e-2})])
def test_best_rate_at_an_edge_extends_the_grid(tmp_path, monkeypatch, peak, extra):
    monkeypatch.setitem(BEST, "LoRA", peak)
    done = conduct(tmp_path / "rows.csv")
    rates = {run.learning_rate for run in done if run.rank == 4 and run.seed == 0}
    assert rates == {*lora_rank.GRID["LoRA"], *extra}
    assert {run.learning_rate for run in done if run.rank == 4 and run.seed} == {peak}


def test_a_failed_run_keeps_what_is_there(tmp_path):
    file = tmp_path / "rows.csv"

    def execute(run, budget):
        if run.method == "LoRA":
            raise MemoryError("no room")
        return measured(run)

    with pytest.raises(MemoryError):
        conduct(file, execute, jobs=1)
    assert lora_rank.read(file) and all(row["method"] == "full" for row in lora_rank.read(file))


def test_foreign_and_damaged_files_are_refused_and_left_alone(tmp_path):
    file = tmp_path / "rows.csv"
    conduct(file)
    text = file.read_text()
    for wrong in ("a,b\n1,2\n", text[: len(text) * 2 // 3 - 40]):
        file.write_text(wrong)
        with pytest.raises(ValueError, match="Move it away"):
            conduct(file)
        assert file.read_text() == wrong


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
    budget = BUDGET._replace(steps=2, batch_size=4)
    rows = {rank: lora_rank.execute(Run("LoRA" if rank else "full", rank, 1e-3, 0), budget) for rank in (0, 2)}
    # r (in + out) on q, k, v, o of 16×16 and three of 16×24
    assert int(rows[2]["parameters"]) == 2 * (4 * 32 + 3 * 40)
    assert int(rows[0]["parameters"]) == sum(p.numel() for p in base.parameters())
    for row in rows.values():
        assert set(row) == set(lora_rank.MEASURED + lora_rank.ORIGIN)
        assert float(row["train_loss"]) == float(row["early_loss"]) > 0 and row["torch"]
    assert all((p == before[name]).all() for name, p in base.named_parameters()), "a run changed the shared base"


def test_recorded_rows_are_complete_and_of_this_base_model():
    """Another base model or task in data/ makes the recorded figure out of date: run the experiment again."""
    rows, budget = lora_rank.read(lora_rank.OUT), lora_rank.budget_here()
    ranks = sorted({int(row["rank"]) for row in rows} - {0})
    assert {*lora_rank.RANKS} <= {*ranks}
    assert lora_rank.left(rows, ranks, lora_rank.SEEDS, budget) == 0
    with lora_rank.OUT.open(newline="") as f:
        origins = [[row[c] for c in ("date", "commit", "hardware", "torch")] for row in csv.DictReader(f)]
    assert all(all(values) for values in origins)
