"""The table of the whole field is complete, current, and says what the code says."""

from __future__ import annotations

import inspect
import json
import pkgutil
import re
import types

import catalogue as script
import peft
import pytest
import torch
from families import build
from witness import claims, functions, watching

import peftlab as pl
from peftlab.__main__ import main
from peftlab.catalogue import FAMILIES, INITIALISATION, OPTIMIZER, PROCEDURE, entries, entry, procedures, reference_mark

ALL = entries()
each = pytest.mark.parametrize("one", ALL, ids=lambda e: e.name)


def test_everything_that_is_registered_is_in_it_once():
    from peftlab.inits import INITS
    from peftlab.optim import OPTIMIZERS

    ours = ["Arrow", *(name for name, method in pl.METHODS.items() if method.__module__.startswith("peftlab."))]
    assert sorted(e.name for e in ALL) == sorted([*ours, *INITS, *OPTIMIZERS, *procedures()])


@each
def test_each_says_what_it_is_its_equation_its_count_and_its_paper(one):
    assert one.family in (*FAMILIES, INITIALISATION, OPTIMIZER, PROCEDURE)
    assert one.what and not one.what.endswith(".") and len(one.what) < 120
    assert re.search(r"\w", one.source), "Source: authors year, paper"
    if one.family in FAMILIES:
        assert one.count and one.equation and one.lines <= 80
    if one.arxiv:
        assert one.year and 0 <= one.year - (2000 + int(one.arxiv[:2])) <= 3, "printed in a journal later, never before"


def test_the_pages_are_current():
    known = script.measured()
    assert json.loads(script.JSON.read_text(encoding="utf-8")) == known, "run python scripts/catalogue.py"
    assert script.PAGE.read_text(encoding="utf-8") == script.page(known), "run python scripts/catalogue.py"


def test_each_type_of_the_reference_is_here_or_it_is_said_why_not():
    here = {method.hf_type for method in pl.METHODS.values()}
    assert {t.value for t in peft.PeftType} - here == set(script.NOT_HERE)


# method -> why no test compares its files both ways, outputs and gradients with the reference's
PARTLY = {
    "C3A": "the reference's gradient is no derivative: test_the_gradient_of_c3a_is_the_derivative",
    "MonteCLoRA": "gradients are of random draws there",
    "QALoRA": "the reference has it on layers of GPTQ alone",
    "XLoRA": "the reference saves no classifier",
    "Arrow": "nothing of it is saved or trained",
    "ModuleCopy": "it is part of other methods' files there",
}


def test_each_method_that_the_reference_has_is_compared_with_it():
    marks = {e.name: reference_mark(e.can) for e in ALL if e.family in FAMILIES}
    assert {name for name, mark in marks.items() if mark == "r"} == set(PARTLY)
    assert {name for name, mark in marks.items() if mark == "R"} == {e.name for e in ALL if e.hf_type} - set(PARTLY)


def test_what_the_reference_does_not_have_is_not_said_to_be_compared():
    """A module of the reference with the name of a method would be a reason to look again."""
    theirs = {ours.partition(",")[0] for there in script.VARIANTS.values() for ours in there.values()}
    compared = {e.name for e in ALL if e.family not in FAMILIES and e.can.get("reference")}
    assert compared == theirs & set(functions()) - {"kaiming"}, "kaiming is torch's own, in both"
    for function in {word for e in ALL for word in e.can.get("reference", ()) if "." in word}:
        assert function.startswith(("peft.", "peftlab.")) and callable(pkgutil.resolve_name(function))


def test_a_claim_that_was_not_carried_out_is_seen(tmp_path):
    """tests/witness.py, by hand: what each test marked `reference` is held to."""
    model = build("llama")
    with watching() as seen:
        pl.attach(model, "LoRA", "q_proj", name="a", r=2)
        pl.save_adapter(model, tmp_path, name="a")
    said = {
        ("DoRA", "writes"): "no DoRA was made", ("LoRA", "writes"): "the reference made no LoRA",
        ("lora_fa", "peft.optimizers.create_lorafa_optimizer"): "lora_fa was not called",
    }  # fmt: skip
    for claim, message in said.items():
        with pytest.raises(AssertionError, match=message):
            seen.confirm(*claim)
    with watching() as seen:
        pl.attach(build("llama"), "LoRA", "q_proj", name="a", r=2)
        peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    for claim, message in {
        ("LoRA", "writes"): "save_adapter was not called", ("DoRA", "writes"): "no DoRA was made",
        ("LoRA", "gradients"): "backward was not called",
        ("LoRA, rslora", "outputs"): "the reference made no LoRA rslora",
    }.items():  # fmt: skip
        with pytest.raises(AssertionError, match=message):
            seen.confirm(*claim)
    with watching() as seen:
        torch.testing.assert_close(1.0, 1.0)
        pl.attach(build("llama"), "LoRA", "q_proj", name="a", r=2)
        peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    seen.confirm("LoRA", "outputs")


def test_a_mark_without_a_known_word_is_refused():
    @pytest.mark.reference("LoRA", "file")
    def claimed():
        pass

    module = types.ModuleType("tests_of_nothing")
    module.claimed = claimed
    with pytest.raises(ValueError, match="claimed: reference"):
        list(claims(module))


def test_the_references_variants_are_named_rightly():
    names = {e.name for e in ALL}
    for there in script.VARIANTS.values():
        for ours in there.values():
            assert ours.startswith((":", "every")) or ours.partition(",")[0] in names, ours
    starts = inspect.getsource(peft.LoraConfig)
    for word in ("gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal", "lora_ga"):
        assert f'"{word}"' in starts and word in names


def test_the_verb_prints_all_one_and_a_family(capsys):
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {e.name}" in text for e in ALL)
    assert main(["methods", "lora"]) == 0
    text = capsys.readouterr().out
    assert "h = W₀x + (α/r)·B·A·x" in text and "r·(in + out)" in text and "arxiv.org/abs/2106.09685" in text
    assert main(["methods", "--family", "orthogonal", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found and {e["family"] for e in found} == {"orthogonal"}


@pytest.mark.parametrize("columns", [80, 120])
def test_the_verb_fits_the_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    for verb in (["methods"], ["methods", "LadderSide"], ["methods", "lora_fa"]):
        assert main(verb) == 0
        long = [line for line in capsys.readouterr().out.splitlines() if len(line) > columns]
        assert not [line for line in long if line.strip().count(" ")], "only what has no blank in it may be longer"


def test_no_cell_of_the_page_is_cut_in_its_middle():
    """A clause that begins, an open bracket, a name for what it is, or code within code would be the extraction's."""
    for e in ALL:
        assert e.what.lower() not in (e.name.lower(), ""), e.name
        assert all(e.equation.count(a) == e.equation.count(b) for a, b in ("()", "[]")), e.equation
        assert not re.search(r"(\b(and|with|where|so that|of|the|a)|[=·+←,:;])$", e.equation), e.equation
    for line in script.PAGE.read_text(encoding="utf-8").splitlines():
        assert line.count("`") % 2 == 0 and (not line.startswith("|") or len(re.findall(r"(?<!\\)\|", line)) > 3), line


def test_wrong_names_get_the_nearest(capsys):
    assert main(["methods", "LoRAA"]) == 2
    assert "LoRA" in capsys.readouterr().err
    assert main(["methods", "--family", "nonsense"]) == 2
    assert "orthogonal" in capsys.readouterr().err
    with pytest.raises(ValueError, match="nothing here is called"):
        entry("zzz")
