"""What the programs of benchmarks/ share: options that are checked, an end that always prints, works in turns."""

import gc
import json

import pytest

from peftlab import lab


def execute(run):
    raise AssertionError("nothing is to be done")


PLAN = lab.Experiment((lab.Case({"method": "a"}, {"steps": 3}, (0.1,)),),
                      ("valid_accuracy", "valid_loss", "test_accuracy", "seconds"), execute, (0,))  # fmt: skip


@pytest.mark.parametrize("wrong", [["--jobs", "0"], ["--steps", "0"], ["--steps", "many"], ["--engine", "magic"]])
def test_options_are_checked(wrong, capsys):
    parser = lab.options("What it is.", None)
    lab.add_steps(parser, 7)
    assert vars(parser.parse_args([])) == dict(out=None, jobs=None, engine="processes", address=None, steps=7)
    with pytest.raises(SystemExit):
        parser.parse_args(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_the_table_is_printed_also_after_an_interruption(tmp_path, monkeypatch, capsys):
    wanted = lab.options(None, tmp_path / "runs.csv").parse_args(["--jobs", "2"])
    asked = []

    def stopped(*given):
        asked.append(given)
        raise RuntimeError("stopped")

    monkeypatch.setattr(lab.commands, "work", stopped)
    with pytest.raises(RuntimeError, match="stopped"):
        lab.carry_out(PLAN, wanted, lambda runs: f"{len(runs)} runs")
    assert asked == [(PLAN, tmp_path / "runs.csv", 2, "processes", None)]
    assert capsys.readouterr().out == "no runs yet\n"
    row = lab.wanted(lab.Run(PLAN.cases[0], 0.1, 0)) | dict.fromkeys((*PLAN.measured, *lab.ORIGIN), "1")
    lab.write(tmp_path / "runs.csv", [row], PLAN.columns)
    with pytest.raises(RuntimeError):
        lab.carry_out(PLAN, wanted, lambda runs: f"{len(runs)} runs")
    assert capsys.readouterr().out == "1 runs\n"


def test_works_take_turns_in_random_order_without_garbage_collection():
    seen = []

    def timed(work):
        seen.append((work, gc.isenabled()))
        return float(work)

    found = lab.take_turns({"one": 1, "two": 2, "three": 3}, 8, timed)
    assert found == {"one": [1.0] * 8, "two": [2.0] * 8, "three": [3.0] * 8} and gc.isenabled()
    rounds = [tuple(work for work, _ in seen[at : at + 3]) for at in range(0, 24, 3)]
    assert all(sorted(each) == [1, 2, 3] for each in rounds) and len(set(rounds)) > 1
    assert not any(enabled for _, enabled in seen)


def test_a_stopwatch_reads_its_clock_twice():
    ticks, done = iter([10.0, 12.5]), []
    assert lab.stopwatch(lambda: next(ticks))(lambda: done.append(1)) == 2.5 and done == [1]


def test_quartiles_ratios_and_their_text():
    assert lab.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 3.0, 4.0]
    assert lab.ratios([2.0, 8.0], [1.0, 2.0]) == [2.5, 3.0, 3.5], "within a round"
    assert lab.spread([2.5, 3.0, 3.5], 1) == "3.0 (2.5–3.5)" and lab.spread(None, 1) == "–"


def test_a_report_is_printed_and_written(tmp_path, capsys):
    options = lab.timing_options("Times.", rounds=5)
    assert vars(options.parse_args(["--json", "x.json"]))["out"].name == "x.json", "both names of the option"
    assert options.parse_args([]).out is None
    lab.report("two works", {"torch": "2"}, "a table", [{"ms": 1}], {"rounds": 5}, tmp_path / "out.json")
    assert capsys.readouterr().out == "two works; torch 2\n\na table\n"
    assert json.loads((tmp_path / "out.json").read_text()) == {
        "settings": {"rounds": 5}, "machine": {"torch": "2"}, "rows": [{"ms": 1}]}  # fmt: skip
    with pytest.raises(SystemExit):
        options.parse_args(["--rounds", "1"])
    assert "must be at least 2, not 1" in capsys.readouterr().err
