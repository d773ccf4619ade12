"""The recorded comparison with llama.cpp; tests/export runs the real thing."""

import json

import pytest
from families import scripts

import peftlab as pl
from peftlab import export, lab


@pytest.fixture(scope="module")
def agreement():
    with scripts("agreement") as (module,):
        yield module


def test_the_first_line_is_judged_by_what_it_finds(agreement):
    row = pl.tasks.load("sql")["test"][0]
    gold = row["completion"].strip()
    assert agreement.right(row, f" {gold}\nand so on") and agreement.right(row, gold.lower().replace(" ", "  "))
    assert not agreement.right(row, f"{gold} LIMIT 0") and not agreement.right(row, "no SQL at all")


def test_in_float32_all_recorded_answers_are_equal():
    recorded = json.loads((lab.RESULTS / "llama_cpp.json").read_text())
    lines = {line["file"]: line for line in recorded["agreement"]}
    assert set(lines) == {"base, f32", "base + adapter, f32", *(f"merged, {kind}" for kind in export.KINDS)}
    assert recorded["machine"]["llama_cpp_python"] and recorded["machine"]["commit"]
    for name, line in lines.items():
        exact = name.endswith("f32")
        assert line["prompts"] == 20 and (line["equal answers"] == 20 and line["logits apart"] < 1e-3 or not exact)
    assert lines["base, f32"]["right"] < lines["merged, f32"]["right"], "or nothing would have been shown"
